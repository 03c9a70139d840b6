"""--prior frozen: the class's targets are what the model predicted before it was trained."""

import copy

import pytest
import torch
from test_loss import noise_scheduler, random_batch
from training_runs import ADAPTER_FLAGS, SHORT, assert_same_weights, interrupt, make_run, steps, survey, tiny_training, weights

import dreambooth_implementation as db

FROZEN = ["--prior", "frozen"]


@pytest.mark.parametrize("noise", [db.Diffusion(noise_scheduler("epsilon")), db.Flow(1.0, "uniform")])
@pytest.mark.parametrize("photos, class_pictures", [(2, 2), (1, 0), (0, 1)])
def test_the_class_is_drawn_to_predictions_and_the_photos_to_noise(noise, photos, class_pictures):
    """The loss in float64: mean (pred - target)^2 of photos plus the weighted mean (pred - untouched)^2 of the class's pictures."""
    batch = random_batch(max(photos, 1), class_pictures, 0.3) if photos else random_batch(1, 1, 0.3)
    batch = batch if photos else {key: value[1:] for key, value in batch.items()}  # as --split_batch has it
    count = photos + class_pictures
    batch["levels"] = noise.levels(count, torch.Generator().manual_seed(3))
    batch |= {"is_class": torch.arange(count) >= photos, "number": torch.arange(count)}
    guess, before = torch.randn(2, count, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    noisy = noise.noisy(batch["latents"], batch["noise"], batch["levels"])
    asked = []

    def untouched(latents, part):
        asked.append(part["number"].tolist())
        assert torch.equal(latents, noisy[part["number"]])
        return before[part["number"]]
    loss, losses = db.denoising_loss(noise, batch, lambda noisy, batch: guess, untouched)

    target = noise.target(batch["latents"], batch["noise"], batch["levels"])
    target = torch.cat([target[:photos], before[photos:]])
    expected = (guess - target).double().square().mean(dim=(1, 2, 3))
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert loss.item() == pytest.approx((batch["weight"].double() * expected).sum().item(), rel=1e-4)
    assert asked == [[*range(photos, count)]] * (class_pictures > 0)


RUNS = [("full", dict(train_text_encoder=True)), ("full", dict(precision="bf16")), ("lora", dict(train_text_encoder=True)),
        ("lora", dict(use_dora=True)), ("pivotal", {})]


def frozen_run(tiny_model, method, levers=db.Levers(), **options):
    return make_run(tiny_model, method, learning_rate=1e-2, text_encoder_lr=1e-2, prior="frozen", levers=levers, **options)


def class_batch(run):
    batch = db.make_batch(run.cache, run.s, 0, run.noise)
    noisy = run.noise.noisy(batch["latents"], batch["noise"], batch["levels"])
    return noisy[1:], {key: value[1:] for key, value in batch.items()}


@pytest.mark.parametrize("method, options", RUNS)
def test_targets_stay_those_of_the_untouched_model(method, options, tiny_model):
    run = frozen_run(tiny_model, method, **options)
    models = db.load_models(str(tiny_model("sd1")), torch.float32)  # another, that never trains
    noisy, batch = class_batch(run)
    with torch.no_grad():
        told = db.rows_of(models.family.encode(models, run.cache.prompts), batch["prompt"], torch.device("cpu"))
        expected = models.family.predict(models, noisy, batch["levels"], told, batch["sizes"])
        close = dict(atol=3e-2, rtol=0) if options.get("precision") == "bf16" else dict(atol=1e-5, rtol=0)
        before = run.untouched(noisy, batch)
        torch.testing.assert_close(before.float(), expected, **close)
        torch.testing.assert_close(run.denoiser(noisy, batch).float(), expected, **close)  # nothing has trained yet
    measured = steps(run, 0, 3)
    assert measured[0, 1] < 1e-3 < measured[2, 1]  # so nothing of the class is to be learnt at first
    with torch.no_grad():
        assert torch.equal(run.untouched(noisy, batch), before)
        assert (run.denoiser(noisy, batch) - before).abs().max() > 0.05


@pytest.mark.parametrize("method", ["full", "lora", "pivotal"])
@pytest.mark.parametrize("levers", [db.Levers(split_batch=True), db.Levers(fused_backward=True), db.Levers(gradient_checkpointing=True)])
def test_gradients_reach_what_trains_and_nothing_else(method, levers, tiny_model):
    run = frozen_run(tiny_model, method, levers)
    trained = db.trained_tensors(run.groups)
    before = {name: tensor.clone() for name, tensor in trained.items()}
    others = [*run.untouched.models.denoiser.parameters(), *run.models.vae.parameters()]
    mine = {id(parameter) for group in run.groups for parameter in group.parameters}
    others = [(parameter, parameter.detach().clone()) for parameter in others if id(parameter) not in mine]
    steps(run, 0, 2)
    assert all(parameter.requires_grad for group in run.groups for parameter in group.parameters)
    assert others and all(parameter.grad is None and torch.equal(parameter, kept) for parameter, kept in others)
    assert sum(not torch.equal(before[name], tensor) for name, tensor in trained.items()) > len(trained) / 2


def test_a_memory_plan_counts_the_copy(tiny_model):
    whole, half, adapter = (survey(tiny_training(tiny_model, method, precision=precision, prior="frozen")).frozen
                            - survey(tiny_training(tiny_model, method, precision=precision)).frozen
                            for method, precision in (("full", "no"), ("full", "bf16"), ("lora", "no")))
    count = db.load_models(str(tiny_model("sd1")), torch.float32).denoiser.num_parameters()
    assert (whole, half, adapter) == (4 * count, 2 * count, 0)


def test_a_copy_is_of_its_own_and_in_its_precision(tiny_model):
    denoiser = db.load_models(str(tiny_model("sdxl")), torch.float32).denoiser
    twin = db.untouched_copy(denoiser, torch.bfloat16, "cpu")
    kept = copy.deepcopy(twin.state_dict())
    with torch.no_grad():
        for parameter in denoiser.parameters():
            assert parameter.dtype == torch.float32
            parameter.zero_()
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in twin.parameters()) and not twin.training
    assert all(torch.equal(tensor, kept[name]) for name, tensor in twin.state_dict().items())


@pytest.mark.parametrize("method, family", [("full", "sdxl"), ("lora", "sd2"), ("pivotal", "sd1"), ("lora", "flux"), ("full", "sd3")])
def test_no_class_image_is_made_and_resumed_equals_uninterrupted(method, family, run, tiny_model, photos, monkeypatch, tmp_path):
    monkeypatch.setattr(db, "draw_class_images", None)
    text = ["--train_text_encoder"] if family == "sdxl" else []
    flags = ["--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, *SHORT, "--steps", 4, "--method", method,
             *ADAPTER_FLAGS.get(method, ["--learning_rate", "1e-3"]), "--resolution", 32, "--identifier", "<zwx>" if method == "pivotal" else "zwx", "--no-samples", *text]
    status, out, err = run(*flags, *FROZEN, "--output_dir", "whole", "--checkpointing_steps", 2)
    assert status == 0, err
    assert "Note: --num_class_images: not used" in out and "as the frozen model predicts" in out
    undo = interrupt(monkeypatch, 2)
    assert run(*flags, *FROZEN, "--output_dir", "output", "--resume")[0] == 130
    undo()
    status, out, err = run(*flags, "--resume")
    assert status == 2 and "--prior" in err and err.count("\n") == 1, err
    status, out, err = run(*flags, *FROZEN, "--resume")
    assert status == 0 and "after step 2" in out, err
    assert_same_weights(tmp_path / "output", tmp_path / "whole")
    assert not (tmp_path / "class_images").exists()
    status, out, err = run(*flags, "--no-with_prior_preservation", "--output_dir", "alone")
    alone, held = weights(tmp_path / "alone"), weights(tmp_path / "whole")
    assert any(not torch.equal(alone[name], held[name]) for name in held)


def test_what_goes_unused_beside_it_is_said(run, tiny_model, photos, tmp_path):
    (tmp_path / "own").mkdir()
    status, out, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, *SHORT, "--steps", 1, *FROZEN,
                           "--class_data_dir", "own", "--class_guidance_scale", 2, "--prior_generation_precision", "fp32", "--no-samples")
    assert status == 0, err
    assert "--class_data_dir, --num_class_images, --class_guidance_scale: not used" in out
    assert "--prior_generation_precision: no effect, it needs --with_prior_preservation and --prior images" in out
    status, out, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, *SHORT, "--steps", 1, *FROZEN,
                           "--no-with_prior_preservation", "--no-samples", "--output_dir", "without")
    assert status == 0 and "--prior: no effect, it needs --with_prior_preservation" in out, err

"""What a training changes and what it must not, for each model family."""

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file

import dreambooth_implementation as db

QUICK = ["--class_prompt", "a dog", "--num_class_images", "2", "--num_inference_steps", "2", "--learning_rate", "1e-3"]


def weights(folder):
    """{"part/tensor": value} of every safetensors file of a pipeline folder."""
    return {f"{path.parent.name}/{name}": tensor for path in sorted(folder.rglob("*.safetensors"))
            for name, tensor in load_file(path).items()}


def unused_by_the_loss(family, name):
    """SDXL reads its first text encoder before the last of its three layers."""
    return family == "sdxl" and name.startswith("text_encoder/") and ("layers.2." in name or "final_layer_norm" in name)


@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet+text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_what_should_train_changes(family, text, tiny_model, photos, run, tmp_path):
    model = tiny_model(family)
    status, out, err = run("--train", "--model_name", model, "--instance_data_dir", photos, "--steps", 3, *QUICK,
                           *(["--train_text_encoder", "--text_encoder_lr", "1e-3"] if text else []))
    assert status == 0, err
    before, after = weights(model), weights(tmp_path / "output")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if name.startswith("unet/") or text and name.startswith("text_encoder")
                and not unused_by_the_loss(family, name)}
    # Rows of the token table move by weight decay alone where a token is in no prompt; a zero stays a zero.
    assert changed <= expected
    assert all(name in changed for name in expected if before[name].abs().max() > 0), expected - changed
    assert "instance" in out and "prior" in out


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_conditioning_equals_the_pipelines_own(family, tiny_model):
    models = db.load_models(str(tiny_model(family)), torch.float32)
    prompts = ["a dog on the moon", "a cat"]
    hidden, pooled = db.encode_prompts(models, prompts)
    own = models.pipeline.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    torch.testing.assert_close(hidden, own[0])
    if family == "sdxl":
        torch.testing.assert_close(pooled, own[2])
    else:
        assert pooled is None


def test_accumulated_steps_equal_one_large_batch(tiny_model, photos, run, tmp_path):
    """Two micro-batches of one photo and one class image make the gradient of one batch of the four."""
    models = db.load_models(str(tiny_model("sd1")), torch.float32)
    dogs = [[(photos / "0.png", "a dog"), (photos / "2.png", "a dog")]]
    cache = db.cache_latents(models, [[(photos / f"{i}.png", "a sks dog") for i in range(2)]], dogs, 32, "cpu")
    s = db.Settings("train", gradient_accumulation_steps=2)
    conditioning = db.prompt_conditioning(models, cache.prompts, db.encode_for_good(models, cache.prompts, "cpu"), torch.device("cpu"))

    def gradient(batch):
        models.unet.requires_grad_(True).zero_grad()
        loss, _ = db.diffusion_loss(models.noise_scheduler, batch, lambda noisy, batch: db.predict(
            models.unet, noisy, batch["timesteps"], *conditioning(batch["prompt"]), batch["time_ids"]))
        loss.backward()
        return models.unet.conv_in.weight.grad.clone()

    micro = [db.make_batch(cache, s, i, 1000) for i in range(2)]
    joined = {key: torch.cat([m[key] for m in micro]) for key in micro[0]}
    joined["weight"] = joined["weight"] / 2
    torch.testing.assert_close((gradient(micro[0]) + gradient(micro[1])) / 2, gradient(joined), atol=1e-6, rtol=1e-4)


def test_warmup_counts_optimizer_steps(tiny_model, photos, run, monkeypatch):
    rates = []
    report = db.report_losses
    monkeypatch.setattr(db, "REPORT_EVERY", 1)
    monkeypatch.setattr(db, "report_losses", lambda state, *rest:
                        rates.append(state.lr_scheduler.get_last_lr()) or report(state, *rest))
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--steps", 6, *QUICK,
                         "--gradient_accumulation_steps", 3, "--lr_scheduler", "linear", "--lr_warmup_steps", 2,
                         "--train_text_encoder", "--text_encoder_lr", "1e-4")
    assert status == 0, err
    assert [rate for rate, _ in rates] == pytest.approx([5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0])
    assert [text / unet for unet, text in rates[:-1]] == pytest.approx([0.1] * 5)

    rates.clear()
    assert run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--steps", 3, *QUICK,
               "--lr_warmup_steps", 2, "--lr_scheduler", "constant")[0] == 0
    assert [rate for rate, in rates] == pytest.approx([5e-4, 1e-3, 1e-3])  # "constant" warms up as well


@pytest.mark.parametrize("flags, schedule", [
    ([], "warmup_stable_decay"), (["--lr_scheduler", "constant"], "constant"), (["--method", "lora"], "constant"),
    (["--select_best", "--validation_steps", 8], "constant")], ids=str)
def test_the_rate_falls_where_the_recipe_says_so(flags, schedule, tiny_model, photos, run, tmp_path, monkeypatch, networks):
    """In the last quarter of the steps."""
    import json

    rates, report = [], db.report_losses
    monkeypatch.setattr(db, "REPORT_EVERY", 1)
    monkeypatch.setattr(db, "report_losses", lambda state, *rest:
                        rates.append(state.lr_scheduler.get_last_lr()[0]) or report(state, *rest))
    status, out, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--steps", 8, *QUICK,
                           "--learning_rate", "1e-3", *flags, "--dino_model", networks / "vit", "--clip_model", networks / "clip")
    assert status == 0 and f"8 steps, {schedule}" in out, err
    falling = [5e-4, 0] if schedule == "warmup_stable_decay" else [1e-3, 1e-3]
    assert rates == pytest.approx([1e-3] * 6 + falling)
    assert json.loads((tmp_path / "output" / "dreambooth.json").read_text())["used"]["lr_scheduler"] == schedule


@pytest.mark.parametrize("flags, kept", [(["--use_ema"], True), (["--select_best", "--validation_steps", 4], True),
                                         (["--select_best", "--validation_steps", 4, "--no-use_ema"], False), ([], False),
                                         (["--method", "lora", "--select_best", "--validation_steps", 4], False)], ids=str)
def test_the_running_average_is_saved_and_does_not_train(flags, kept, tiny_model, photos, run, tmp_path, monkeypatch, networks):
    """With the decay (1 + n) / (10 + n) up to 0.99; the weights that train are those of a run without it."""
    seen, step = [], db.train_step

    def look(state, number):
        if not seen:
            seen.append([t.double() for t in db.trained_tensors(state.groups).values()])
        result = step(state, number)
        seen.append([t.double() for t in db.trained_tensors(state.groups).values()])
        return result
    finished, finish = [], db.unwrap
    monkeypatch.setattr(db, "train_step", look)
    monkeypatch.setattr(db, "unwrap", lambda state: (finished.extend(
        t.double() for t in db.trained_tensors(state.groups).values()), finish(state)))
    status, out, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--steps", 4, *QUICK,
                           *flags, "--lr_scheduler", "constant", "--dino_model", networks / "vit", "--clip_model", networks / "clip")
    assert status == 0 and ("running average" in out) == kept, err
    average = [t.clone() for t in seen[0]]
    for n, weights in enumerate(seen[1:]):
        average = [(1 + n) / (10 + n) * a + (1 - (1 + n) / (10 + n)) * w for a, w in zip(average, weights)]
    expected = average if kept else seen[-1]
    assert all(torch.allclose(a, f, atol=1e-6) for a, f in zip(expected, finished)) and len(finished) == len(average)
    assert not all(torch.allclose(a, w, atol=1e-5) for a, w in zip(average, seen[-1]))


def test_training_learns_its_pictures(tiny_model, photos, run, tmp_path):
    """Without the optimizer's step, or with targets of another kind, the loss would stay at about 1."""
    import json

    for family in ("sd1", "sd2"):
        status, _, err = run("--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, "--steps", 250, *QUICK,
                             "--output_dir", family)
        assert status == 0, err
        loss = json.loads((tmp_path / family / "dreambooth.json").read_text())["loss"]
        for kind in ("instance", "prior"):
            assert loss["last_100_steps"][kind] < 0.75 * loss["first_100_steps"][kind], (family, loss)


def test_same_seed_same_weights(tiny_model, photos, run, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--steps", 2, *QUICK,
                   "--seed", seed, "--output_dir", name)[0] == 0
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a) and any(not torch.equal(a[name], c[name]) for name in a)


def test_options_of_the_loop(tiny_model, photos, run, tmp_path):
    """Checkpointed activations change nothing; min-SNR weights, mirrored photos and no class images change something."""
    options = {"plain": [], "checkpointed": ["--gradient_checkpointing"], "snr": ["--snr_gamma", "5"],
               "mirrored": ["--random_flip"], "alone": ["--no-with_prior_preservation"], "unclipped": ["--max_grad_norm", "0"]}
    results = {}
    for name, flags in options.items():
        status, out, err = run("--train", "--model_name", tiny_model("sdxl"), "--instance_data_dir", photos, "--steps", 3,
                               "--train_text_encoder", *QUICK, "--output_dir", name, *flags)
        assert status == 0, (name, err)
        assert ("no class images" in out) == (name == "alone")
        assert ("Gradient checkpointing: on" in out) == (name == "checkpointed")
        results[name] = weights(tmp_path / name)
    plain = results.pop("plain")
    for tensor in plain:
        torch.testing.assert_close(plain[tensor], results["checkpointed"][tensor])
    del results["checkpointed"]
    for name, result in results.items():
        assert any(not torch.allclose(plain[tensor], result[tensor]) for tensor in plain), name


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_trains_float32_weights_and_draws(family, tiny_model, photos, run, tmp_path):
    status, out, err = run("--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, "--steps", 2, *QUICK,
                           "--mixed_precision", "bf16", "--train_text_encoder")
    assert status == 0 and "arithmetic bf16" in out, err
    after = weights(tmp_path / "output")
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in after.values())
    unet = after["unet/conv_in.weight"]
    assert not torch.equal(unet, unet.bfloat16().float())
    assert run("--infer", "--num_images", 1, "--num_inference_steps", 2, "--mixed_precision", "bf16")[0] == 0


def test_a_diverging_run_stops_and_leaves_nothing(tiny_model, photos, run, tmp_path):
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--steps", 40, *QUICK,
                         "--learning_rate", "1e30", "--max_grad_norm", "1e30")
    assert status == 2 and "training stopped" in err and err.count("\n") >= 1
    assert not list(tmp_path.glob("output*"))

"""The training loop: it learns, repeats itself, and does what its flags say."""

import pytest
import torch
from safetensors.torch import load_file
from training_runs import FAST, make_run, weights

import dreambooth_implementation as db


@pytest.mark.long
def test_training_learns_its_pictures(tiny_model, photos, run, tmp_path):
    """Without the optimizer's step, or with targets of another kind, the loss would stay at about 1."""
    import json

    for family in ("sd1", "sd2"):
        status, _, err = run("--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, *FAST,
                             "--steps", 250, "--output_dir", family)
        assert status == 0, err
        loss = json.loads((tmp_path / family / "dreambooth.json").read_text())["loss"]
        for kind in ("instance", "prior"):
            assert loss["last_100_steps"][kind] < 0.75 * loss["first_100_steps"][kind], (family, loss)


def test_same_seed_same_weights(tiny_model, photos, run, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--steps", 2, *FAST,
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
                               "--train_text_encoder", *FAST, "--output_dir", name, *flags)
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


@pytest.mark.parametrize("method", ["lora", "textual_inversion", "pivotal"])
def test_options_of_the_loop_work_with_every_method(method, train_adapter, tmp_path):
    """Checkpointed activations change nothing; min-SNR weights do; a run repeats itself."""
    text = [] if method == "textual_inversion" else ["--train_text_encoder"]
    results = {}
    for name, flags in {"plain": [], "again": [], "checkpointed": ["--gradient_checkpointing"], "snr": ["--snr_gamma", "5"],
                        "prior": ["--with_prior_preservation"],
                        "strong prior": ["--with_prior_preservation", "--prior_loss_weight", "3"]}.items():
        out = train_adapter("sdxl", method, "--output_dir", name, *text, *flags)
        assert ("change nothing" in out) == ("prior" in name and method == "textual_inversion")
        results[name] = {f"{path.name}/{key}": tensor for path in sorted((tmp_path / name).glob("*.safetensors"))
                         for key, tensor in load_file(path).items()}
    plain = results.pop("plain")
    assert all(torch.equal(plain[key], results["again"][key]) for key in plain)
    for key in plain:
        torch.testing.assert_close(plain[key], results["checkpointed"][key])
    assert any(not torch.allclose(plain[key], results["snr"][key]) for key in plain)
    a, b = results["prior"], results["strong prior"]
    assert all(torch.equal(a[key], b[key]) for key in a) == (method == "textual_inversion")


def gradients(run):
    """{tensor: gradient} of the first step, and the norm that the program measures."""
    seen, step = {}, run.optimizer.step
    run.optimizer.step = lambda: (seen.update((f"{g.name}.{i}", p.grad.clone()) for g in run.groups
                                              for i, p in enumerate(g.parameters)), step())
    return seen, db.train_step(run, 0)[0][2]


def test_a_split_batch_has_the_same_gradient(tiny_model):
    options = dict(train_batch_size=2, max_grad_norm=0)
    whole, norm = gradients(make_run(tiny_model, prior_loss_weight=0.7, **options))
    split, _ = gradients(make_run(tiny_model, prior_loss_weight=0.7, levers=db.Levers(split_batch=True), **options))
    assert len(whole) > 50 and whole.keys() == split.keys()
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-3, atol=1e-6)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in whole.values()]).norm().item(), rel=1e-4)
    without, _ = gradients(make_run(tiny_model, prior_loss_weight=0.0, **options))  # the class images matter
    convolutions = [name for name in whole if whole[name].ndim == 4]
    assert not any(torch.allclose(without[name], whole[name], rtol=1e-2, atol=1e-6) for name in convolutions)

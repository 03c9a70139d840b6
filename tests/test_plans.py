"""The plans that save memory: what goes together, and what each saves."""

import dataclasses

import pytest
import torch
from training_runs import OPTIONAL, demand, need, survey, tiny_training

import dreambooth_implementation as db


@pytest.mark.parametrize("given, said", [
    (["--fused_backward", "--gradient_accumulation_steps", 2], "--gradient_accumulation_steps"),
    (["--fused_backward", "--split_batch"], "--split_batch"),
    (["--fused_backward", "--optimizer", "prodigy"], "--optimizer prodigy"),
    (["--weights", "bf16", "--use_ema", "--fused_backward"], "--use_ema"),
    (["--weights", "bf16"], "--optimizer adamw8bit"),
    (["--offload_optimizer"], "--fused_backward"),
    (["--weights", "bf16", "--optimizer", "adamw8bit"], "--mixed_precision bf16"),
    (["--weights", "bf16", "--method", "lora"], "--weights has no meaning with --method lora"),
    (["--optimizer", "prodigy", "--method", "pivotal"], "--method pivotal"),
    (["--optimizer", "sgd"], "--optimizer"),
])
def test_levers_that_do_not_go_together_are_one_line(given, said, run, photos, tiny_model, monkeypatch):
    need("adamw8bit"), need("prodigy")
    monkeypatch.setattr(db, "load_models", lambda *args: pytest.fail("a model was loaded"))
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt",
                         "a dog", *given)
    assert status == 2 and said in err and err.count("\n") == 1, err


def test_a_missing_package_is_named(run, photos, tiny_model, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name in OPTIONAL.values() else find(name, *rest))
    monkeypatch.setattr(db, "load_models", lambda *args: pytest.fail("a model was loaded"))
    for optimizer, package in OPTIONAL.items():
        status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt",
                             "a dog", "--optimizer", optimizer)
        assert status == 2 and f"pip install {package}" in err and err.count("\n") == 1, err


def test_fused_backward_does_not_go_with_fp16():
    s = db.Settings("train", fused_backward=True)
    assert db.objection(s, db.StableDiffusion(), db.Levers(fused_backward=True), "no") is None
    assert "fp16" in db.objection(s, db.StableDiffusion(), db.Levers(fused_backward=True), "fp16")


def test_every_further_lever_saves(tiny_model):
    """On pictures so small that weights matter more than activations."""
    training = tiny_training(tiny_model, "full", "sdxl", "bf16")
    needs = {row: sum(db.estimate(survey(training, row, 64), row).values()) for row in db.PLANS if not (row.split_batch or row.shard or row.offload_blocks)}
    for adafactor in [row for row in db.PLANS if row.optimizer == "adafactor"]:
        del needs[adafactor]  # what it saves depends on the layers' shapes
    assert list(needs.values()) == sorted(needs.values(), reverse=True) and len(set(needs.values())) == len(needs) == 6
    matrices, kernels = demand(trained=((1280, 1280),) * 9), demand(trained=((64, 64, 3, 3),) * 99)
    without = dataclasses.replace(adafactor, optimizer="adamw8bit")
    saved = [db.estimate(shapes, without)["optimizer"] / db.estimate(shapes, adafactor)["optimizer"]
             for shapes in (matrices, kernels)]
    assert saved[0] > 100 and saved[1] < 1


def test_a_little_of_what_a_gpu_has_free_is_left(monkeypatch):
    share = [1.0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share[0])
    s = db.Settings("train")
    assert db.memory_limit(s, db.Plan(torch.device("cuda"), "bf16")) == 970
    share[0] = 0.25  # torch.cuda.set_per_process_memory_fraction()
    assert db.memory_limit(s, db.Plan(torch.device("cuda"), "bf16")) == 485
    assert db.memory_limit(dataclasses.replace(s, max_vram="2"), db.Plan(torch.device("cuda"), "bf16")) == 2 * db.GIB
    assert db.memory_limit(s, db.Plan(torch.device("cpu"), "no")) is None


@pytest.mark.parametrize("limit", ["lots", "0", "-3", "nan", "inf"])
def test_a_limit_must_be_a_number(limit, run, photos, tiny_model):
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt",
                         "a dog", f"--max_vram={limit}")
    assert status == 2 and f"--max_vram {limit}" in err and err.count("\n") == 1, err

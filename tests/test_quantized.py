"""The frozen base of a LoRA in fewer bits."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from tiny_families import TINY
from training_runs import need

import dreambooth_implementation as db

QUICK = ["--class_prompt", "a dog", "--resolution", "32", "--steps", "3", "--num_class_images", "1", "--num_inference_steps", "1",
         "--method", "lora", "--mixed_precision", "bf16"]


@pytest.fixture(params=list(TINY))
def model(request, tiny_model):
    pytest.importorskip("torchao")
    return str(tiny_model(request.param))


@pytest.fixture
def bitsandbytes(monkeypatch):
    """bitsandbytes, which has kernels for the CPU; diffusers wants a GPU for it all the same."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import modules
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda *_: {"": "cpu"})
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)  # a way to compute that takes no layer of fewer than 64 inputs


@pytest.mark.parametrize("base, most", [("int8", 0.02), ("fp8", 0.05), ("nf4", 0.15)])
def test_a_base_in_fewer_bits_is_nearly_the_same_and_whole_outside_its_blocks(base, most, model, request):
    if base == "nf4":
        request.getfixturevalue("bitsandbytes")
    shelf = db.Shelf(model, "", None)
    whole = shelf.read(shelf.denoiser, torch.bfloat16)
    fewer = shelf.read(shelf.denoiser, torch.bfloat16, **db.quantization(base, torch.bfloat16, whole))
    of_blocks = {part for block in db.recomputed_blocks(whole) for part in block.modules()}
    chosen = db.in_fewer_bits(whole, base)
    for name, layer in ((name, part) for name, part in whole.named_modules() if isinstance(part, torch.nn.Linear)):
        weight = fewer.get_submodule(name).weight
        assert (type(weight).__name__ != "Parameter") == (layer.weight in chosen), name
        assert layer.weight in chosen if layer in of_blocks else layer.weight not in chosen or name == "proj_out", name
        if layer.weight in chosen:
            error = (dequantized(weight) - layer.weight.float()).norm() / layer.weight.float().norm()
            assert 0 < error < most, name
        else:
            assert torch.equal(weight, layer.weight), name


def dequantized(weight):
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit
        return dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.dequantize().float()


def test_only_the_lora_trains_on_a_base_in_fewer_bits(model, photos, run, tmp_path):
    status, _, err = run("--train", "--model_name", model, "--instance_data_dir", photos, *QUICK, "--base_precision", "int8",
                         "--learning_rate", "1e-2")
    assert status == 0, err
    from safetensors.torch import load_file
    weights = load_file(tmp_path / "output" / "pytorch_lora_weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    learnt = [tensor.any() for name, tensor in weights.items() if "lora_B" in name]
    assert sum(learnt) > len(learnt) * 0.8  # a last block may give nothing to the text
    status, _, err = run("--infer", "--model_path", "output", "--num_images", 1, "--num_inference_steps", 2, "--base_precision", "int8",
                         "--mixed_precision", "bf16")
    assert status == 0, err


@pytest.mark.parametrize("flags, said", [
    (["--method", "full"], "has no meaning with --method full"), (["--method", "lora", "--use_dora"], "DoRA needs the weights"),
    (["--method", "lora", "--mixed_precision", "no", "--train_text_encoder"], "text encoder")])
def test_where_fewer_bits_make_no_sense_it_is_said(flags, said, model, photos, run):
    status, _, err = run("--train", "--model_name", model, "--instance_data_dir", photos, "--class_prompt", "a dog", "--base_precision",
                         "int8", *flags)
    assert status == 2 and said in err and len(err.splitlines()) < 3


def test_without_a_gpu_nf4_is_one_line(tiny_model, photos, run):
    need("adamw8bit")
    status, _, err = run("--train", "--model_name", tiny_model("z-image"), "--instance_data_dir", photos, *QUICK, "--base_precision", "nf4")
    assert status == 2 and ("CUDA" in err or "bitsandbytes" in err)


def test_class_images_of_a_base_in_fewer_bits_are_others(tiny_model):
    models, plan = db.load_late(str(tiny_model("z-image")), torch.bfloat16), db.Plan(torch.device("cpu"), "bf16")
    whole, fewer = (db.class_image_settings(db.Settings("train"), dataclasses.replace(models, base_precision=base), "a dog", (32, 32), plan)
                    for base in ("bf16", "int8"))
    assert fewer == {**whole, "base_precision": "int8"} and "base_precision" not in whole


def test_nothing_is_printed_but_what_the_program_says(tiny_model, tmp_path):
    """diffusers remarks on parts without memory and on packages otherwise."""
    pytest.importorskip("torchao")
    script = f"import torch, dreambooth_implementation as db; db.load_late({str(tiny_model('z-image'))!r}, torch.bfloat16)"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "" and "kept in float32" not in done.stderr and "Unable to import" not in done.stderr

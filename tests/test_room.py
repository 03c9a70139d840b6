"""Large transformers that draw: read part by part, in as many bits as there is room for."""

import dataclasses

import pytest
import torch
from PIL import Image
from tiny_families import TINY

import dreambooth_implementation as db

CPU = torch.device("cpu")
DRAW = ["--prompt", "a dog", "--num_images", 1, "--num_inference_steps", 1, "--height", 32, "--width", 32]


@pytest.fixture
def hollow(tiny_model):
    """Late models whose transformer has no memory yet."""
    return db.load_late(str(tiny_model("z-image")), torch.bfloat16, trains=False)


@pytest.mark.parametrize("family", TINY)
def test_a_whole_model_draws_after_its_text_encoders_have_gone(family, tiny_model, run, monkeypatch):
    read, there = db.Shelf.read, []

    def reading(shelf, part, *args, **options):
        module = read(shelf, part, *args, **options)
        there.append((part, module.dtype))
        return module
    monkeypatch.setattr(db.Shelf, "read", reading)
    drop = db.PromptBook.drop
    monkeypatch.setattr(db.PromptBook, "drop", lambda book, models: (there.append("dropped"), drop(book, models)))
    status, _, err = run("--infer", "--model_path", tiny_model(family), *DRAW)
    assert status == 0, err
    *texts, gone, (last, dtype) = there
    assert gone == "dropped" and last == "transformer" and dtype == torch.float32
    assert texts and all(part.startswith("text_encoder") for part, _ in texts)


def test_a_transformer_without_room_comes_in_fewer_bits_and_that_is_said(hollow, monkeypatch, capsys):
    pytest.importorskip("torchao")
    plan, sizes = db.Plan(CPU, "bf16"), {p: db.sizes_of(hollow, p, False, torch.bfloat16)[0] for p in ("bf16", "int8", "nf4")}
    linear = sum(layer.weight.numel() for block in db.recomputed_blocks(hollow.denoiser) for layer in block.modules()
                 if isinstance(layer, torch.nn.Linear))
    whole = sum(weight.numel() for weight in hollow.denoiser.parameters())
    assert sizes["bf16"] == 2 * whole and sizes["int8"] == pytest.approx(2 * (whole - linear) + 1.002 * linear)
    chosen = {}
    for room in (None, *sizes.values()):
        monkeypatch.setattr(db, "memory_limit", lambda s, plan: room and room + hollow.family.room_to_draw)
        chosen[room] = db.base_to_draw_with(db.Settings("infer", offload_blocks=False), hollow, plan)
    assert chosen == {None: ("bf16", False), sizes["bf16"]: ("bf16", False), sizes["int8"]: ("int8", False),
                      sizes["nf4"]: ("int8", False)}  # no GPU, so no nf4
    said = capsys.readouterr().out.splitlines()
    assert sum("it comes in int8" in line for line in said) == 2
    assert db.base_to_draw_with(db.Settings("infer", base_precision="bf16", offload_blocks=False), hollow, plan) == ("bf16", False)


def test_blocks_without_room_in_any_bits_wait_and_that_is_said(hollow, monkeypatch, capsys):
    pytest.importorskip("torchao")
    with torch.device("meta"):
        many = type(hollow.denoiser).from_config({**hollow.denoiser.config, "n_layers": 64})
    models, plan = dataclasses.replace(hollow, denoiser=many), db.Plan(CPU, "bf16")
    sizes = {way: db.sizes_of(models, *way, torch.bfloat16) for way in db.WAYS_TO_DRAW}
    block = max(sum(weight.nbytes // 2 for weight in block.parameters()) for block in db.recomputed_blocks(many))  # float32 here
    assert sizes["bf16", True][0] == sizes["bf16", False][0] - sizes["bf16", True][1] + 2 * block
    assert sizes["int8", True][0] < sizes["bf16", True][0] < sizes["nf4", False][0] and sizes["bf16", False][1] == 0

    def choice(way, lacking=0, **flags):
        monkeypatch.setattr(db, "memory_limit", lambda s, plan: sizes[way][0] - lacking + models.family.room_to_draw)
        return db.base_to_draw_with(db.Settings("infer", **flags), models, plan)
    assert choice(("int8", False)) == ("int8", False)
    capsys.readouterr()
    assert choice(("bf16", True)) == ("bf16", True)
    said = capsys.readouterr().out
    assert "it comes block by block, 0.0 GiB at a time (--offload_blocks)" in said and said.count("\n") == 1
    assert choice(("int8", True)) == ("int8", True)
    assert "it comes in int8, block by block, 0.0 GiB at a time (--base_precision, --offload_blocks)" in capsys.readouterr().out
    assert choice(("int8", True), lacking=1) == ("int8", True)  # the last that can be had
    assert choice(("int8", True), lacking=1, base_precision="bf16") == ("bf16", True)
    assert choice(("bf16", False), offload_blocks=True) == ("bf16", True)
    monkeypatch.setattr(db, "cpu_memory", lambda: sizes["int8", True][1] / db.CPU_SHARE)
    assert choice(("bf16", True)) == ("int8", True)
    assert "Note: --offload_blocks would have 0.0 GiB wait in the CPU's memory" in capsys.readouterr().out


def test_what_would_fit_but_is_not_installed_is_named(hollow, monkeypatch, capsys):
    monkeypatch.setattr(db.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(db, "memory_limit", lambda s, plan: db.sizes_of(hollow, "int8", False, torch.bfloat16)[0] + hollow.family.room_to_draw)
    assert db.base_to_draw_with(db.Settings("infer", offload_blocks=False), hollow, db.Plan(CPU, "bf16")) == ("bf16", False)
    said = capsys.readouterr().out
    assert "needs torchao: pip install torchao" in said and "it comes so all the same" in said


def test_a_picture_says_in_which_bits_its_base_was(tiny_model, run, tmp_path):
    pytest.importorskip("torchao")
    status, _, err = run("--infer", "--model_path", tiny_model("z-image"), *DRAW, "--base_precision", "int8", "--mixed_precision", "bf16",
                         "--image_dir", "drawn")
    assert status == 0, err
    assert "Base precision: int8" in Image.open(next((tmp_path / "drawn").glob("a-dog*.png"))).text["parameters"]


@pytest.mark.parametrize("flags, said", [(["--base_precision", "int8"], "--base_precision int8: for transformers"),
                                         (["--base_precision", "nf4"], "--base_precision nf4: for transformers")])
def test_a_unet_has_all_its_bits(flags, said, tiny_model, run):
    status, _, err = run("--infer", "--model_path", tiny_model("sd1"), *DRAW, *flags)
    assert status == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize("name, changes", [
    ("transformer.layers.0.attention.to_q.lora_A.weight", False), ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", True),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", True), ("lora_unet_single_blocks_0_linear1.lora_down.weight", False),
    ("base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", True)])
def test_a_lora_of_a_text_encoder_keeps_it(name, changes, tmp_path, tiny_model):
    from safetensors.torch import save_file

    save_file({name: torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    assert db.changes_text(tmp_path / "lora.safetensors") == changes
    trained = db.Trained("x", {}, [], tmp_path / "lora.safetensors", {})
    assert db.is_read_late(str(tiny_model("sd3")), [trained]) != changes


def test_prompts_are_read_on_the_cpu_where_the_gpu_has_no_room(hollow, monkeypatch, capsys):
    place, db_say = torch.nn.Module.to, db.say_once
    db_say.cache_clear()

    def to(module, target, *args, **options):
        if str(target).startswith("cuda"):
            raise torch.OutOfMemoryError
        return place(module, target, *args, **options)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    hollow.book.learn(hollow, ["a dog"], torch.device("cuda"))
    assert "a dog" in hollow.book.told and "on the CPU" in capsys.readouterr().out

"""LoRA, textual inversion and pivotal tuning: what trains, what is saved, and that plain diffusers draws the same."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from PIL import Image
from safetensors.torch import load_file

import dreambooth_implementation as db

QUICK = ["--class_prompt", "a dog", "--num_class_images", "2", "--num_inference_steps", "2", "--steps", "3"]
LORA = ["--learning_rate", "1e-2", "--lora_target", "attention"]
WORDS = ["--embedding_lr", "1e-1"]
FLAGS = {"lora": LORA, "textual_inversion": WORDS, "pivotal": LORA + WORDS}


@pytest.fixture
def train(run, tiny_model, photos):
    def call(family, method, *flags):
        status, out, err = run("--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, *QUICK,
                               "--method", method, *FLAGS[method], *flags)
        assert status == 0, err
        return out

    return call


@pytest.fixture
def trained(monkeypatch):
    """What training changed: {"before", "after"}: all weights, {"part/name": tensor}, and the groups that trained."""
    seen, optimize = {}, db.optimize

    def weights(models):
        return {f"{part}/{name}": tensor.detach().clone() for part, module in models.pipeline.components.items()
                if isinstance(module, torch.nn.Module) for name, tensor in module.named_parameters()}

    def watched(run, *rest):
        models, groups = run.models, run.groups
        names = {id(parameter): f"{part}/{name}" for part, module in models.pipeline.components.items()
                 if isinstance(module, torch.nn.Module) for name, parameter in module.named_parameters()}
        seen["groups"] = {group.name: {names[id(parameter)] for parameter in group.parameters} for group in groups}
        seen["before"] = weights(models)
        optimize(run, *rest)
        seen["after"] = weights(models)

    monkeypatch.setattr(db, "optimize", watched)
    return seen


def first_new_row(family):
    return 397  # the bundled tokenizer's size, which the tiny models share


@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet+text"])
@pytest.mark.parametrize("method", ["lora", "textual_inversion", "pivotal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_named_weights_change(family, method, text, train, trained):
    if text and method == "textual_inversion":
        pytest.skip("refused, see test_flags_of_other_methods_are_refused")
    train(family, method, *["--train_text_encoder", "--text_encoder_lr", "1e-2"] if text else [])
    before, after, groups = trained["before"], trained["after"], trained["groups"]
    encoders = ["text_encoder", "text_encoder_2"] if family == "sdxl" else ["text_encoder"]
    words, loras = groups.pop("new_words", set()), set().union(*groups.values())
    assert bool(words) == (method != "lora") and bool(loras) == (method != "textual_inversion")
    if loras:
        assert {name.split("/")[0] for name in loras} == {"unet", *(encoders if text else [])}
        assert all("lora_" in name and (".attn" in name or ".self_attn." in name) for name in loras)
        assert all(not torch.equal(before[name], after[name]) for name in loras)
    assert {name.split("/")[0] for name in words} == (set(encoders) if words else set())

    tables = {name for name in before if words and "token_embedding" in name and "new_rows" not in name}
    for name in before.keys() - loras - words - tables:
        assert torch.equal(before[name], after[name]), name
    for name in tables:
        old, new = before[name], after[name]
        assert torch.equal(old[:397], new[:397]) and len(new) == 398 and not torch.equal(old[397:], new[397:])
    if text and family == "sdxl":  # its first encoder is read before the last of three layers
        assert not any("text_encoder/" in name and "layers.2." in name for name in loras)


def plain_pipeline(model, folder, family, record):
    """Plain diffusers, as in the README: no code of ours."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model)
    embeds = folder / "learned_embeds.safetensors"
    if embeds.exists():
        word = record["subjects"][0]["identifier"]
        if family == "sdxl":
            vectors = load_file(embeds)
            pipe.load_textual_inversion(vectors["clip_l"], token=word, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
            pipe.load_textual_inversion(vectors["clip_g"], token=word, text_encoder=pipe.text_encoder_2,
                                        tokenizer=pipe.tokenizer_2)
        else:
            pipe.load_textual_inversion(embeds)
    if (folder / "pytorch_lora_weights.safetensors").exists():
        pipe.load_lora_weights(folder)
    return pipe


VARIANTS = [("lora", []), ("lora", ["--train_text_encoder", "--lora_alpha", "5", "--rank", "2"]),
            ("lora", ["--use_dora", "--lora_target", "all", "--lora_alpha", "7"]), ("lora", ["--lora_target", "attention+ff"]),
            ("textual_inversion", ["--num_vectors", "3"]), ("pivotal", ["--train_text_encoder", "--lora_alpha", "3"])]


@pytest.mark.parametrize("method, flags", VARIANTS, ids=[" ".join([m, *f]) for m, f in VARIANTS])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_diffusers_draws_the_same_picture(family, method, flags, train, run, tiny_model, tmp_path):
    train(family, method, *flags)
    prompt = "a [identifier] dog on the moon"
    status, out, err = run("--infer", "--prompt", prompt, "--num_images", 1, "--num_inference_steps", 3, "--guidance_scale", 5)
    assert status == 0 and method in out, err
    record = json.loads((tmp_path / "output" / "dreambooth.json").read_text())
    assert record["method"] == method and not (tmp_path / "output" / "unet").exists()
    written = prompt.replace("[identifier]", record["subjects"][0]["identifier"])
    ours = Image.open(next((tmp_path / "images").glob("a-*-0.png")))
    assert ours.info["parameters"].startswith(written)

    pipe = plain_pipeline(tiny_model(family), tmp_path / "output", family, record)
    draw = dict(num_inference_steps=3, guidance_scale=5.0)
    expected = pipe(written, generator=torch.Generator().manual_seed(0), **draw).images[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    untrained = plain_pipeline(tiny_model(family), tmp_path, family, record)
    other = untrained("a dog dog on the moon", generator=torch.Generator().manual_seed(0), **draw).images[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(other).astype(int)).max() > 1


@pytest.mark.parametrize("flags", [["--use_dora", "--lora_target", "all", "--lora_alpha", "5"], ["--lora_target", "all"]],
                         ids=" ".join)
def test_the_kohya_file_makes_the_same_weights(flags, train, tiny_model, tmp_path):
    """Merged as ComfyUI merges it, scale * up @ down and then DoRA's norm per output, it is what diffusers fuses."""
    from diffusers import StableDiffusionPipeline

    train("sd1", "lora", *flags)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model("sd1"))
    unet = pipe.unet
    names = {f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": name for name in unet.state_dict()}
    expected = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    kohya = load_file(tmp_path / "output" / db.KOHYA_FILE)
    layers = {name.split(".")[0] for name in kohya}
    for layer in layers:
        weight, up, down = expected[names[layer]], kohya[f"{layer}.lora_up.weight"], kohya[f"{layer}.lora_down.weight"]
        scale = kohya[f"{layer}.alpha"] / len(down)
        new = weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        if f"{layer}.dora_scale" in kohya:
            norm = new.flatten(1).norm(dim=1).reshape(-1, *[1] * (new.dim() - 1))
            assert kohya[f"{layer}.dora_scale"].shape == norm.shape
            new = new * kohya[f"{layer}.dora_scale"] / norm
        expected[names[layer]] = new
    pipe.load_lora_weights(tmp_path / "output")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = unet.state_dict()
    assert len(layers) > 20 and fused.keys() == expected.keys()
    for name in fused:
        torch.testing.assert_close(fused[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flags", [["--lora_alpha", "5", "--rank", "2"], ["--lora_target", "all"]], ids=" ".join)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_kohya_file_is_the_same_lora(family, flags, train, tiny_model, tmp_path):
    """Loaded by diffusers, which converts Kohya's names, it gives the same UNet output as its own file."""
    from diffusers import DiffusionPipeline

    train(family, "lora", "--train_text_encoder", *flags)
    names = load_file(tmp_path / "output" / db.KOHYA_FILE)
    parts = {name.split("_down_blocks")[0].split("_text_model")[0] for name in names if "down_blocks" in name or "text_model" in name}
    assert parts == ({"lora_unet", "lora_te1", "lora_te2"} if family == "sdxl" else {"lora_unet", "lora_te"})
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in names
    alpha = float(flags[1]) if flags[0] == "--lora_alpha" else 16.0
    assert {tensor.item() for name, tensor in names.items() if name.endswith(".alpha")} == {alpha}

    pictures = []
    for file in (db.LORA_FILE, db.KOHYA_FILE):
        pipe = DiffusionPipeline.from_pretrained(tiny_model(family))
        pipe.load_lora_weights(tmp_path / "output", weight_name=file)
        pictures.append(pipe("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images)
    np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-4)


def test_words_start_as_the_class_noun(tiny_model, photos):
    models = db.load_models(str(tiny_model("sdxl")), torch.float32)
    s = db.Settings("train", method="textual_inversion", num_vectors=2)
    group = db.new_words(s, models, [db.Subject("<rex>", "a teddy bear", "")], db.Recipe(1, embedding_lr=1.0))
    for tokenizer, text_encoder, rows in zip(models.tokenizers, models.text_encoders, group.parameters):
        table = text_encoder.get_input_embeddings().weight
        teddy, bear = (table[tokenizer(word, add_special_tokens=False).input_ids[0]] for word in ("teddy", "bear"))
        assert torch.equal(rows, torch.stack([teddy, bear])) and rows.requires_grad and not table.requires_grad
        assert tokenizer.tokenize("a <rex> <rex>_1") == ["a</w>", "<rex>", "<rex>_1"]


def test_words_of_pivotal_tuning_start_as_different_rare_words(tiny_model, capsys):
    subjects = [db.Subject("<rex>", "a dog", ""), db.Subject("<tom>", "a cat", "")]
    recipe = db.Recipe(1, embedding_lr=1.0)

    def started(**options):
        db.say_once.cache_clear()
        models = db.load_models(str(tiny_model("sd1")), torch.float32)
        rows, = db.pivotal_words(db.Settings("train", method="pivotal", **options), models, subjects, recipe).parameters
        said = re.findall(r'New word "<\w+>" starts as "(\w+)"', capsys.readouterr().out)
        ids = [models.tokenizers[0](word, add_special_tokens=False).input_ids for word in said]
        table = models.text_encoders[0].get_input_embeddings().weight
        assert len(ids) == 2 and torch.equal(rows, table[sum(ids, [])])
        return said
    words = {tuple(started(seed=seed)) for seed in range(4)}
    assert len(words) > 1 and all(a != b and {a, b} <= set(db.RARE_WORDS.split()) for a, b in words)
    assert started(initializer_token="dog") == ["dog", "dog"]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_vector_is_looked_up_wherever_its_word_stands(family, tiny_model):
    """The conditioning with trained vectors equals that of a vocabulary whose table holds the same vectors."""
    models = db.load_models(str(tiny_model(family)), torch.float32)
    s = db.Settings("train", method="textual_inversion", num_vectors=2)
    group = db.new_words(s, models, [db.Subject("<rex>", "a dog", "")], db.Recipe(1, embedding_lr=1.0))
    prompts = ["a <rex> dog and <rex> on the moon", "a dog"]
    with torch.no_grad():
        initial, _ = db.encode_prompts(models, prompts)
        for rows in group.parameters:
            rows += torch.randn_like(rows)
        trained, pooled = db.encode_prompts(models, prompts)
    group.finish()
    with torch.no_grad():
        finished, pooled_after = db.encode_prompts(models, prompts)
    assert torch.equal(trained, finished) and (pooled is None or torch.equal(pooled, pooled_after))
    assert torch.equal(initial[1], trained[1]) and not torch.equal(initial[0], trained[0])


def test_the_end_of_text_is_found_behind_a_new_word(tiny_model):
    """Configs of SD 1.5 and SDXL name token 2; then the highest token of a prompt passes for its end."""
    model = tiny_model("sdxl")
    pooled = {}
    for eos in (2, None):
        config = model / "text_encoder_2" / "config.json"
        original = config.read_text()
        if eos:
            config.write_text(json.dumps(json.loads(original) | {"eos_token_id": eos}))
        try:
            models = db.load_models(str(model), torch.float32)
        finally:
            config.write_text(original)
        for tokenizer, text_encoder in zip(models.tokenizers, models.text_encoders):
            db.add_word(tokenizer, text_encoder, "<rex>", torch.ones(1, 32))
        with torch.no_grad():
            pooled[eos] = db.encode_prompts(models, ["a <rex> dog", "a <rex> dog on the moon"])[1]
    assert torch.equal(pooled[2], pooled[None])
    assert not torch.allclose(pooled[2][0], pooled[2][1], atol=1e-3)  # what follows the new word counts


def test_words_rest_after_their_part_of_a_pivotal_run(train, monkeypatch):
    rows, step = [], torch.optim.lr_scheduler.LambdaLR.step

    def watched(schedule, *args):
        rows.append(schedule.optimizer.param_groups[0]["params"][0].detach().clone())
        return step(schedule, *args)

    monkeypatch.setattr(torch.optim.lr_scheduler.LambdaLR, "step", watched)
    out = train("sd1", "pivotal", "--steps", 8, "--embedding_frac", "0.5")
    assert "new_words, 32 weights, learning rate 0.1, 4 steps" in out
    rows = rows[-8:]
    assert all(not torch.equal(rows[i], rows[i + 1]) for i in range(3))
    assert all(torch.equal(rows[3], later) for later in rows[4:])


def test_the_base_is_not_forgotten_by_its_adapter(train, run, tiny_model, tmp_path):
    """lora_scale 0 is the base model; other scales lie apart; several adapters add up."""
    train("sd1", "lora")
    train("sd1", "pivotal", "--output_dir", "style", "--identifier", "<paint>")
    draw = ["--num_images", 1, "--num_inference_steps", 2, "--guidance_scale", 4, "--prompt", "a dog"]
    pictures = {}
    for name, flags in {"base": ["--model_path", tiny_model("sd1")], "off": ["--lora_scale", 0], "half": ["--lora_scale", 0.5],
                        "whole": [], "both": ["--adapter", "style"], "little": ["--adapter", "style=0.0"],
                        "file": ["--model_path", tmp_path / "output" / db.LORA_FILE, "--model_name", tiny_model("sd1")],
                        "kohya": ["--model_path", tiny_model("sd1"), "--adapter", tmp_path / "output" / db.KOHYA_FILE]}.items():
        status, out, err = run("--infer", *draw, *flags, "--image_dir", name)
        assert status == 0, (name, err)
        pictures[name] = np.asarray(Image.open(tmp_path / name / "a-dog-0.png")).astype(int)

    def same(a, b):
        return np.abs(pictures[a] - pictures[b]).max() <= 1
    assert same("base", "off") and same("whole", "little") and same("whole", "file") and same("whole", "kohya")
    assert not any(same(a, b) for a, b in [("whole", "off"), ("half", "whole"), ("half", "off"), ("both", "whole")])
    status, _, err = run("--infer", *draw[:-1], "a [identifier:dog] dog [identifier:learned_embeds]", "--adapter", "style/learned_embeds.safetensors")
    assert status == 0, err


def test_a_moved_base_model_is_named(train, run, tiny_model, tmp_path):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_model("sd1"), base)
    assert run("--train", "--model_name", base, "--instance_data_dir", tmp_path / "photos", *QUICK, "--method", "lora")[0] == 0
    base.rename(tmp_path / "elsewhere")
    status, _, err = run("--infer", "--num_images", 1)
    assert status == 2 and str(base) in err and "--model_name" in err and err.count("\n") == 1
    assert run("--infer", "--num_images", 1, "--num_inference_steps", 1, "--model_name", tmp_path / "elsewhere")[0] == 0


def test_an_adapter_of_another_family_is_refused(train, run, tiny_model, tmp_path):
    for method in ("lora", "textual_inversion"):
        train("sdxl", method)
        status, _, err = run("--infer", "--num_images", 1, "--model_name", tiny_model("sd1"), "--prompt", "a dog")
        assert status == 2 and err.count("\n") == 1 and "fit" in err, err


def test_a_word_of_the_vocabulary_is_no_new_word(run, tiny_model, photos):
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, *QUICK,
                         "--method", "textual_inversion", "--identifier", "dog")
    assert status == 2 and '"dog" is in this model' in err and err.count("\n") == 1


def test_adapters_train_in_bf16_beside_a_bf16_base(train, run, tmp_path):
    for method in FLAGS:
        train("sdxl", method, "--mixed_precision", "bf16")
        tensors = [t for file in (tmp_path / "output").glob("*.safetensors") for t in load_file(file).values()]
        assert tensors and all(t.dtype == torch.float32 for t in tensors)
        assert any(not torch.equal(t, t.bfloat16().float()) for t in tensors)
        assert run("--infer", "--num_images", 1, "--num_inference_steps", 1, "--mixed_precision", "bf16")[0] == 0


@pytest.mark.parametrize("method", ["lora", "textual_inversion", "pivotal"])
def test_options_of_the_loop_work_with_every_method(method, train, tmp_path):
    """Checkpointed activations change nothing; min-SNR weights do; a run repeats itself."""
    text = [] if method == "textual_inversion" else ["--train_text_encoder"]
    results = {}
    for name, flags in {"plain": [], "again": [], "checkpointed": ["--gradient_checkpointing"], "snr": ["--snr_gamma", "5"],
                        "prior": ["--with_prior_preservation"],
                        "strong prior": ["--with_prior_preservation", "--prior_loss_weight", "3"]}.items():
        out = train("sdxl", method, "--output_dir", name, *text, *flags)
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

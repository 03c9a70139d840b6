"""Every family through the program: trained, drawn with, resumed; and what each refuses."""

import functools
import json
import shutil

import pytest
import torch
from conftest import picture
from PIL import Image
from safetensors.torch import load_file
from tiny_families import RARE, TINY
from training_runs import assert_same_weights, far_apart, interrupt

import dreambooth_implementation as db

FLAGS = ["--class_prompt", "a dog", "--num_class_images", 1, "--identifier", "zwx", "--num_inference_steps", 2, "--resolution", 32,
         "--validation_prompt", "a dog"]
ALONE = ["--no-with_prior_preservation"]


@pytest.fixture
def teach(run, tiny_model, tmp_path):
    """teach(family, *flags) -> what `run` returns of three steps on one photo."""
    (tmp_path / "photo").mkdir()
    picture(3, (32, 32)).save(tmp_path / "photo" / "0.png")

    def call(family, *flags, rate=("--learning_rate", "5e-2")):
        return run("--train", "--model_name", tiny_model(family), "--instance_data_dir", "photo", *FLAGS, "--steps", 3, *rate, *flags)

    return call


def drawn_by_diffusers(pipeline, guided, prompt="a zwx dog"):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt=[prompt], num_inference_steps=2, height=32, width=32, generator=[torch.Generator().manual_seed(5)],
                    **guided).images[0]


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_plain_diffusers_draws_what_was_trained_as_the_program_does(family, method, teach, run, tiny_model, tmp_path):
    from diffusers import DiffusionPipeline

    status, out, err = teach(family, "--method", method, *(["--lora_target", "all"] if method == "lora" else ALONE))
    assert status == 0, err
    status, out, err = run("--infer", "--model_path", "output", "--prompt", "a zwx dog", "--num_images", 1, "--seed", 5,
                           "--num_inference_steps", 2, "--image_dir", "drawn", "--mixed_precision", "no")
    assert status == 0, err
    by_program = Image.open(next(path for path in (tmp_path / "drawn").glob("*.png") if not path.name.startswith("grid")))

    absent = {"text_encoder_3": None, "tokenizer_3": None} if "without-t5" in family else {}  # diffusers wants that to be said
    pipeline = DiffusionPipeline.from_pretrained("output" if method == "full" else tiny_model(family), **absent)
    known = db.family_of(pipeline)
    guided = known.call_options(known.guidance, [known.usual_negative] if known.usual_negative else None)
    before = drawn_by_diffusers(DiffusionPipeline.from_pretrained(tiny_model(family), **absent), guided)
    if method == "lora":
        pipeline.load_lora_weights("output")
    drawn = drawn_by_diffusers(pipeline, guided)
    assert far_apart(drawn, by_program) <= 2 < far_apart(drawn, before)


@pytest.mark.parametrize("family, layer", [("flux", "lora_unet_double_blocks_1_img_attn_qkv"),
                                           ("z-image", "diffusion_model.layers.1.attention.to_q")])
def test_a_lora_is_written_for_comfyui(family, layer, teach, run, tmp_path):
    flags = ["--rank", 2, "--lora_alpha", 3, "--no-samples", "--export", "dog.safetensors", *ALONE]
    status, _, err = teach(family, "--method", "lora", *flags)
    assert status == 0, err
    assert (tmp_path / "dog.safetensors").read_bytes() == (tmp_path / "output" / db.KOHYA_FILE).read_bytes()
    weights = load_file("dog.safetensors")
    rank = len(weights[f"{layer}.lora_down.weight"])
    assert weights[f"{layer}.alpha"] / rank == 3 / 2 and rank == (6 if family == "flux" else 2)
    assert "ComfyUI: kohya_lora.safetensors is theirs" in (tmp_path / "output" / "README.md").read_text(encoding="utf-8")


def test_a_dora_of_a_transformer_has_no_file_for_other_programs_and_says_so(teach, run, tmp_path):
    status, _, err = teach("qwen-image", "--method", "lora", "--rank", 2, "--use_dora", "--no-samples", *ALONE)
    assert status == 0, err
    assert not (tmp_path / "output" / db.KOHYA_FILE).exists()
    assert "a DoRA of Qwen-Image is not written for them" in (tmp_path / "output" / "README.md").read_text(encoding="utf-8")
    status, _, err = run("--export", "dog.safetensors", "--model_path", "output")
    assert status == 2 and "of a DoRA of a transformer none is written" in err and err.count("\n") == 1


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_family_trains_in_bf16_by_a_memory_plan(family, method, teach):
    status, out, err = teach(family, "--method", method, "--mixed_precision", "bf16", "--max_vram", 1, *ALONE)
    assert status == 0, err
    assert "Memory plan: " in out and "cannot be told beforehand" not in out


@pytest.mark.parametrize("family", TINY)
def test_a_family_interrupted_and_resumed_is_as_if_it_were_not(family, teach, monkeypatch, tmp_path):
    flags = ["--method", "lora", "--checkpointing_steps", 2, *ALONE]
    assert teach(family, *flags, "--output_dir", "whole")[0] == 0
    undo = interrupt(monkeypatch, 2)
    assert teach(family, *flags, "--resume")[0] == 130
    undo()
    status, out, err = teach(family, *flags, "--resume")
    assert status == 0 and "after step 2" in out, err
    assert_same_weights(tmp_path / "output", tmp_path / "whole")


# ---- what is refused, in one line


def changed(folder, source, file, **values):
    """A copy of a model without its weights' being asked for, with other `values` in a config."""
    shutil.copytree(source, folder)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | values))
    return folder


@pytest.mark.parametrize("family, file, values, said", [
    ("flux2-klein", "model_index.json", {"is_distilled": True}, "train black-forest-labs/FLUX.2-klein-base-4B"),
    ("flux", "transformer/config.json", {"guidance_embeds": False}, "train black-forest-labs/FLUX.1-dev"),
    ("flux2-klein", "transformer/config.json", {"joint_attention_dim": 96}, "attends to 96 text channels"),
    ("flux2", "transformer/config.json", {"in_channels": 64}, "takes 64 channels, its VAE makes 4 x 4"),
    ("flux", "transformer/config.json", {"pooled_projection_dim": 32}, "takes 32 channels of text_encoder, which makes 24"),
    ("flux", "transformer/config.json", {"in_channels": 384}, "takes 384 channels"),
    ("qwen-image", "transformer/config.json", {"in_channels": 64}, "takes 64 channels, its VAE makes 4 x 4"),
    ("qwen-image", "transformer/config.json", {"joint_attention_dim": 3584}, "attends to 3584 text channels, but its text encoder makes 32"),
    ("qwen-image", "transformer/config.json", {"use_additional_t_cond": True}, "give Qwen/Qwen-Image"),
    ("sd3", "transformer/config.json", {"in_channels": 16}, "takes 16 channels, its VAE makes 4"),
    ("sd3", "transformer/config.json", {"pooled_projection_dim": 2048}, "2048 numbers of a whole prompt, but its text encoders make 16 + 16"),
    ("sd3", "transformer/config.json", {"joint_attention_dim": 4096}, "attends to 4096 text channels, but its T5 makes 64"),
])
def test_a_model_that_cannot_be_trained_is_refused_by_its_configs(family, file, values, said, teach, tiny_model, tmp_path, monkeypatch):
    folder = changed(tmp_path / "model", tiny_model(family), file, **values)
    monkeypatch.setattr(db, "load_models", None)  # nothing is read
    status, _, err = teach(family, "--model_name", folder)
    assert status == 2 and said in err and len(err.splitlines()) == 1, err


def test_what_the_processor_of_pictures_needs_is_said(teach, tiny_model, tmp_path, monkeypatch):
    folder = changed(tmp_path / "model", tiny_model("flux2"), "model_index.json", tokenizer=["transformers", "PixtralProcessor"])
    monkeypatch.setattr(db.importlib.util, "find_spec", lambda name, package=None: None)
    monkeypatch.setattr(db, "load_models", None)
    status, _, err = teach("flux2", "--model_name", folder)
    assert status == 2 and "pip install torchvision" in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("name", ["Z-Image-Turbo", "flux.1-schnell", "klein-4B-distilled", "Qwen-Image-Lightning-8steps",
                                  "stable-diffusion-3.5-large-turbo"])
def test_a_name_of_a_distilled_model_is_refused(name, teach, tiny_model, tmp_path):
    shutil.copytree(tiny_model("flux"), tmp_path / name)
    status, _, err = teach("flux", "--model_name", tmp_path / name)
    assert status == 2 and f"{name}: it was distilled for few steps" in err and len(err.splitlines()) == 1


def test_a_distilled_model_still_draws(run, tiny_model, tmp_path):
    folder = changed(tmp_path / "model", tiny_model("flux2-klein"), "model_index.json", is_distilled=True)
    status, _, err = run("--infer", "--model_path", folder, "--prompt", "a dog", "--num_images", 1, "--num_inference_steps", 1)
    assert status == 0, err


@pytest.mark.parametrize("family, flags, said", [
    ("flux2-klein", ["--method", "textual_inversion"], "--method textual_inversion: not to be had for FLUX.2 klein"),
    ("z-image", ["--method", "pivotal"], "--method pivotal: not to be had for Z-Image"),
    ("flux", ["--method", "full", "--export", "x.safetensors"], "--export: a whole model of FLUX.1 dev is not written for"),
    ("z-image", ["--method", "lora", "--use_dora", "--export", "x.safetensors"], "--export: a DoRA of Z-Image is not written for"),
    ("qwen-image", ["--train_text_encoder"], "--train_text_encoder: the text encoder of Qwen-Image does not train"),
    ("flux2", ["--snr_gamma", "5"], "--snr_gamma 5: for models that learnt diffusion"),
    ("sd3", ["--channels_last"], "--channels_last: convolutions have such a layout, and the transformer of Stable Diffusion 3"),
    ("qwen-image", ["--method", "textual_inversion"], "--method textual_inversion: not to be had for Qwen-Image"),
    ("sd3", ["--method", "pivotal", "--num_vectors", "2"], "--num_vectors 2: Stable Diffusion 3's pipeline reads a new word as one"),
])
def test_a_flag_without_meaning_is_refused(family, flags, said, teach):
    status, _, err = teach(family, *flags)
    assert status == 2 and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("family", ["flux2-klein", "flux2", "flux"])
def test_a_negative_prompt_is_refused_where_a_pipeline_takes_none(family, run, tiny_model):
    status, _, err = run("--infer", "--model_path", tiny_model(family), "--prompt", "a dog", "--negative_prompt", "rain")
    assert status == 2 and "--negative_prompt: FLUX" in err and len(err.splitlines()) == 1


def test_a_lora_of_another_width_is_refused(tiny_model):
    pipeline = db.load_pipeline(str(tiny_model("flux")), torch.float32)
    name = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    misfit = db.family_of(pipeline).lora_misfit
    assert "takes 3072 channels, that layer here 32" in misfit(pipeline, {name: (16, 3072)})
    assert misfit(pipeline, {name: (16, 32)}) == ""
    assert "with a UNet" in misfit(pipeline, {"unet.down_blocks.0.attn.lora_A.weight": (4, 320)})


# ---- what is special


@pytest.mark.parametrize("family", TINY)
def test_a_rare_word_is_found_in_every_kind_of_vocabulary(family, tiny_model):
    models = db.load_models(str(tiny_model(family)), torch.float32)
    concept = db.Concept("photos", "classes", 1, class_prompt="a dog", instance_prompt="a [identifier] dog")
    found = db.choose_identifiers(models, [concept], 0, functools.partial(db.embed_ends, models))
    assert found[0] in RARE


@pytest.mark.parametrize("family, layers", [("flux2-klein", (9, 18, 27)), ("flux2", (10, 20, 30))])
def test_three_layers_of_the_text_encoder_are_joined(family, layers, tiny_model):
    models = db.load_models(str(tiny_model(family)), torch.float32)
    language = getattr(models.text_encoders[0].model, "language_model", models.text_encoders[0].model)
    seen = {}
    for number in layers:  # the output of the layer before is what hidden_states counts as this number
        language.layers[number - 1].register_forward_hook(
            lambda module, args, output, number=number: seen.__setitem__(number, output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        hidden = models.family.encode(models, ["a dog"])["hidden"]
    assert hidden.shape == (1, 512, 3 * 16)
    torch.testing.assert_close(hidden, torch.cat([seen[number] for number in layers], -1))


@pytest.mark.parametrize("family", ["flux2-klein", "flux2"])
def test_a_prompt_is_summed_up_where_it_ends(family, tiny_model):
    """Not by what fills it up, which stands behind it or before it."""
    models = db.load_models(str(tiny_model(family)), torch.float32)
    with torch.no_grad():
        hidden, sums = models.family.encode(models, ["a dog"])["hidden"], models.family.summaries(models, ["a dog"])
    length, limit = models.family.prompt_length(models.pipeline, "a dog")
    assert 2 < length < limit == 512
    torch.testing.assert_close(sums, hidden[:, length - 1 if family == "flux2-klein" else -1])


def test_the_tokenizer_within_a_processor_is_the_one_asked():
    class Pipeline:
        class processor:
            tokenizer = "words"
        components = {"tokenizer": processor, "tokenizer_2": "its own"}
    assert db.tokenizer_of(Pipeline, "text_encoder") == "words" and db.tokenizer_of(Pipeline, "text_encoder_2") == "its own"


@pytest.mark.parametrize("tokens, steps, mu", [(16, 12, 1.8845), (4096, 30, 2.1398), (4400, 50, 1.2014)])
def test_the_shift_of_flux2_follows_tokens(tokens, steps, mu, tiny_model, monkeypatch):
    """Values by the formula in FLUX.2's own sampling code."""
    pipeline = db.load_pipeline(str(tiny_model("flux2-klein")), torch.float32)
    family = db.family_of(pipeline)
    monkeypatch.setattr(type(family), "usual_steps", steps)
    monkeypatch.setattr(type(family), "tokens", lambda self, pipeline, side: tokens)
    assert family.usual_shift(pipeline, 32) == pytest.approx(torch.tensor(mu).exp().item(), rel=1e-3)


def test_qwen_reads_a_prompt_in_its_template(tiny_model):
    """Whose first 34 tokens it drops again."""
    models = db.load_models(str(tiny_model("qwen-image")), torch.float32)
    seen, forward = [], models.text_encoders[0].forward

    def recorded(*args, **options):
        seen.append((options["input_ids"], forward(*args, **options)))
        return seen[-1][1]
    models.text_encoders[0].forward = recorded
    with torch.no_grad():
        hidden = models.family.encode(models, ["a zwx dog"])["hidden"]
    (ids, out), = seen
    text = models.tokenizers[0].decode(ids[0])
    assert text.startswith("<|im_start|>system\nDescribe the image by detailing the color")
    assert text.endswith("<|im_end|>\n<|im_start|>user\na zwx dog<|im_end|>\n<|im_start|>assistant\n")
    torch.testing.assert_close(hidden[0], out.hidden_states[-1][0, 34:])


def test_qwen_predicts_of_prompts_together_as_of_each_alone(tiny_model):
    """The shorter one is filled up, and the mask says so."""
    models = db.load_models(str(tiny_model("qwen-image")), torch.float32)
    with torch.no_grad():
        told = models.family.encode(models, ["a dog on the moon", "a cat"])
        assert len({len(row) for row in told["hidden"]}) == 2
        noisy, levels, sizes = torch.randn(2, *models.family.latent_shape(models.pipeline, 32)), torch.tensor([0.3, 0.8]), torch.zeros(2, 6)
        together = models.family.predict(models, noisy, levels, told, sizes)
        alone = [models.family.predict(models, noisy[i:i + 1], levels[i:i + 1], db.rows_of(told, torch.tensor([i]), torch.device("cpu")),
                                       sizes[:1]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale, negative, passes", [(4, "", 4), (4, "rain", 4), (1, "rain", 2)])
def test_qwen_is_guided_away_from_something_always(scale, negative, passes, tiny_model, monkeypatch):
    pipeline = db.load_pipeline(str(tiny_model("qwen-image")), torch.float32)
    calls, forward = [], pipeline.transformer.forward
    monkeypatch.setattr(pipeline.transformer, "forward", lambda *args, **options: calls.append(1) or forward(*args, **options))
    list(db.draw(pipeline, [("a dog", 0), ("a cat", 1)], steps=2, guidance_scale=scale, height=32, width=32, batch_size=2,
                 negative_prompt=negative))
    assert len(calls) == passes


def test_stable_diffusion_3_knows_places_up_to_a_size(tiny_model):
    pipeline = db.load_pipeline(str(tiny_model("sd3")), torch.float32)
    db.family_of(pipeline).check_side(pipeline, 128, "--resolution")
    with pytest.raises(db.UserError, match="knows places in pictures of up to 128 px"):
        db.family_of(pipeline).check_side(pipeline, 132, "--resolution")


@pytest.mark.parametrize("family", ["sd3", "sd3.5-without-t5"])
@pytest.mark.parametrize("method", ["textual_inversion", "pivotal"])
def test_both_clips_of_stable_diffusion_3_learn_a_new_word(family, method, teach, run, tmp_path):
    status, out, err = teach(family, "--method", method, "--identifier", "<rex>", "--mixed_precision", "bf16",
                             "--max_vram", 1, *ALONE, rate=("--embedding_lr", "1e-1"))
    assert status == 0 and "cannot be told beforehand" not in out, err
    learnt = load_file(tmp_path / "output" / "learned_embeds.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in learnt.items()} == {"clip_l": (1, 32), "clip_g": (1, 24)}
    status, out, err = run("--infer", "--model_path", "output", "--prompt", "a <rex> on the moon", "--num_images", 1,
                           "--num_inference_steps", 1)
    assert status == 0, err


@pytest.mark.parametrize("method", ["textual_inversion", "pivotal"])
def test_the_clip_of_flux_learns_a_new_word_and_its_t5_spells_it(method, teach, run, tiny_model, tmp_path):
    from diffusers import FluxPipeline

    status, out, err = teach("flux", "--method", method, "--identifier", "<rex>", "--num_vectors", 2, *ALONE, rate=("--embedding_lr", "1"))
    assert status == 0, err
    (learnt,) = load_file(tmp_path / "output" / "learned_embeds.safetensors").values()
    assert tuple(learnt.shape) == (2, 24)
    status, out, err = run("--infer", "--model_path", "output", "--prompt", "a <rex>", "--num_images", 1, "--seed", 5,
                           "--num_inference_steps", 2, "--image_dir", "drawn", "--mixed_precision", "no")
    assert status == 0, err
    by_program = Image.open(next(path for path in (tmp_path / "drawn").glob("*.png") if not path.name.startswith("grid")))
    pipeline = FluxPipeline.from_pretrained(tiny_model("flux"))
    before = drawn_by_diffusers(pipeline, {"guidance_scale": 3.5}, "a <rex>")
    pipeline.load_textual_inversion("output/learned_embeds.safetensors")
    if method == "pivotal":
        pipeline.load_lora_weights("output", weight_name="pytorch_lora_weights.safetensors")
    assert far_apart(drawn_by_diffusers(pipeline, {"guidance_scale": 3.5}, "a <rex>"), by_program) <= 2 < far_apart(before, by_program)


def test_the_clip_of_flux_trains_and_its_t5_does_not(teach, run, tmp_path):
    status, out, err = teach("flux", "--method", "lora", "--train_text_encoder", "--max_vram", 1, "--mixed_precision", "bf16", *ALONE)
    assert status == 0 and "cannot be told beforehand" not in out, err
    weights = load_file(tmp_path / "output" / "pytorch_lora_weights.safetensors")
    assert {name.split(".")[0] for name in weights} == {"transformer", "text_encoder"}
    elsewhere = load_file(tmp_path / "output" / db.KOHYA_FILE)
    assert any(name.startswith("lora_te1_text_model_encoder_layers_0_") for name in elsewhere)
    status, out, err = run("--infer", "--model_path", "output", "--prompt", "a dog", "--num_images", 1, "--num_inference_steps", 1)
    assert status == 0, err


@pytest.mark.parametrize("method, family", [("lora", "sd3"), ("full", "sd3.5-without-t5"), ("pivotal", "sd3")])
def test_both_clips_of_stable_diffusion_3_train_and_t5_does_not(method, family, teach, tiny_model, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    status, out, err = teach(family, "--method", method, "--identifier", "<rex>", "--train_text_encoder", "--text_encoder_lr", "1e-3",
                             "--max_vram", 1, "--mixed_precision", "bf16", *ALONE)
    assert status == 0 and "cannot be told beforehand" not in out, err
    if method == "full":
        before, after = (load_file(folder / "text_encoder_2" / "model.safetensors") for folder in (tiny_model(family), tmp_path / "output"))
        assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) // 2
        return
    parts = {name.split(".")[0] for name in load_file(tmp_path / "output" / "pytorch_lora_weights.safetensors")}
    assert parts == {"transformer", "text_encoder", "text_encoder_2"}
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_model(family))
    pipeline.load_lora_weights(tmp_path / "output", weight_name="pytorch_lora_weights.safetensors")
    assert all(pipeline.components[part].peft_config for part in parts)


def test_a_lora_that_peft_saved_of_a_transformer_has_diffusers_names():
    name = "transformer_blocks.0.attn.to_q.lora_A"
    assert db.peft_name(f"base_model.model.{name}.default.weight") == f"transformer.{name}.weight"
    assert db.peft_name(f"base_model.model.single_{name}.weight") == f"transformer.single_{name}.weight"
    assert db.peft_name(f"base_model.model.down_blocks.0.{name}.weight") == f"unet.down_blocks.0.{name}.weight"


def test_what_the_untouched_transformer_begins_is_read_with_all_else(teach, run, monkeypatch, tmp_path):
    status, out, err = teach("z-image", "--method", "lora", "--no-samples", *ALONE)
    assert status == 0, err
    read, parts = db.Shelf.read, []
    monkeypatch.setattr(db.Shelf, "read", lambda shelf, part, *given, **named: parts.append(part) or read(shelf, part, *given, **named))

    def drawn(model, prompt, *flags):
        status, out, err = run("--infer", "--model_path", model, "--prompt", prompt, "--num_images", 1, "--num_inference_steps", 1,
                               "--height", 32, "--width", 32, "--image_dir", "drawn", *flags)
        assert status == 0, err
        return Image.open(max((tmp_path / "drawn").glob("a-*.png"), key=lambda path: path.stat().st_mtime_ns)).tobytes()
    model = json.loads((tmp_path / "output" / "dreambooth.json").read_text())["base_model"]
    assert drawn("output", "a zwx dog", "--subject_start", 1) == drawn(model, "a dog") != drawn("output", "a zwx dog")
    assert parts == 3 * ["text_encoder", "transformer"]

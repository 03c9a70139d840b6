"""Command lines of diffusers' training scripts: what becomes of each flag, and of the commands in their READMEs."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, picture
from training_runs import usual_noise

import dreambooth_implementation as db

LIST = json.loads((REPOSITORY / "tests" / "diffusers_flags.json").read_text(encoding="utf-8"))
HERE, SCRIPTS = LIST["here"], LIST["scripts"]
KINDS = {flag: kind for flags in SCRIPTS.values() for flag, kind in flags.items()}
SAMPLES = {  # what a flag is given, if the value of its kind below will not do
    "lr_scheduler": "polynomial", "mixed_precision": "bf16", "optimizer": "prodigy", "prior_generation_precision": "fp32",
    "resolution": "64", "learnable_property": "object", "image_interpolation_mode": "lanczos", "tokenizer_max_length": "77",
    "pretrained_vae_model_name_or_path": "madebyollin/sdxl-vae-fp16-fix", "hub_token": "hf_secret", "weighting_scheme": "logit_normal",
    "logit_mean": "0.0", "logit_std": "1.0", "precondition_outputs": "0", "caption_dropout": "0", "train_text_encoder_frac": "1",
    "train_transformer_frac": "1", "aspect_ratio_buckets": "1024,1024;768,1360"}
BY_KIND = {"switch": None, "int": "8", "float": "0.5", "str": "word", "many": "a.png", "bool": "True"}
METHOD_OF = {**dict.fromkeys(("rank", "lora_alpha", "lora_dropout", "use_dora"), "lora"),
             **dict.fromkeys(("num_new_tokens_per_abstraction", "train_text_encoder_ti_frac"), "pivotal"),
             **dict.fromkeys(("num_vectors", "initializer_token", "initializer_concept", "save_as_full_pipeline"), "textual_inversion")}


def two_processes(monkeypatch):
    """The environment of the first of two processes."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)



@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    """The environment's token is put back after every test, and there is none."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "")


def words_of(flag):
    """A flag as one types it, with a value if it takes one."""
    value = SAMPLES.get(flag, BY_KIND[KINDS[flag]["kind"]])
    return [f"--{flag}"] if value is None else [f"--{flag}", value]


def refusal(*argv):
    with pytest.raises(db.UserError) as problem:
        db.parse_settings(list(argv))
    assert "\n" not in str(problem.value)
    return str(problem.value)


# ---- every flag


def test_the_list_has_every_flag_of_the_scripts():
    assert {script: len(flags) for script, flags in SCRIPTS.items()} == {
        "train_dreambooth.py": 61, "train_dreambooth_lora.py": 59, "train_dreambooth_lora_sdxl.py": 72,
        "textual_inversion.py": 48, "textual_inversion_sdxl.py": 46,
        "train_dreambooth_sd3.py": 69, "train_dreambooth_flux.py": 71, "train_dreambooth_lora_sd3.py": 75,
        "train_dreambooth_lora_flux.py": 76, "train_dreambooth_lora_flux2.py": 85, "train_dreambooth_lora_flux2_klein.py": 85,
        "train_dreambooth_lora_z_image.py": 83, "train_dreambooth_lora_qwen_image.py": 79, "train_dreambooth_lora_sd15_advanced.py": 76,
        "train_dreambooth_lora_sdxl_advanced.py": 81, "train_dreambooth_lora_flux_advanced.py": 84}
    assert set(HERE) == set(KINDS) and set(SCRIPTS) == set(db.SCRIPT_METHODS)


def test_the_table_has_no_other_flags():
    """What the program calls a flag of diffusers' scripts is one, and is not a flag of its own as well."""
    assert set(db.DIFFUSERS_FLAGS) == {flag for flag, here in HERE.items() if here not in ("ours", "a switch here")}
    assert not set(db.FOREIGN_FLAGS) & set(db.FIELDS) and not set(db.OTHER_FLAGS) & set(HERE)


@pytest.mark.parametrize("words", [["--blocks_to_swap", "20"], ["--enable_group_offload"]])
def test_other_programs_have_blocks_wait_too(words, capsys):
    s = db.parse_settings(["--train", "--method", "lora", *words])
    assert s.offload_blocks is True and s.gradient_checkpointing is True
    said = capsys.readouterr().out
    assert f"{words[0]}: means --offload_blocks" in said and said.count("\n") == 1


def test_no_blocks_to_swap_are_none(capsys):
    s = db.parse_settings(["--train", "--method", "lora", "--blocks_to_swap", "0"])
    assert s.offload_blocks is None and not s.gradient_checkpointing and capsys.readouterr().out == ""


@pytest.mark.parametrize("flag", sorted(HERE))
def test_every_flag_is_what_the_list_says(flag, capsys):
    words, (kind, _, setting) = words_of(flag), HERE[flag].partition(" as " if "same" in HERE[flag] else " ")
    method = ["--method", METHOD_OF[flag]] if flag in METHOD_OF else []
    if HERE[flag] == "not to be had":
        assert f"--{flag}: not to be had: " in refusal("--train", *words)
        return
    if HERE[flag] == "a switch here":
        assert f"--{flag}: takes no value; give it alone" in refusal("--train", *words)
        assert getattr(db.parse_settings(["--train", words[0]]), flag) is True
        return
    s = db.parse_settings(["--train", *method, *words])
    said = capsys.readouterr().out
    assert said.count("\n") <= 1
    if HERE[flag] == "needless":
        assert f"--{flag}: needless: " in said
        assert flag not in db.FIELDS
    elif kind == "ours":
        convert = {"switch": lambda word: True, "int": int, "float": float}.get(KINDS[flag]["kind"], str)
        value = getattr(s, flag)
        assert value in (convert(words[-1]), [words[-1]])
    elif kind == "same":
        assert getattr(s, setting) == {"int": 8, "float": 0.5, "str": "word"}[KINDS[flag]["kind"]]


@pytest.mark.parametrize("words, setting, value", [
    (["--use_8bit_adam"], "optimizer", "adamw8bit"),
    (["--use_8bit_adam", "--optimizer", "AdamW"], "optimizer", "adamw8bit"),
    (["--optimizer", "AdamW"], "optimizer", "adamw"),
    (["--optimizer", "Prodigy"], "optimizer", "prodigy"),
    (["--offset_noise"], "noise_offset", 0.1),
    (["--placeholder_token", "<cat-toy>"], "identifier", "<cat-toy>"),
    (["--placeholder_token", "<cat-toy>"], "method", "textual_inversion"),
    (["--placeholder_token", "<cat-toy>", "--method", "pivotal"], "method", "pivotal"),
    (["--placeholder_token", "<x>", "--initializer_token", "toy"], "instance_prompt", "a [identifier]"),
    (["--placeholder_token", "<x>", "--initializer_token", "toy", "--class_prompt", "a toy"], "instance_prompt", None),
    (["--learnable_property", "style"], "instance_prompt", "a painting in the style of [identifier]"),
    (["--learnable_property", "style", "--instance_prompt", "[identifier]"], "instance_prompt", "[identifier]"),
    (["--learnable_property", "object", "--class_prompt", "a toy"], "instance_prompt", None),
    (["--method", "textual_inversion", "--learning_rate", "5e-4"], "embedding_lr", 5e-4),
    (["--method", "textual_inversion", "--learning_rate", "5e-4"], "learning_rate", None),
    (["--resume_from_checkpoint=latest"], "resume", "latest"),
    (["--max_train_steps=7", "--steps", "7"], "steps", 7),
    (["--train_text_encoder_ti"], "method", "pivotal"),
    (["--train_text_encoder_ti", "--method", "lora"], "method", "pivotal"),
    (["--train_text_encoder_ti", "--text_encoder_lr", "1.0"], "embedding_lr", 1.0),
    (["--train_text_encoder_ti", "--text_encoder_lr", "1.0"], "text_encoder_lr", None),
    (["--train_text_encoder_ti", "--train_text_encoder", "--text_encoder_lr", "1.0"], "embedding_lr", None),
    (["--train_text_encoder_ti", "--train_text_encoder_ti_frac", "0.25"], "embedding_frac", 0.25),
    (["--train_text_encoder_ti", "--num_new_tokens_per_abstraction=2"], "num_vectors", 2),
    (["--train_text_encoder_ti", "--initializer_concept=cat"], "initializer_token", "cat"),
    (["--token_abstraction", "TOK"], "identifier", "TOK"),
    (["--use_aspect_ratio_buckets"], "aspect_ratio_buckets", True),
    (["--skip_final_inference"], "samples", False),
    (["--weighting_scheme=none"], "timestep_sampling", "uniform"),
    (["--weighting_scheme=logit_normal"], "timestep_sampling", "logit_normal"),
    (["--final_validation_prompt=a sks dog"], "validation_prompt", ["a sks dog"]),
    (["--final_validation_prompt=x", "--validation_prompt", "y"], "validation_prompt", ["y"]),
])
def test_what_flags_mean(words, setting, value):
    assert getattr(db.parse_settings(["--train", *words]), setting) == value


@pytest.mark.parametrize("words, said", [
    (["--max_train_steps", "5", "--steps", "6"], "--max_train_steps: the same as --steps, but --steps 6 is given as well"),
    (["--use_8bit_adam", "--optimizer", "prodigy"], "--optimizer prodigy is given as well; leave one out"),
    (["--max_train_steps", "0"], "--max_train_steps 0: must be a number of at least 1"),
    (["--max_train_steps", "many"], "--max_train_steps: invalid int value"),
    (["--method", "textual_inversion", "--learning_rate", "1e-3", "--embedding_lr", "1e-3"], "leave one out"),
    (["--tokenizer_max_length", "100"], "--tokenizer_max_length 100: not to be had"),
    (["--image_interpolation_mode", "bilinear"], "--image_interpolation_mode bilinear: not to be had"),
    (["--pretrained_vae_model_name_or_path", "stabilityai/sd-vae-ft-mse"], "save the model with that VAE"),
    (["--learnable_property", "person"], "--learnable_property person"),
    (["--prodigy_decouple", "False"], "--prodigy_decouple False: not to be had"),
    (["--adam_beta1", "1"], "--adam_beta1 1.0: must be a number of at least 0 and below 1"),
    (["--adam_beta2", "-0.1"], "--adam_beta2 -0.1"),
    (["--adam_epsilon", "0"], "--adam_epsilon 0.0: must be a number above 0"),
    (["--noise_offset", "inf"], "--noise_offset inf"),
    (["--noise_offset", "nan"], "--noise_offset nan"),
    (["--method", "lora", "--lora_dropout", "1"], "--lora_dropout 1.0"),
    (["--lora_dropout", "0.1"], "give --method lora"),
    (["--rank", "4"], "give --method lora"),
    (["--save_as_full_pipeline"], "give --method textual_inversion"),
    (["--num_train_epochs", "0"], "--num_train_epochs 0"),
    (["--resolution", "16384"], "--resolution 16384: must be a number of at least 32 and at most 8192"),
    (["--lr_scheduler", "piecewise_constant"], "--lr_scheduler"),
    (["--weighting_scheme", "mode"], "--weighting_scheme mode: not to be had: none is --timestep_sampling uniform"),
    (["--logit_std", "0.5"], "--logit_std 0.5: not to be had"),
    (["--precondition_outputs", "1"], "--precondition_outputs 1: not to be had: the loss is that of the velocity"),
    (["--caption_dropout", "0.1"], "--caption_dropout 0.1: not to be had: no caption is ever left out"),
    (["--train_transformer_frac", "0"], "the word alone is --method textual_inversion"),
    (["--train_text_encoder_ti", "--text_encoder_lr", "1", "--embedding_lr", "1"], "--text_encoder_lr is --embedding_lr with"),
    (["--train_text_encoder_ti", "--method", "full"], "--train_text_encoder_ti: means --method pivotal, but --method full is given"),
    (["--token_abstraction", "TOK", "--identifier", "sks"], "--token_abstraction: the same as --identifier, but --identifier sks is"),
    (["--random_flip", "True"], "--random_flip: takes no value; give it alone, or leave it out (--no-random_flip is off)"),
    (["--train_text_encoder=true"], "--train_text_encoder: takes no value; give it alone"),
    (["--no-samples=1"], "--no-samples: takes no value"),
    (["--center_crop", "False"], "--center_crop: takes no value; give it alone, or leave it out;"),
])
def test_wrong_values_are_one_line_that_names_the_flag_as_it_was_typed(words, said):
    assert said in refusal("--train", *words)


@pytest.mark.parametrize("words, needs", [
    (["--lr_num_cycles", "2"], "it needs --lr_scheduler cosine_with_restarts"),
    (["--lr_power", "1.0", "--lr_scheduler", "linear"], "it needs --lr_scheduler polynomial"),
    (["--prodigy_beta3", "0.9"], "it needs --optimizer prodigy"),
    (["--adam_weight_decay_text_encoder", "1e-3"], "it needs --train_text_encoder"),
    (["--text_encoder_lr", "1e-5"], "it needs --train_text_encoder"),
    (["--num_train_epochs", "4", "--max_train_steps", "8"], "it needs no --steps"),
    (["--repeats", "4"], "it needs --num_train_epochs or --validation_epochs"),
    (["--validation_epochs", "4", "--validation_steps", "8"], "it needs no --validation_steps"),
    (["--prior_generation_precision", "fp32", "--no-with_prior_preservation"], "it needs --with_prior_preservation and --prior images"),
    (["--prior_loss_weight", "3", "--method", "textual_inversion"], "it needs --with_prior_preservation"),
    (["--dino_model", "d"], "it needs --select_best"),
    (["--prompts_file", "p.txt"], "it needs --select_best"),
    (["--hub_model_id", "me/dog"], "it needs --push_to_hub"),
    (["--validation_prompt", "a dog", "--no-samples"], "it needs --samples, --validation_steps or --select_best"),
    (["--num_validation_images", "2", "--no-samples"], "it needs --samples, --validation_steps or --select_best"),
])
def test_a_flag_without_effect_is_said(words, needs, capsys):
    db.parse_settings(["--train", *words])
    assert f"Flags: {words[0]}: no effect, {needs}.\n" == capsys.readouterr().out


@pytest.mark.parametrize("words", [
    ["--lr_num_cycles", "2", "--lr_scheduler", "cosine_with_restarts"], ["--lr_power", "2", "--lr_scheduler", "polynomial"],
    ["--prodigy_beta3", "0.9", "--optimizer", "prodigy"], ["--num_train_epochs", "4", "--repeats", "2"],
    ["--hub_model_id", "me/dog", "--push_to_hub"], ["--validation_prompt", "a dog"],
    ["--validation_prompt", "a dog", "--no-samples", "--validation_steps", "3"], ["--prior_loss_weight", "0.5"], ["--dino_model", "d",
    "--select_best"], ["--validation_epochs", "2", "--repeats", "3"], []])
def test_nothing_is_said_of_flags_with_an_effect(words, capsys):
    db.parse_settings(["--train", *words])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_flags_of_a_script_at_once(script, capsys):
    """Those that can be had make Settings, with a line for all the needless; the others are named in one line together."""
    apart = ("learning_rate", "optimizer", "aspect_ratio_buckets")
    able = [flag for flag in SCRIPTS[script] if HERE[flag] != "not to be had" and flag not in apart]
    s = db.parse_settings([script, *(word for flag in able for word in words_of(flag))])
    out = capsys.readouterr().out
    assert (s.mode, s.method) == ("train", "pivotal" if "train_text_encoder_ti" in able else db.SCRIPT_METHODS[script])
    assert out.count("\n") == 1 and all(f"--{flag}: needless" in out for flag in able if HERE[flag] == "needless")
    refused = [flag for flag in SCRIPTS[script] if HERE[flag] == "not to be had"]
    message = refusal(script, *(word for flag in SCRIPTS[script] for word in words_of(flag)), "--wrong_one")
    assert all(f"--{flag}: not to be had: " in message for flag in refused) and "--wrong_one is unknown" in message
    assert not any(f"--{flag}:" in message for flag in able)


@pytest.mark.parametrize("mode, words, said", [
    ("--infer", ["--use_8bit_adam"], "--use_8bit_adam belongs to --train"),
    ("--infer", ["--set_grads_to_none"], "--set_grads_to_none belongs to --train"),
    ("--evaluate", ["--max_train_steps", "5"], "--max_train_steps belongs to --train"),
    ("--infer", ["--push_to_hub"], "--push_to_hub belongs to --train"),
    ("--infer", ["--hub_token", "hf_x"], "--hub_token belongs to --train"),
    ("--infer", ["--adam_beta1", "0.9"], "--adam_beta1 belongs to --train"),
])
def test_flags_of_training_stay_so(mode, words, said):
    assert said in refusal(mode, *words)


def test_another_name_of_a_flag_is_that_flag_in_every_mode():
    assert db.parse_settings(["--infer", "--pretrained_model_name_or_path", "sd"]).model_name == "sd"
    assert db.parse_settings(["--infer", "--cache_dir", "models"]).cache_dir == "models"


# ---- wrong flags


@pytest.mark.parametrize("wrong, right", [
    ("--class_promt", "class_prompt"), ("--learning-rate", "learning_rate"), ("--instance_dir", "instance_data_dir"),
    ("--max_steps", "max_train_steps"), ("--batch_size", "train_batch_size"), ("--epochs", "num_train_epochs"),
    ("--use_8bit_adamw", "use_8bit_adam"), ("--concepts_list", "concepts"), ("--train_text_encode", "train_text_encoder"),
    ("--outputdir=x", "output_dir"), ("--gradient_checkpoint", "gradient_checkpointing"), ("--hub-token", "hub_token"),
    ("--no_random_flip", "no-random_flip"), ("--lr_warmup", "lr_warmup_steps"),
    ("--pretrained_model", "pretrained_model_name_or_path"),
])
def test_a_wrong_flag_gets_the_nearest_right_one(wrong, right):
    assert f"{wrong.partition('=')[0]} is unknown, is --{right} meant?" in refusal("--train", wrong, "1")


def test_a_flag_like_no_other_gets_none():
    assert refusal("--train", "--zzz") == "--zzz is unknown; --help lists the flags"


def test_all_that_is_wrong_is_in_one_line():
    message = refusal("--train", "--class_promt", "a dog", "--dataset_name", "x/y", "--zzz=3", "--steps", "many",
                      "--tokenizer_name=t")
    for said in ("--class_promt is unknown, is --class_prompt meant?", "--zzz is unknown", "--dataset_name: not to be had",
                 "--tokenizer_name: not to be had", "--steps: invalid int value: 'many'"):
        assert said in message


def test_values_of_unknown_flags_are_not_repeated():
    """They may be secrets."""
    assert "hf_secret" not in refusal("--train", "--hub_tokn", "hf_secret") + refusal("--train", "--hub-token=hf_secret")


@pytest.mark.parametrize("argv, said", [
    (["--train", "--class_prompt", "a", "dog"], '"dog" belongs to no flag; put quotes around a text of several words'),
    (["--train", "\u201ca", "dog\u201d"], "put quotes around a text of several words"),
    (["--train", " ", "--steps", "3"], "must be the very last character"),
    (["--train", "\\", "--steps", "3"], "must be the very last character"),
    (["--train", "^"], "must be the very last character"),
    (["--train", "\n"], "must be the very last character"),
    (["--train", "\u2014steps=3"], '"\u2014steps=3" begins with a printed dash; type --'),
    (["--train", "\u2013\u2013steps", "3"], "begins with a printed dash"),
    (["train_dreambooth_flax.py", "--steps", "3"], "no script whose flags are known; those of train_dreambooth.py, "),
    (["--train", "train_dreambooth_lora.py"], "named first"),
    (["--train", "--class_prompt a dog"], '"--class_prompt a dog" belongs to no flag'),
    (["--train", "--foo\nbar"], '"--foo bar" belongs to no flag'),
])
def test_a_word_of_no_flag_is_told_with_its_cause(argv, said):
    assert said in refusal(*argv)


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "instance_data_dir", "train_data_dir", "output_dir",
                                  "class_data_dir", "logging_dir", "hub_model_id", "cache_dir", "concepts", "revision"])
def test_a_variable_that_is_not_set_is_told(flag):
    """As in --output_dir=$OUTPUT_DIR: the program's own default in its place would be another training."""
    assert refusal("--train", f"--{flag}=").startswith(f"--{flag} is empty: a variable such as $MODEL_NAME that is not set?")


@pytest.mark.parametrize("argv, said", [
    (["--hub_token="], "--hub_token is empty"), (["--report_to", ""], "--report_to is empty"),
    (["--steps=--"], "--steps: expected one argument"), (["--sample_batch_size=--"], "--sample_batch_size: expected one"),
    (["--model_name=--"], "--model_name: expected one argument"), (["--prodigy_decouple=\x1b[31m"], "--prodigy_decouple [31m: not"),
    (["--center_cro\n=1"], "--center_cro"), (["--weight\n=3"], "--weight"), (["\x1b[31m"], '"[31m" belongs to no flag'),
    (["--hub_token=hf\x00"], "--hub_token: this is no token of the hub"), (["--seed", "1e400"], "--seed: invalid int"),
])
def test_whatever_is_given_one_line_answers(argv, said):
    message = refusal("--train", *argv)
    assert said in message and message.isprintable()


def test_a_text_may_be_empty():
    assert db.parse_settings(["--infer", "--negative_prompt", ""]).negative_prompt == ""


@pytest.mark.parametrize("flags, said", [
    (["--train", "--zzz", "--dataset_name", "x"], ("--zzz", "--dataset_name")),
    (["train_dreambooth_lora.py", "--instance_data_dir=good", "--pixels", "3"], ("--pixels",)),
    (["--instance_data_dir", "x"], ("say what to do", "--train and --evaluate")),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--logging_dir", "unet"], ("--logging_dir unet",)),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--model_name", "{demo}", "--variant", "fp16"],
     ("--variant fp16",)),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--push_to_hub", "--hub_model_id", "a/b/c"],
     ("--hub_model_id",)),
])
def test_wrong_flags_are_told_before_torch_is_imported(tmp_path, flags, said):
    (tmp_path / "good").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "good" / f"{i}.png")
    flags = [flag.format(demo=REPOSITORY / "demo" / "model") for flag in flags]
    script = (f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import dreambooth_implementation as db; "
              f"status = db.main({flags!r}); assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(status)")
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result
    assert all(part in result.stderr for part in said), result.stderr


def test_help_lists_the_scripts_flags_apart(capsys):
    with pytest.raises(SystemExit) as stop:
        db.parse_settings(["--help"])
    assert stop.value.code == 0
    own, _, others = capsys.readouterr().out.partition("with --train, for commands of diffusers' scripts and others:")
    lines = others.strip().splitlines()
    assert [line.split()[0].rstrip(":") for line in lines] == [f"--{flag}" for flag in db.FOREIGN_FLAGS]
    assert all(len(line) <= 132 for line in lines)
    assert not any(f"--{flag}" in own.split() for flag in db.FOREIGN_FLAGS)
    assert all(f"  --{flag}" in own for flag in db.FIELDS)


# ---- commands without --train


@pytest.mark.parametrize("argv, method, preserves, said", [
    (["--instance_data_dir=d", "--output_dir=o", "--instance_prompt=a photo of sks dog"], "full", False,
     "taken as --train --method full --no-with_prior_preservation (for a command of train_dreambooth_lora.py add --method lora)"),
    (["--instance_data_dir=d", "--max_train_steps=4", "--with_prior_preservation", "--instance_prompt=a", "--class_prompt=a dog"],
     "full", True, "taken as --train --method full (for"),
    (["--instance_data_dir=d", "--max_train_steps=4", "--class_prompt=a dog"], "full", None, "taken as --train --method full (for"),
    (["--instance_data_dir=d", "--output_dir=o", "--instance_prompt=a sks dog", "--rank=4"], "lora", False, "(by --rank)"),
    (["--instance_data_dir=d", "--output_dir=o", "--class_prompt=a dog", "--validation_epochs=4"], "lora", None,
     "(by --validation_epochs)"),
    (["--train_data_dir=d", "--output_dir=o", "--placeholder_token=<x>", "--initializer_token=toy"], "textual_inversion", None,
     "taken as --train --method textual_inversion; --placeholder_token means --method textual_inversion"),
    (["--concepts=c.json", "--output_dir=o", "--method=lora"], "lora", None, "taken as --train --method lora."),
    (["train_dreambooth_lora.py", "--instance_data_dir=d", "--class_prompt=a dog"], "lora", None,
     "taken as --train --method lora."),
    (["examples/dreambooth/train_dreambooth.py", "--class_prompt=a dog"], "full", None, "taken as --train --method full."),
    (["train_dreambooth_lora.py", "--train", "--class_prompt=a dog"], "lora", None, "taken as --train --method lora."),
    (["textual_inversion.py", "--train_data_dir=d", "--placeholder_token=<x>"], "textual_inversion", None, "taken as --train"),
    (["train_dreambooth_lora_z_image.py", "--instance_data_dir=d", "--guidance_scale=5.0", "--class_prompt=a dog"], "lora", None,
     "lora; --guidance_scale: of training there, which is guided by 1 here; pictures are drawn with the model's own"),
    (["train_dreambooth_flux.py", "--instance_data_dir=d", "--instance_prompt=a"], "full", False, "taken as --train --method full "),
    (["train_dreambooth_lora_sdxl_advanced.py", "--instance_data_dir=d", "--instance_prompt=icon of TOK", "--train_text_encoder_ti"],
     "pivotal", False, "--train_text_encoder_ti: means --method pivotal"),
    (["--instance_data_dir=d", "--class_prompt=a dog", "--output_dir=o", "--cache_latents"], "lora", None, "(by --cache_latents)"),
])
def test_a_training_command_without_train_is_taken_for_one(argv, method, preserves, said, capsys):
    s = db.parse_settings(argv)
    assert (s.mode, s.method, s.with_prior_preservation) == ("train", method, preserves)
    assert said in capsys.readouterr().out


def test_guidance_of_training_does_not_draw():
    """FLUX's command has --guidance_scale=1, by which its samples would be hardly guided."""
    pasted = ["train_dreambooth_lora_flux.py", "--instance_data_dir=d", "--class_prompt=a dog", "--guidance_scale=1"]
    assert db.parse_settings(pasted).guidance_scale is None
    assert db.parse_settings(["--train", *pasted[1:]]).guidance_scale == 1


@pytest.mark.parametrize("argv, said", [
    ([], "say what to do: --train, --infer, --evaluate or --export FILE; --help"),
    (["--instance_data_dir", "d"], "(the flags given are of --train and --evaluate)"),
    (["--steps", "4"], "(the flags given are of --train)"),
    (["--prompt", "x"], "(the flags given are of --infer)"),
    (["--prompt", "x", "--steps", "3"], "say what to do"),
])
def test_where_flags_leave_doubt_the_mode_is_asked_for(argv, said):
    assert said in refusal(*argv)


def test_export_alone_stays_export():
    assert db.parse_settings(["--export", "x.safetensors", "--model_path", "m"]).mode == "export"


# ---- the READMEs' commands, with tiny models and few steps


DREAMBOOTH = """--pretrained_model_name_or_path={model} --instance_data_dir={photos} --output_dir=out
    --resolution=32 --train_batch_size=1 --instance_prompt="a photo of sks dog" --lr_scheduler="constant" --lr_warmup_steps=0
    --max_train_steps=2"""
PRIOR = """--class_data_dir=classes --with_prior_preservation --prior_loss_weight=1.0 --class_prompt="a photo of dog"
    --num_class_images=2"""
LORA = f'{DREAMBOOTH} --validation_prompt="A photo of sks dog in a bucket" --validation_epochs=50 --report_to="wandb" --seed="0"'
INVERSION = """--pretrained_model_name_or_path={model} --train_data_dir={photos} --learnable_property="object" --resolution=32
    --placeholder_token="<cat-toy>" --initializer_token="cat" --train_batch_size=1 --gradient_accumulation_steps=4
    --max_train_steps=2 --learning_rate=5.0e-04 --scale_lr --lr_scheduler="constant" --lr_warmup_steps=0"""
COMMANDS = {  # name: (family, flags, what to look for in dreambooth.json: "used" and "settings")
    "dreambooth": ("sd1", f"{DREAMBOOTH} --gradient_accumulation_steps=1 --learning_rate=5e-6",
                   {"learning_rates": {"unet": 5e-6}}),
    "with prior": ("sd1", f"{DREAMBOOTH} {PRIOR} --learning_rate=5e-6", {"with_prior_preservation": True}),
    "16 GB": ("sd1", f"{DREAMBOOTH} {PRIOR} --gradient_accumulation_steps=2 --gradient_checkpointing --use_8bit_adam "
                     f"--learning_rate=5e-6", {"optimizer": "adamw8bit", "gradient_checkpointing": True}),
    "12 GB": ("sd1", f"{DREAMBOOTH} {PRIOR} --gradient_accumulation_steps=1 --gradient_checkpointing --use_8bit_adam "
                     f"--enable_xformers_memory_efficient_attention --set_grads_to_none --learning_rate=2e-6",
              {"optimizer": "adamw8bit", "learning_rates": {"unet": 2e-6}}),
    "text encoder": ("sd1", f"--train_text_encoder {DREAMBOOTH} {PRIOR} --use_8bit_adam --gradient_checkpointing "
                            f"--learning_rate=2e-6", {"train_text_encoder": True}),
    "lora": ("sd1", f"{LORA} --checkpointing_steps=100 --learning_rate=1e-4",
             {"method": "lora", "learning_rates": {"unet_lora": 1e-4}}),
    "sdxl lora": ("sdxl", f"{LORA} --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --mixed_precision=no "
                          f"--gradient_accumulation_steps=4 --learning_rate=1e-4 --enable_xformers_memory_efficient_attention "
                          f"--gradient_checkpointing --use_8bit_adam", {"method": "lora", "optimizer": "adamw8bit"}),
    "inversion": ("sd1", f"{INVERSION} --output_dir=out", {"method": "textual_inversion", "learning_rates": {"new_words": 0.002}}),
    "sdxl inversion": ("sdxl", f"{INVERSION} --mixed_precision=no --save_as_full_pipeline --output_dir=out",
                       {"method": "textual_inversion", "learning_rates": {"new_words": 0.002}}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_the_readmes_runs_as_it_is_pasted(name, tiny_model, photos, run, tmp_path):
    family, flags, expected = COMMANDS[name]
    argv = shlex.split(flags.format(model=tiny_model(family), photos=photos))
    status, out, err = run(*argv, "--num_inference_steps", "1", "--num_validation_images", "1")
    assert status == 0, err
    record = json.loads((tmp_path / "out" / "dreambooth.json").read_text())
    found = {**record["settings"], **record["used"], "method": record["method"]}
    assert {key: found[key] for key in expected} == expected
    assert found["steps"] == 2 and record["subjects"][0]["identifier"] == ("<cat-toy>" if "inversion" in name else "sks")
    assert out.startswith("Flags: taken as --train --method ")
    assert (tmp_path / "classes").exists() == ("with_prior" in flags)
    if "inversion" in name:
        assert (tmp_path / "out" / "learned_embeds.safetensors").is_file()


def test_the_full_pipeline_of_a_textual_inversion_has_its_word(tiny_model, photos, run, tmp_path):
    from diffusers import DiffusionPipeline

    status, _, err = run("textual_inversion.py", "--pretrained_model_name_or_path", tiny_model("sd1"), "--train_data_dir", photos,
                         "--placeholder_token", "<toy>", "--initializer_token", "cat", "--max_train_steps", 2, "--num_vectors", 2,
                         "--learning_rate", "0.1", "--save_as_full_pipeline", "--num_inference_steps", 1)
    assert status == 0, err
    from safetensors.torch import load_file

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "output", safety_checker=None)
    vectors, = load_file(tmp_path / "output" / "learned_embeds.safetensors").values()
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<toy>", "<toy>_1"])
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[ids], vectors)
    status, _, err = run("--infer", "--prompt", "a [identifier]", "--num_images", 1, "--num_inference_steps", 1)
    assert status == 0, err


def test_the_rare_word_of_a_prompt_without_a_class(photos, tmp_path):
    s = db.parse_settings(["--instance_data_dir", str(photos), "--output_dir", "o", "--instance_prompt", "a photo of sks dog"])
    concept, = db.read_concepts(s, False, True)
    assert concept.identifier == "sks" and concept.class_prompt is None


# ---- what flags do to the weights


def batch_with(offset):
    from types import SimpleNamespace

    rows = torch.arange(3)
    cache = db.LatentCache(torch.zeros(3, 4, 8, 8), torch.zeros(3, 4, 8, 8), torch.zeros(3, 6), rows, ["a"] * 3, [[0, 1, 2]], [])
    s = SimpleNamespace(train_batch_size=2, seed=3, prior_loss_weight=1.0, noise_offset=offset)
    return db.make_batch(cache, s, 5, usual_noise())


def test_noise_offset_adds_one_number_to_each_channel():
    plain, moved = batch_with(None), batch_with(0.1)
    shift = (moved["noise"] - plain["noise"]) / 0.1
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-5)
    assert shift[:, :, 0, 0].unique().numel() == 8 and 0.3 < shift[:, :, 0, 0].std() < 2  # of a normal distribution
    assert all(torch.equal(plain[key], moved[key]) for key in ("latents", "levels", "weight"))
    assert torch.allclose(batch_with(0.3)["noise"] - plain["noise"], 3 * (moved["noise"] - plain["noise"]), atol=1e-5)
    assert torch.equal(batch_with(0.0)["noise"], plain["noise"])


GIVEN = ["--adam_beta1", "0.7", "--adam_beta2", "0.9", "--adam_epsilon", "1e-3", "--adam_weight_decay", "0.2"]


def stepped(optimizer, weight, steps=4):
    for i in range(steps):
        weight.grad = torch.sin(torch.arange(weight.numel()) + i).reshape(weight.shape)
        optimizer.step()
    return weight.detach().clone()


def test_adam_flags_are_torchs():
    s = db.parse_settings(["--train", *GIVEN])
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4)) for _ in range(2))
    made = db.make_optimizer(s, "adamw", [db.ParameterGroup("unet", [], [ours], 1e-2)], torch.device("cpu"))
    by_hand = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.2)
    assert torch.allclose(stepped(made, ours), stepped(by_hand, theirs), atol=1e-7)
    usual = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    made = db.make_optimizer(db.Settings("train"), "adamw", [db.ParameterGroup("unet", [], [usual], 1e-2)], torch.device("cpu"))
    assert not torch.allclose(stepped(made, usual), ours.detach(), atol=1e-4)


@pytest.mark.parametrize("name, given, expected", [
    ("adamw", [], {"betas": (0.9, 0.999), "eps": 1e-8}),
    ("adamw", ["--adam_beta2", "0.99"], {"betas": (0.9, 0.99)}),
    ("adamw8bit", GIVEN, {"betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.2}),
    ("prodigy", GIVEN + ["--prodigy_beta3", "0.8"], {"betas": (0.7, 0.9), "eps": 1e-3, "beta3": 0.8, "decouple": True,
                                                     "use_bias_correction": True, "safeguard_warmup": True}),
    ("prodigy", [], {"betas": (0.9, 0.999), "eps": 1e-8, "beta3": None}),
    ("adafactor", [], {"beta1": None}),
])
def test_every_optimizer_gets_what_was_given(name, given, expected):
    s = db.parse_settings(["--train", "--optimizer", name, *given])
    groups = [db.ParameterGroup("unet", [], [torch.nn.Parameter(torch.ones(8, 8))], 1.0)]
    made = db.make_optimizer(s, name, groups, torch.device("cpu"))
    group = made.param_groups[0]
    assert {key: group[key] for key in expected} == expected


def test_the_text_encoders_have_a_weight_decay_of_their_own():
    s = db.parse_settings(["--train", "--train_text_encoder", "--adam_weight_decay", "0.1",
                           "--adam_weight_decay_text_encoder", "0.3"])
    groups = [db.ParameterGroup(name, [], [torch.nn.Parameter(torch.ones(2))], 1e-3)
              for name in ("unet", "text_encoder", "text_encoder_lora", "new_words")]
    made = db.make_optimizer(s, "adamw", groups, torch.device("cpu"))
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.3, 0.3, 0.1]


@pytest.mark.parametrize("flags, said", [
    (["--optimizer", "adafactor", "--adam_beta1", "0.8"], "--adam_beta1: --optimizer adafactor"),
    (["--optimizer", "adafactor", "--adam_epsilon", "1e-6"], "--adam_epsilon: --optimizer adafactor"),
    (["--optimizer", "prodigy", "--scale_lr"], "--scale_lr: --optimizer prodigy"),
])
def test_what_an_optimizer_lacks_is_said(flags, said):
    s = db.parse_settings(["--train", *flags])
    with pytest.raises(db.UserError, match=said):
        db.check_levers(s, db.StableDiffusion(), db.Plan(torch.device("cpu"), "no"))


def test_no_plan_takes_an_optimizer_without_the_moments_given():
    s = db.parse_settings(["--train", "--adam_beta1", "0.8"])
    assert {levers.optimizer for levers in db.plans(s, db.StableDiffusion(), db.Plan(torch.device("cpu"), "bf16"))} == {"adamw", "adamw8bit"}
    assert "adafactor" in {levers.optimizer for levers in db.plans(db.Settings("train"), db.StableDiffusion(), db.Plan(torch.device("cpu"), "bf16"))}


@pytest.mark.parametrize("name, options", [
    ("linear", {}), ("cosine", {}), ("cosine_with_restarts", {"num_cycles": 3}), ("polynomial", {"power": 2.0}),
    ("polynomial", {"power": 1.0}), ("constant_with_warmup", {})])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_are_those_of_diffusers(name, options, warmup):
    from diffusers.optimization import get_scheduler

    rates = (1e-3, 5e-6)
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in rates]
    ours = torch.optim.AdamW([{"params": [weight], "lr": rate} for weight, rate in zip(weights, rates)])
    schedule = db.make_schedule(name, ours, warmup, 20, options.get("num_cycles", 1), options.get("power", 1.0))
    theirs = [torch.optim.AdamW([weight], lr=rate) for weight, rate in zip(weights, rates)]
    expected = [get_scheduler(name, each, num_warmup_steps=warmup, num_training_steps=20, **options) for each in theirs]
    for _ in range(20):
        assert schedule.get_last_lr() == pytest.approx([each.get_last_lr()[0] for each in expected], rel=1e-9)
        for step in (ours, *theirs, schedule, *expected):
            step.step()


def test_a_rate_too_small_for_the_polynomial_is_refused():
    s = db.parse_settings(["--train", "--lr_scheduler", "polynomial"])
    with pytest.raises(db.UserError, match="--lr_scheduler polynomial ends at a learning rate of 1e-07"):
        db.check_rates(s, [db.ParameterGroup("unet", [], [], 1e-8)])


def test_scaled_rates_are_multiplied_by_batch_accumulation_and_processes(tiny_model, monkeypatch):
    models = db.load_models(str(tiny_model("sd1")), torch.float32)
    s = db.parse_settings(["--train", "--scale_lr", "--train_batch_size", "3", "--gradient_accumulation_steps", "4",
                           "--train_text_encoder", "--learning_rate", "1e-6"])
    recipe = db.SmallStableDiffusion.recipes["full"]
    assert [group.lr for group in db.parameter_groups(s, models, [], recipe)] == pytest.approx([12e-6, 12 * recipe.text_encoder_lr])
    two_processes(monkeypatch)
    assert db.parameter_groups(s, models, [], recipe)[0].lr == pytest.approx(24e-6)


def concepts_of(photos, classes, folder):
    return [db.Concept("photos", str(folder / "classes"), classes, class_prompt="a dog", photos=(("p", None),) * photos)]


@pytest.mark.parametrize("flags, photos, classes, expected", [
    (["--no-with_prior_preservation"], 5, 200, 5),
    (["--no-with_prior_preservation", "--train_batch_size", "2"], 5, 200, 3),
    (["--no-with_prior_preservation", "--train_batch_size", "2", "--gradient_accumulation_steps", "2"], 5, 200, 2),
    (["--no-with_prior_preservation", "--repeats", "10"], 5, 200, 50),
    ([], 5, 200, 200),
    (["--repeats", "100"], 5, 200, 500),
    (["--train_batch_size", "4", "--gradient_accumulation_steps", "3"], 5, 200, 17),
    (["--method", "textual_inversion"], 5, 200, 500),
    (["--method", "textual_inversion", "--repeats", "1"], 5, 200, 5),
])
def test_epochs_are_counted_as_diffusers_scripts_do(flags, photos, classes, expected, tmp_path, capsys):
    s = db.parse_settings(["--train", "--num_train_epochs", "3", *flags])
    concepts = concepts_of(photos, classes, tmp_path)
    length = max(photos * (s.repeats or (100 if "textual" in s.method else 1)), classes if db.preserves_prior(s) else 0)
    batches = math.ceil(length / s.train_batch_size)
    assert db.epoch_steps(s, concepts) == expected == math.ceil(batches / s.gradient_accumulation_steps)
    assert db.recipe_for(db.StableDiffusion(), s, concepts).steps == 3 * expected
    assert f"Epochs: 3 of {expected} steps each." in capsys.readouterr().out


def test_epochs_count_own_class_images_and_processes(tmp_path, monkeypatch):
    (tmp_path / "classes").mkdir()
    for i in range(8):
        picture(i).save(tmp_path / "classes" / f"{i}.png")
    s, concepts = db.parse_settings(["--train", "--num_train_epochs", "1"]), concepts_of(5, 200, tmp_path)
    assert db.epoch_steps(s, concepts) == 8
    assert db.epoch_steps(s, concepts_of(5, 3, tmp_path)) == 5
    two_processes(monkeypatch)
    assert db.epoch_steps(s, concepts) == 4


def test_steps_go_before_epochs(tmp_path):
    s = db.parse_settings(["--train", "--num_train_epochs", "3", "--steps", "7"])
    assert db.recipe_for(db.StableDiffusion(), s, concepts_of(5, 200, tmp_path)).steps == 7


def test_epochs_of_validation_are_steps(tmp_path):
    def interval(*flags):
        s = db.parse_settings(["--train", "--no-with_prior_preservation", *flags])
        return db.sample_interval(s, concepts_of(5, 200, tmp_path))
    assert interval("--validation_epochs", "2") == 10
    assert interval("--validation_epochs", "2", "--validation_steps", "3") == 3
    assert interval() is None


def test_lora_dropout_is_in_every_layer(tiny_model):
    s = db.parse_settings(["--train", "--method", "lora", "--lora_dropout", "0.3", "--rank", "2", "--train_text_encoder"])
    models = db.load_models(str(tiny_model("sd1")), torch.float32)
    db.parameter_groups(s, models, [], db.SmallStableDiffusion.recipes["lora"])
    chances = [part.p for module in (models.denoiser, *models.text_encoders) for name, part in module.named_modules()
               if "lora_dropout" in name and isinstance(part, torch.nn.Dropout)]
    assert len(chances) > 20 and set(chances) == {0.3}


@pytest.fixture
def trained(tiny_model, photos, run, tmp_path):
    """trained(*flags) -> (status, output, error, dreambooth.json or {}) of a short training without class images."""
    def call(*flags, model="sd1"):
        status, out, err = run("--train", "--model_name", tiny_model(model), "--instance_data_dir", photos,
                               "--class_prompt", "a dog", "--no-with_prior_preservation", "--num_inference_steps", 1,
                               "--num_validation_images", 1,
                               "--validation_prompt", "a dog", *flags)
        record = tmp_path / "output" / "dreambooth.json"
        return status, out, err, json.loads(record.read_text()) if status == 0 else {}
    return call


def weights_of(folder, file="unet/diffusion_pytorch_model.safetensors"):
    from safetensors.torch import load_file

    return torch.cat([tensor.float().flatten() for _, tensor in sorted(load_file(Path(folder) / file).items())])


def test_flags_change_what_is_trained(trained, tmp_path):
    """Each of them, by itself, leads to other weights; --no effect flags to the same."""
    def weights(*flags):
        shutil.rmtree(tmp_path / "output", ignore_errors=True)
        status, _, err, _ = trained("--steps", 2, "--learning_rate", "1e-3", *flags)
        assert status == 0, err
        return weights_of(tmp_path / "output")
    plain = weights()
    for flags in (["--adam_beta1", "0.5"], ["--offset_noise"], ["--lr_scheduler", "polynomial"], ["--adam_epsilon", "0.1"],
                  ["--scale_lr", "--gradient_accumulation_steps", "2"]):
        assert not torch.equal(weights(*flags), plain), flags
    for flags in (["--center_crop"], ["--set_grads_to_none"], ["--lr_power", "3"], ["--logging_dir", "tb"],
                  ["--dataloader_num_workers", 2]):
        assert torch.equal(weights(*flags), plain), flags


def test_epochs_train_as_many_steps(trained):
    status, out, _, record = trained("--num_train_epochs", 2, "--validation_epochs", 1)
    assert status == 0 and record["used"]["steps"] == 6 and "Epochs: 2 of 3 steps each." in out
    assert len(list(Path("output/samples").glob("step-*"))) == 2


def test_as_many_samples_as_asked_for(trained, tmp_path):
    trained("--steps", 2, "--validation_steps", 2, "--num_validation_images", 3)
    assert len(list((tmp_path / "output" / "samples" / "step-000002").glob("*.png"))) == 3
    assert len(list((tmp_path / "output" / "samples").glob("a-dog-*.png"))) == 3


# ---- resuming


SHAPING = {"--noise_offset": "0.1", "--adam_beta1": "0.8", "--adam_beta2": "0.9", "--adam_epsilon": "1e-6",
           "--adam_weight_decay_text_encoder": "0.3", "--prodigy_beta3": "0.9", "--lr_num_cycles": "2", "--lr_power": "2",
           "--lora_dropout": "0.2"}


def test_every_new_flag_that_shapes_weights_is_compared():
    """And those that do not are free; all new ones are None if not given, so that earlier checkpoints still fit."""
    new = [name for name in db.FIELDS if name in HERE and HERE[name] == "ours" and name not in EARLIER]
    s = db.Settings("train")
    assert all(getattr(s, name) is None for name in (*new, "noise_offset"))
    assert {f"--{name}" for name in (*new, "noise_offset") if name not in db.FREE_FLAGS} == set(SHAPING)


EARLIER = set("""adam_weight_decay lora_alpha checkpointing_steps checkpoints_total_limit class_data_dir class_prompt
    gradient_accumulation_steps gradient_checkpointing initializer_token instance_data_dir instance_prompt learning_rate
    lr_scheduler
    lr_warmup_steps max_grad_norm mixed_precision num_class_images num_vectors optimizer output_dir prior_loss_weight random_flip
    rank resolution sample_batch_size seed snr_gamma text_encoder_lr train_batch_size train_text_encoder use_dora validation_prompt
    validation_steps
    with_prior_preservation""".split())


@pytest.mark.parametrize("flag", SHAPING)
def test_a_resumed_training_has_the_same(flag):
    before = json.loads(json.dumps(db.shaping_flags(db.Settings("train"))))
    method = ["--method", "lora"] if flag == "--lora_dropout" else []
    s = db.parse_settings(["--train", *method, flag, SHAPING[flag]])
    with pytest.raises(db.UserError, match=f"{flag} .*give the same, or start without --resume"):
        db.check_origin(Path("step-2"), {"origin": before}, db.shaping_flags(s))
    db.check_origin(Path("step-2"), {"origin": json.loads(json.dumps(db.shaping_flags(s)))}, db.shaping_flags(s))


def interrupted_after(monkeypatch, step):
    """Have a training stop after this step, as Ctrl-C does."""
    monkeypatch.setattr(db, "stop_agreed", lambda accelerator, signals, done: 2 if done == step else None)


@pytest.mark.parametrize("flags", [
    ["--lr_scheduler", "polynomial", "--lr_power", "2"], ["--lr_scheduler", "cosine_with_restarts", "--lr_num_cycles", "2"],
    ["--offset_noise", "--adam_beta1", "0.5", "--adam_epsilon", "1e-3"], ["--method", "lora", "--lora_dropout", "0.4"],
    ["--train_text_encoder", "--adam_weight_decay_text_encoder", "0.5", "--scale_lr"], ["--num_train_epochs", "2"]])
def test_resumed_equals_uninterrupted(flags, trained, monkeypatch, tmp_path):
    steps = [] if "--num_train_epochs" in flags else ["--steps", 6]
    file = "pytorch_lora_weights.safetensors" if "lora" in flags else "unet/diffusion_pytorch_model.safetensors"
    common = [*steps, "--learning_rate", "1e-3", "--logging_dir", "tb/here", *flags]
    assert trained(*common)[0] == 0
    whole = weights_of(tmp_path / "output", file)
    shutil.rmtree(tmp_path / "output")
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        assert trained(*common)[0] == 130
    assert (tmp_path / "output.partial" / "tb" / "here").is_dir()
    status, out, err, _ = trained(*common, "--resume_from_checkpoint=latest")
    assert status == 0 and "Going on after step 2 of 6" in out, err
    assert torch.equal(weights_of(tmp_path / "output", file), whole)
    assert list((tmp_path / "output" / "tb" / "here").glob("events*")) and not (tmp_path / "output" / "logs").exists()


def test_scaled_rates_are_compared_as_rates(trained, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        assert trained("--steps", 4, "--learning_rate", "1e-3", "--gradient_accumulation_steps", 2, "--scale_lr")[0] == 130
    status, _, err, _ = trained("--steps", 4, "--learning_rate", "1e-3", "--gradient_accumulation_steps", 2, "--resume")
    assert status == 2 and "the learning rates" in err


# ---- models


def cached(folder, model, name="somebody/model", revision="main"):
    """A folder laid out as the hub's client keeps models."""
    place = Path(folder) / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(f"commit-of-{revision}")
    shutil.copytree(model, place / "snapshots" / f"commit-of-{revision}")


def test_models_are_taken_from_cache_dir(trained, run, tiny_model, tmp_path):
    from huggingface_hub import constants

    usual = constants.HF_HUB_CACHE
    cached(tmp_path / "kept", tiny_model("sd1"))
    flags = ["--method", "lora", "--pretrained_model_name_or_path", "somebody/model", "--steps", 1, "--num_inference_steps", 1]
    argv = ["--train", "--instance_data_dir", "photos", "--class_prompt", "a dog", "--no-with_prior_preservation", *flags]
    status, _, err = run(*argv)
    assert status == 2 and "somebody/model" in err
    status, _, err = run(*argv, "--cache_dir", "kept")
    assert status == 0, err
    assert constants.HF_HUB_CACHE == usual  # a later command of the same process is as before
    draw = ["--infer", "--prompt", "a dog", "--num_images", 1, "--num_inference_steps", 1]
    assert run(*draw)[0] == 2
    status, _, err = run(*draw, "--cache_dir", "kept")
    assert status == 0, err
    export = ["--export", "whole.safetensors", "--model_path", "somebody/model"]
    assert run(*export)[0] == 2
    status, _, err = run(*export, "--cache_dir", "kept")
    assert status == 0 and Path("whole.safetensors").is_file(), err
    assert constants.HF_HUB_CACHE == usual


@pytest.mark.parametrize("before", [None, "hf_of_the_person"])
def test_a_token_is_of_its_own_command_alone(before, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if before:
        monkeypatch.setenv("HF_TOKEN", before)
    seen = []
    monkeypatch.setattr(db, "train", lambda s: seen.append(os.environ["HF_TOKEN"]))
    assert run("--train", "--hub_token", "hf_secret")[0] == 0
    assert run("--train", "--hub_token", "hf_secret", "--seed", "x")[0] == 2
    assert seen == ["hf_secret"] and os.environ.get("HF_TOKEN") == before


def test_a_wall_of_letters_does_not_hide_the_remedy(run):
    status, _, err = run("--infer", "--guidance_scale", "x" * 5000)
    assert status == 2 and len(err) < 400 and "xxx...xxx" in err and "--help lists the flags" in err


def test_a_revision_is_trained_recorded_and_drawn_with(run, tiny_model, photos, tmp_path):
    cached(tmp_path / "kept", tiny_model("sd1"))
    cached(tmp_path / "kept", tiny_model("sd1", 7), revision="v2")
    argv = ["--train", "--cache_dir", "kept", "--model_name", "somebody/model", "--instance_data_dir", photos,
            "--class_prompt", "a dog", "--no-with_prior_preservation", "--steps", 1, "--num_inference_steps", 1,
            "--learning_rate", 0]
    status, _, err = run(*argv, "--revision", "v2")
    assert status == 0, err
    assert torch.equal(weights_of("output"), weights_of(tiny_model("sd1", 7)))
    status, _, err = run(*argv, "--revision", "main", "--output_dir", "main")
    assert status == 0 and torch.equal(weights_of("main"), weights_of(tiny_model("sd1"))), err
    status, _, err = run(*argv, "--method", "lora", "--revision", "v2", "--output_dir", "lora")
    assert status == 0, err
    assert json.loads(Path("lora/dreambooth.json").read_text())["base_model"] == "somebody/model@v2"
    card = Path("lora/README.md").read_text()
    assert "base_model: somebody/model\n" in card and 'from_pretrained("somebody/model", revision="v2")' in card
    status, _, err = run("--infer", "--model_path", "lora", "--cache_dir", "kept", "--prompt", "a dog", "--num_images", 1,
                         "--num_inference_steps", 1)
    assert status == 0, err
    status, _, err = run(*argv, "--revision", "v3")
    assert status == 2 and "somebody/model@v3" in err and err.count("\n") == 1


def test_a_folder_has_no_revisions(trained, capsys):
    status, out, _, _ = trained("--steps", 1, "--revision", "fp16")
    assert status == 0 and "--revision fp16: no effect" in out


def test_a_variant_is_trained_and_drawn_with(run, tiny_model, photos, tmp_path):
    from diffusers import DiffusionPipeline

    shutil.copytree(tiny_model("sd1"), "both")
    other = DiffusionPipeline.from_pretrained(tiny_model("sd1", 7), safety_checker=None)
    other.save_pretrained("both", variant="fp16")
    argv = ["--train", "--model_name", "both", "--instance_data_dir", photos, "--class_prompt", "a dog",
            "--no-with_prior_preservation", "--steps", 1, "--num_inference_steps", 1, "--learning_rate", 0]
    assert run(*argv)[0] == 0 and torch.equal(weights_of("output"), weights_of(tiny_model("sd1")))
    status, _, err = run(*argv, "--variant", "fp16", "--output_dir", "half")
    assert status == 0 and torch.equal(weights_of("half"), weights_of(tiny_model("sd1", 7))), err
    status, _, err = run(*argv, "--variant", "fp16", "--method", "lora", "--output_dir", "lora")
    assert status == 0 and 'variant="fp16"' in Path("lora/README.md").read_text(), err
    status, _, err = run("--infer", "--model_path", "lora", "--prompt", "a dog", "--num_images", 1, "--num_inference_steps", 1)
    assert status == 0, err
    status, _, err = run(*argv, "--variant", "ema")
    assert status == 2 and "--variant ema: both has no unet/*.ema.safetensors" in err


@pytest.mark.parametrize("given, precision", [("fp32", "no"), ("no", "no"), ("bf16", "bf16"), (None, "bf16")])
def test_class_images_have_a_precision_of_their_own(given, precision):
    s = db.Settings("train", prior_generation_precision=given)
    assert db.class_image_plan(s, db.Plan(torch.device("cpu"), "bf16")).precision == precision


def test_class_images_in_fp16_need_a_gpu(trained):
    status, _, err, _ = trained("--steps", 1, "--with_prior_preservation", "--prior_generation_precision", "fp16")
    assert status == 2 and "--prior_generation_precision fp16 needs a CUDA GPU" in err


@pytest.mark.parametrize("method", ["full", "lora"])
def test_class_images_are_drawn_in_that_precision(method, trained, monkeypatch):
    drawn, draw = [], db.draw
    monkeypatch.setattr(db, "draw", lambda pipeline, *args, **options: (
        drawn.append((pipeline.unet.dtype, pipeline.vae.dtype, options.get("title"))), draw(pipeline, *args, **options))[1])
    flags = ["--steps", 1, "--with_prior_preservation", "--num_class_images", 1, "--method", method]
    status, _, err, _ = trained(*flags, "--mixed_precision", "bf16", "--prior_generation_precision", "fp32")
    assert status == 0 and (torch.float32, torch.float32, "class images") in drawn, err
    status, _, err, _ = trained(*flags, "--mixed_precision", "no", "--prior_generation_precision", "bf16")
    assert status == 0 and (torch.bfloat16, torch.bfloat16, "class images") in drawn, err


# ---- logs


@pytest.mark.parametrize("name", ["unet", "checkpoints", "samples/x", ".", "..", "../elsewhere", "README.md", "dreambooth.json"])
def test_a_log_folder_in_the_way_is_refused(name, photos, run, tiny_model):
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt", "a dog",
                         f"--logging_dir={name}")
    assert status == 2 and f"--logging_dir {name}: give a name" in err


def test_logs_can_be_elsewhere(trained, tmp_path):
    status, _, _, _ = trained("--steps", 1, "--logging_dir", tmp_path / "board")
    assert status == 0 and list((tmp_path / "board").glob("events*")) and not (tmp_path / "output" / "logs").exists()


# ---- --push_to_hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub's client: what was asked of it, and the names of the files it was given."""
    import fnmatch

    import huggingface_hub

    seen = types.SimpleNamespace(repositories=[], files=[], problem=None)

    def create_repo(repo_id, **options):
        seen.repositories.append((repo_id, options, huggingface_hub.get_token()))
        return types.SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(*, repo_id, folder_path, ignore_patterns, **options):
        if seen.problem:
            raise seen.problem
        names = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        left = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns)]
        seen.files.append((repo_id, left))
    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    return seen


def test_a_finished_output_is_uploaded_without_photos(trained, hub, tmp_path):
    status, out, err, record = trained("--steps", 3, "--checkpointing_steps", 1, "--push_to_hub", "--hub_model_id", "me/my-dog",
                                       "--hub_token", "hf_secret")
    assert status == 0, err
    (repository, options, token), = hub.repositories
    assert (repository, options["exist_ok"], token) == ("me/my-dog", True, "hf_secret")
    (repository, files), = hub.files
    assert repository == "me/my-dog" and {"README.md", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= set(files)
    assert list((tmp_path / "output" / "checkpoints").iterdir()) and (tmp_path / "output" / "photos.png").is_file()
    assert not [name for name in files if name.startswith(("photos", "logs/", "checkpoints/"))]
    assert any(name.startswith("samples/") for name in files)  # drawn before the upload
    assert "hf_secret" not in out + err + json.dumps(record) + (tmp_path / "output" / "README.md").read_text()
    for path in (tmp_path / "output").rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path
    assert record["settings"]["push_to_hub"] is True and record["settings"]["hub_model_id"] == "me/my-dog"


def test_the_repository_is_named_after_the_output_and_logs_stay_here(trained, hub):
    status, _, _, _ = trained("--steps", 1, "--push_to_hub", "--logging_dir", "board")
    assert status == 0 and hub.repositories[0][0] == "output" and hub.files[0][0] == "me/output"
    assert not [name for name in hub.files[0][1] if name.startswith("board")]


def test_a_failed_upload_is_one_line_and_the_output_stays(trained, hub, tmp_path):
    hub.problem = RuntimeError("401 Client Error\nfor hf_secret")
    flags = ["--steps", 1, "--push_to_hub", "--hub_token", "hf_secret"]
    status, out, err, _ = trained(*flags)
    assert status == 2 and err.splitlines()[-1].startswith("error: --push_to_hub: the upload to output failed")
    assert "hf_secret" not in out + err and "401 Client Error" in err
    assert (tmp_path / "output" / "dreambooth.json").is_file() and not (tmp_path / "output.partial").exists()
    hub.problem = None
    before = weights_of("output")
    status, out, err, _ = trained(*flags, "--resume")
    assert status == 0 and "complete already" in out and len(hub.files) == 1 and torch.equal(weights_of("output"), before), err
    assert not list(tmp_path.glob("output-*"))


def test_without_a_token_it_is_said_before_training(trained, hub, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    _, out, _, _ = trained("--steps", 1, "--push_to_hub")
    assert "no token for the hub yet; until training is over, log in: hf auth login" in out
    assert out.index("no token") < out.index("Model: ")


def test_nothing_is_uploaded_unasked_or_unfinished(trained, hub, monkeypatch):
    assert trained("--steps", 1)[0] == 0
    with monkeypatch.context() as patch:
        interrupted_after(patch, 1)
        assert trained("--steps", 3, "--push_to_hub")[0] == 130
    assert not hub.files and not hub.repositories


@pytest.mark.parametrize("name", ["a/b/c", "my dog", "../x", "-/x"])
def test_a_name_that_is_none_is_refused_before_training(name, trained, hub):
    status, _, err, _ = trained("--steps", 1, "--push_to_hub", f"--hub_model_id={name}")
    assert status == 2 and f"--push_to_hub: {name} is no name of a repository" in err


def test_the_token_of_the_environment_is_used(trained, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    trained("--steps", 1, "--push_to_hub")
    assert hub.repositories[0][2] == "hf_other" and os.environ["HF_TOKEN"] == "hf_other"

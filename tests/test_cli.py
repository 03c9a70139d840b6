"""The commands end to end: output, pictures, metadata, and what the README tells people to type."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FAMILIES, REPOSITORY, picture
from PIL import Image

import dreambooth_implementation as db

QUICK = ["--class_prompt", "a dog", "--num_class_images", "2", "--num_inference_steps", "2", "--steps", "2",
         "--identifier", "sks"]


@pytest.fixture
def train(run, tiny_model, photos):
    def call(family="sd1", *flags):
        return run("--train", "--model_name", tiny_model(family), "--instance_data_dir", photos, *QUICK, *flags)

    return call


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_diffusers_draws_the_same_picture(family, train, run, tmp_path):
    from diffusers import DiffusionPipeline

    assert train(family)[0] == 0
    status, out, err = run("--infer", "--prompt", "a [identifier] dog on the moon", "--num_images", 2, "--seed", 7,
                           "--num_inference_steps", 3, "--guidance_scale", 5)
    assert status == 0 and "a sks dog on the moon" in out, err
    for seed in (7, 8):
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "output")  # no code of ours from here
        expected = pipeline("a sks dog on the moon", num_inference_steps=3, guidance_scale=5.0,
                            generator=torch.Generator().manual_seed(seed)).images[0]
        ours = Image.open(tmp_path / "images" / f"a-sks-dog-on-the-moon-{seed}.png")
        assert ours.size == (32, 32)
        difference = np.abs(np.asarray(ours).astype(int) - np.asarray(expected).astype(int))
        assert difference.max() <= 1, difference.max()


def test_pictures_do_not_depend_on_the_batch(train, run, tmp_path):
    assert train()[0] == 0
    for size in (1, 3):
        assert run("--infer", "--prompt", "a dog", "--prompt", "a cat", "--num_images", 2, "--sample_batch_size", size,
                   "--num_inference_steps", 4, "--image_dir", f"by{size}")[0] == 0
    names = {f"a-{noun}-{seed}.png" for noun in ("dog", "cat") for seed in (0, 1)} | {"grid-a-dog-0.png"}
    assert {p.name for p in (tmp_path / "by1").iterdir()} == {p.name for p in (tmp_path / "by3").iterdir()} == names
    for name in names:
        one, three = (np.asarray(Image.open(tmp_path / f"by{size}" / name)).astype(int) for size in (1, 3))
        assert np.abs(one - three).max() <= 1
    assert Image.open(tmp_path / "by1" / "grid-a-dog-0.png").size == (65, 65)


def test_pictures_carry_their_settings(train, run, tmp_path):
    assert train()[0] == 0
    flags = ["--infer", "--prompt", "a [identifier] dog", "--negative_prompt", "blur, text", "--num_images", 1, "--seed", 5,
             "--height", 40, "--width", 48]
    assert run(*flags, "--num_inference_steps", 2)[0] == 0
    image = Image.open(tmp_path / "images" / "a-sks-dog-5.png")
    assert image.size == (48, 40)
    assert re.fullmatch(r"a sks dog\nNegative prompt: blur, text\nSteps: 2, Sampler: PNDM, CFG scale: 4.0, Seed: 5, "
                        r"Size: 48x40, Model: ./output, Model hash: [0-9a-f]{10}", image.info["parameters"])
    first = image.tobytes()
    assert run(*flags, "--num_inference_steps", 3)[0] == 0  # another picture of that name: the first is kept
    assert Image.open(tmp_path / "images" / "a-sks-dog-5.png").tobytes() == first
    assert "Steps: 3" in Image.open(tmp_path / "images" / "a-sks-dog-5-2.png").info["parameters"]
    assert run(*flags, "--num_inference_steps", 2)[0] == 0  # the same picture again: no copies
    assert len(list((tmp_path / "images").glob("a-sks*"))) == 2
    assert train("sd1", "--overwrite", "--seed", 1)[0] == 0  # another training, so another picture
    assert run(*flags, "--num_inference_steps", 2)[0] == 0
    assert len(list((tmp_path / "images").glob("a-sks*"))) == 3


def test_output_is_complete(train, run, tmp_path):
    status, out, _ = train("sd2", "--identifier", "zqq", "--validation_prompt", "a [identifier] dog in the snow")
    assert status == 0
    record = json.loads((tmp_path / "output" / "dreambooth.json").read_text())
    assert record["subjects"] == [{"identifier": "zqq", "class_prompt": "a dog", "instance_prompt": "a zqq dog", "name": "dog"}]
    assert record["settings"]["steps"] == 2 and record["settings"]["identifier"] == "zqq"
    assert record["used"] == {"steps": 2, "resolution": 32, "precision": "no", "lr_scheduler": "warmup_stable_decay", "use_ema": False,
                              "optimizer": "adamw", "weights": "fp32", "offload_optimizer": False,
                              "gradient_checkpointing": False, "split_batch": False, "fused_backward": False,
                              "learning_rates": {"unet": db.RECIPES["small"]["full"].learning_rate},
                              "guidance_scale": db.GUIDANCE["small"], "selected_step": None}
    assert set(record["loss"]["first_100_steps"]) == {"instance", "prior"} and record["versions"]["torch"]
    assert len(list((tmp_path / "output" / "samples").glob("a-zqq-dog-in-the-snow-*.png"))) == 4
    assert list((tmp_path / "output" / "logs").glob("events*"))
    assert not list((tmp_path / "output").rglob("*.bin")) and not list(tmp_path.glob("*partial*"))
    assert run("--infer", "--num_images", 1, "--num_inference_steps", 1)[0] == 0
    assert (tmp_path / "images" / "a-zqq-dog-on-the-moon-0.png").exists()


def test_tensorboard_shows_both_losses(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train()[0] == 0
    log = EventAccumulator(str(tmp_path / "output" / "logs")).Reload()
    assert [e.step for e in log.Scalars("loss/instance")] == [e.step for e in log.Scalars("loss/prior")] == [1, 2]


def test_an_earlier_output_is_kept_unless_overwritten(train, tmp_path):
    assert train()[0] == 0
    (tmp_path / "output" / "mark").write_text("first")
    status, out, _ = train()
    assert status == 0 and "kept as output-1" in out
    assert (tmp_path / "output-1" / "mark").read_text() == "first" and not (tmp_path / "output" / "mark").exists()
    assert train("sd1", "--overwrite")[0] == 0
    assert sorted(p.name for p in tmp_path.glob("output*")) == ["output", "output-1"]


@pytest.mark.parametrize("broken", ["optimize", "save_output"])
def test_a_failing_run_leaves_the_earlier_output(broken, train, tmp_path, monkeypatch):
    assert train()[0] == 0
    (tmp_path / "output" / "mark").write_text("first")

    def fail(*args, **options):
        raise RuntimeError("power cut")

    monkeypatch.setattr(db, broken, fail)
    with pytest.raises(RuntimeError, match="power cut"):
        train("sd1", "--overwrite")
    assert (tmp_path / "output" / "mark").read_text() == "first"
    assert sorted(p.name for p in tmp_path.glob("output*")) == ["output"]


def test_failing_samples_do_not_cost_the_model(train, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(db, "draw_pictures", fail)
    status, out, _ = train()
    assert status == 0 and "samples could not be drawn (out of memory)" in out
    assert (tmp_path / "output" / "unet" / "diffusion_pytorch_model.safetensors").exists()


def test_an_output_that_cannot_be_renamed_is_not_lost(train, tmp_path, monkeypatch):
    from pathlib import Path

    assert train()[0] == 0
    (tmp_path / "output" / "mark").write_text("first")
    rename = Path.rename

    def fail(path, target):
        if "partial" in path.name:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    status, _, err = train()
    kept = re.search(r"complete in (\S+)", err)[1]
    assert status == 2 and (Path(kept) / "dreambooth.json").exists()
    assert (tmp_path / "output" / "mark").read_text() == "first"


def test_two_processes_train_one_model(tmp_path, tiny_model, photos):
    """Both text encoder and UNet train under DDP, and the class images and the output are made once."""
    from safetensors.torch import load_file

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               REPOSITORY / "dreambooth_implementation.py", "--train", "--model_name", tiny_model("sdxl"), "--instance_data_dir",
               photos, *QUICK, "--train_text_encoder", "--learning_rate", "1e-3", "--text_encoder_lr", "1e-3"]
    result = subprocess.run([str(word) for word in command], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("Trains: text_encoder") == 1
    for part, tensor in (("unet/diffusion_pytorch_model", "conv_in.weight"),
                         ("text_encoder_2/model", "text_projection.weight")):
        before, after = (load_file(root / f"{part}.safetensors")[tensor] for root in (tiny_model("sdxl"), tmp_path / "output"))
        assert not torch.equal(before, after), part
    assert len(list((tmp_path / "class_images").rglob("*.png"))) == 2
    assert sorted(p.name for p in tmp_path.glob("output*")) == ["output"]


def test_a_damaged_model_is_one_line(run, photos, tmp_path, tiny_model):
    model = tmp_path / "model"
    shutil.copytree(tiny_model("sd1"), model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    status, _, err = run("--train", "--model_name", model, "--instance_data_dir", photos, *QUICK)
    assert status == 2 and err.startswith("error: --model_name") and err.count("\n") == 1, err
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, model / "unet" / "diffusion_pytorch_model.bin")  # a pickle is never read
    status, _, err = run("--train", "--model_name", model, "--instance_data_dir", photos, *QUICK)
    assert status == 2 and err.count("\n") == 1, err
    shutil.copytree(tiny_model("sd1"), model, dirs_exist_ok=True)
    shutil.rmtree(model / "tokenizer")
    status, _, err = run("--train", "--model_name", model, "--instance_data_dir", photos, *QUICK)
    assert status == 2 and "tokenizer" in err
    (model / "model_index.json").write_text("{")
    assert run("--train", "--model_name", model, "--instance_data_dir", photos, *QUICK)[0] == 2


def readme_commands():
    """Every `python dreambooth_implementation.py ...` in the README's code blocks, with continued lines joined."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    lines = "\n".join(block for language, block in blocks if language in ("", "bash", "sh")).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("python dreambooth_implementation.py --")]


def test_readme_commands_run(tmp_path):
    """As written, in order, in a copy of the repository; only made short, and with the bundled model for a hub's."""
    for name in ("dreambooth_implementation.py", "tools", "demo/model", "demo/subjects", "demo/two_dogs.json", "demo/metrics",
                 "instance_images"):
        source, target = REPOSITORY / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        picture(i, size=(80, 64)).save(tmp_path / "photos" / f"{i}.jpg")
    commands = readme_commands()
    assert all(sum(mode in c for c in commands) >= least for mode, least in (("--train", 2), ("--infer", 2), ("--evaluate", 1)))
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "python"
        words = [sys.executable, *words[1:]]
        if "--model_name" in words and "/" in words[words.index("--model_name") + 1]:
            words[words.index("--model_name") + 1] = "demo/model"
        if "--train" in words:
            words += ["--steps", "2", "--num_class_images", "2"]
        if "--evaluate" in words:
            (tmp_path / "prompts.txt").write_text("a [identifier] [class] on the moon\n")
            words += ["--num_images", "2", "--prompts_file", "prompts.txt"]
        if any(mode in words for mode in ("--train", "--infer", "--evaluate")):
            words += ["--num_inference_steps", "2", "--mixed_precision", "no"]
        result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, (command, result.stderr[-2000:])
    assert (tmp_path / "output" / "dreambooth.json").exists() and list((tmp_path / "images").glob("*.png"))

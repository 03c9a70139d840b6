"""Whatever a person can get wrong: one line that names it, exit status 2, and not a byte changed of what was there."""

import hashlib
import json
import shutil
import struct
import zlib

import pytest
import torch
from conftest import picture

import dreambooth_implementation as db

SUBJECT = {"identifier": "phol", "class_prompt": "a dog", "instance_prompt": "a phol dog", "name": "dog"}
ENTRY = {"name": "rex", "instance_data_dir": "photos", "class_prompt": "a dog"}


def huge_png(path):
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.fixture(scope="module")
def ready(tmp_path_factory, tiny_model):
    """A folder with an output, class images and the checkpoint of an interrupted training; and much that is broken."""
    root = tmp_path_factory.mktemp("ready")

    def folder(name):
        (root / name).mkdir()
        return root / name
    for i in range(3):
        picture(i).save((root / "photos" if i else folder("photos")) / f"{i}.png")
    (folder("empty"))
    (folder("texts") / "1.txt").write_text("a dog")
    for name in ("truncated", "zero", "fake", "huge", "latin", "listed", "badclass"):
        picture(0).save(folder(name) / "good.jpg")
    (root / "truncated" / "cut.jpg").write_bytes((root / "truncated" / "good.jpg").read_bytes()[:-200])
    (root / "zero" / "none.png").write_bytes(b"")
    (root / "fake" / "text.png").write_text("no picture")
    huge_png(root / "huge" / "huge.png")
    (root / "latin" / "good.txt").write_bytes("ein Hündchen".encode("latin-1"))
    (root / "listed" / "metadata.jsonl").write_text('{"file": "good.jpg"}\n')
    (root / "badclass" / "class_prompt.txt").write_bytes(b"\xff\xfe")
    (root / "file").write_text("")
    (folder("own_class") / "broken.png").write_text("no picture")

    concepts = {"brace": "{", "dict": "{}", "unknown": [ENTRY | {"colour": "red"}], "kind": [ENTRY | {"identifier": 7}],
                "twice": [ENTRY, ENTRY], "escape": [ENTRY | {"name": "../rex"}], "lacking": [{"name": "rex"}]}
    for name, content in concepts.items():
        (root / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))

    def model(name):
        return shutil.copytree(tiny_model("sd1"), root / name)
    index = model("other") / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "KandinskyPipeline"))
    (model("index") / "model_index.json").write_text("{")
    weights = model("cut") / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])
    (model("pickle") / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, root / "pickle" / "unet" / "diffusion_pytorch_model.bin")
    shutil.rmtree(model("wordless") / "tokenizer")
    config = model("inpainting") / "unet" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 9'))

    records = {"no_json": "{", "no_subject": {"method": "lora", "subjects": []},
               "no_method": {"method": "x", "subjects": [SUBJECT]},
               "no_text": {"method": "lora", "subjects": [SUBJECT | {"identifier": 5}]},
               "escaping": {"method": "textual_inversion", "subjects": [SUBJECT | {"name": "../../secret"}] * 2},
               "no_dict": {"subjects": [SUBJECT], "used": 3}, "no_size": {"subjects": [SUBJECT], "used": {"resolution": "32"}},
               "no_settings": {"subjects": [SUBJECT], "settings": {"variant": 5}},
               "no_sample": {"subjects": [SUBJECT], "base_sample": {"unet": ["float32", 5]}},
               "no_numbers": {"subjects": [SUBJECT], "base_sample": {"unet": ["x", "1 2"]}},
               "lost": {"method": "lora", "subjects": [SUBJECT], "base_model": "x"}}
    for name, record in records.items():
        (folder(name) / "dreambooth.json").write_text(record if isinstance(record, str) else json.dumps(record))
    (root / "noise.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    (root / "cut.safetensors").write_bytes(weights.read_bytes()[:50])

    cwd = pytest.MonkeyPatch()
    cwd.chdir(root)
    train = ["--train", "--model_name", str(tiny_model("sd1")), "--instance_data_dir", "photos", "--class_prompt", "a dog",
             "--num_class_images", "2", "--steps", "3", "--num_inference_steps", "1", "--method", "lora", "--rank", "2"]
    assert db.main(train) == 0
    cwd.setattr(db, "stop_agreed", lambda accelerator, signals, done: 2)
    assert db.main(train) == 130
    shutil.copytree(db.checkpoints_in("output.partial")[0], root / "damaged")
    (root / "damaged" / db.STATE_FILE).write_text("{}")
    cwd.undo()
    return root, train


TRAIN = {  # what is wrong -> (flags after those of a good training, what the line says)
    "steps of nought": (["--steps", "0"], "--steps 0"),
    "steps no number": (["--steps", "many"], "--steps"),
    "negative rate": (["--learning_rate", "-1"], "--learning_rate -1"),
    "rate not a number": (["--learning_rate", "nan"], "--learning_rate nan"),
    "endless rate": (["--learning_rate", "inf"], "--learning_rate inf"),
    "seed too large": (["--seed", str(2**32)], "--seed"),
    "seed negative": (["--seed", "-1"], "--seed -1"),
    "odd resolution": (["--resolution", "100"], "--resolution 100"),
    "small resolution": (["--resolution", "16"], "--resolution 16"),
    "unknown method": (["--method", "hypernetwork"], "--method"),
    "another method's flag": (["--num_vectors", "2"], "--num_vectors"),
    "another mode's flag": (["--prompt", "a dog"], "--prompt"),
    "unknown flag": (["--epochs", "3"], "--epochs"),
    "both modes": (["--infer"], "--infer"),
    "fp16 on a CPU": (["--mixed_precision", "fp16"], "--mixed_precision fp16"),
    "warmup too long": (["--lr_warmup_steps", "3"], "--lr_warmup_steps 3"),
    "fraction above one": (["--method", "pivotal", "--embedding_frac", "1.5"], "--embedding_frac 1.5"),
    "identifier of two words": (["--identifier", "my dog"], "--identifier"),
    "empty class": (["--class_prompt", " "], "--class_prompt"),
    "class with identifier": (["--class_prompt", "a [identifier] dog"], "--class_prompt"),
    "no place for the identifier": (["--instance_prompt", "two very strange words"], "--instance_prompt"),
    "a known word as new word": (["--method", "pivotal", "--identifier", "dog"], "--identifier"),
    "no such folder": (["--instance_data_dir", "nowhere"], "nowhere"),
    "a file for a folder": (["--instance_data_dir", "file"], "--instance_data_dir file"),
    "empty folder": (["--instance_data_dir", "empty"], "empty"),
    "folder of texts": (["--instance_data_dir", "texts"], "texts"),
    "truncated photo": (["--instance_data_dir", "truncated"], "cut.jpg"),
    "photo of no bytes": (["--instance_data_dir", "zero"], "none.png"),
    "text named png": (["--instance_data_dir", "fake"], "text.png"),
    "decompression bomb": (["--instance_data_dir", "huge"], "huge.png"),
    "caption not UTF-8": (["--instance_data_dir", "latin"], "good.txt"),
    "caption list of another form": (["--instance_data_dir", "listed"], "metadata.jsonl, line 1"),
    "own class images broken": (["--class_data_dir", "own_class"], "broken.png"),
    "class folder a file": (["--class_data_dir", "file"], "--class_data_dir file"),
    "output a file": (["--output_dir", "file"], "--output_dir file"),
    "output below a file": (["--output_dir", "file/output"], "--output_dir file/output"),
    "output holds something else": (["--output_dir", "photos"], "--output_dir photos"),
    "output is here": (["--output_dir", "."], "--output_dir ."),
    "no such model": (["--model_name", "nobody/nothing"], "nobody/nothing"),
    "model no name": (["--model_name", "no model"], "--model_name"),
    "model without index": (["--model_name", "photos"], "model_index.json"),
    "model of another kind": (["--model_name", "other"], "KandinskyPipeline"),
    "index broken": (["--model_name", "index"], "model_index.json"),
    "weights truncated": (["--model_name", "cut"], "--model_name cut"),
    "weights pickled": (["--model_name", "pickle"], "use_safetensors=False"),
    "tokenizer missing": (["--model_name", "wordless"], "tokenizer"),
    "inpainting model": (["--model_name", "inpainting"], "inpainting"),
    "no such checkpoint": (["--resume", "nowhere"], "nowhere"),
    "checkpoint damaged": (["--resume", "damaged"], "damaged"),
    "checkpoint of other flags": (["--resume", "--rank", "3"], "--rank (2, now 3)"),
    "checkpoint of other photos": (["--resume", "--instance_data_dir", "truncated/../own"], "photos"),
    "checkpoint of another rate": (["--resume", "output.partial/checkpoints/step-000001", "--learning_rate", "1"],
                                   "--learning_rate"),
}
CONCEPTS = {"brace.json": "not JSON", "dict.json": "list", "unknown.json": '"colour"', "kind.json": '"identifier"',
            "twice.json": 'name "rex"', "escape.json": "../rex", "lacking.json": "instance_data_dir",
            "missing.json": "cannot be read"}
INFER = {
    "no such output": (["--model_path", "nowhere"], "--model_path nowhere"),
    "record no JSON": (["--model_path", "no_json"], "dreambooth.json"),
    "record without subjects": (["--model_path", "no_subject"], "dreambooth.json"),
    "record of no method": (["--model_path", "no_method"], "dreambooth.json"),
    "record of other types": (["--model_path", "no_text"], "dreambooth.json"),
    "record that leads elsewhere": (["--model_path", "escaping"], "dreambooth.json"),
    "record without settings": (["--model_path", "no_dict"], "dreambooth.json"),
    "record of another size": (["--model_path", "no_size"], "dreambooth.json"),
    "record of no variant": (["--model_path", "no_settings"], "dreambooth.json"),
    "record without a sample": (["--model_path", "no_sample"], "dreambooth.json"),
    "record of no numbers": (["--model_path", "no_numbers"], "dreambooth.json"),
    "record without its file": (["--model_path", "lost"], "pytorch_lora_weights.safetensors is missing"),
    "unknown subject": (["--prompt", "a [identifier:tom] dog"], "[identifier:tom]"),
    "adapter missing": (["--adapter", "nowhere.safetensors"], "nowhere.safetensors"),
    "adapter truncated": (["--adapter", "cut.safetensors"], "cut.safetensors"),
    "adapter of nothing": (["--adapter", "noise.safetensors"], "noise.safetensors"),
    "odd width": (["--width", "50"], "--width 50"),
    "picture folder a file": (["--image_dir", "file"], "--image_dir file"),
    "no pictures": (["--num_images", "0"], "--num_images 0"),
    "base gone": (["--model_name", "gone"], "--model_name"),
}


def contents(root):
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.rglob("*"))
            if path.is_file()}


@pytest.fixture
def refused(ready, run, monkeypatch):
    root, train = ready

    def check(flags, said):
        monkeypatch.chdir(root)
        monkeypatch.setattr(db, "optimize", lambda *args: pytest.fail("trained"))
        before = contents(root)
        status, out, err = run(*flags)
        assert status == 2 and said in err and "Traceback" not in err, (status, err)
        last = err.splitlines()[-1]
        assert last.startswith("error: ") and said in last and err.count("error: ") == 1 and len(last) < 500
        assert contents(root) == before, "files changed"

    return check, train


@pytest.mark.parametrize("wrong", TRAIN)
def test_training_refuses(wrong, refused, ready):
    check, train = refused
    flags, said = TRAIN[wrong]
    if wrong == "checkpoint of other photos" and not (ready[0] / "own").exists():
        shutil.copytree(ready[0] / "photos", ready[0] / "own")
        picture(9).save(ready[0] / "own" / "1.png")
    method = ["--method", "full"] if wrong == "another method's flag" else []
    if method:
        train = train[:train.index("--method")] + ["--method", "full"]
    check([*train, *flags], said)


@pytest.mark.parametrize("file", CONCEPTS)
def test_concept_files_are_refused(file, refused):
    refused[0](["--train", "--concepts", file], CONCEPTS[file])


@pytest.mark.parametrize("wrong", INFER)
def test_drawing_refuses(wrong, refused):
    flags, said = INFER[wrong]
    refused[0](["--infer", "--prompt", "a dog", *flags], said)

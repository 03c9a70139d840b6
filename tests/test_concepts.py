"""What a person gives: one subject or several, their photos, words and captions."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from conftest import picture
from training_runs import settings, usual_noise

import dreambooth_implementation as db


def read_concepts(**options):
    return db.read_concepts(settings(**options), True, True)


def test_identifier_is_read_from_an_instance_prompt(photos, capsys):
    def read(**values):
        return read_concepts(instance_data_dir=str(photos), class_prompt="a dog", **values)[0]
    assert read(instance_prompt="a photo of sks dog").identifier == "sks"
    assert 'Identifier "sks"' in capsys.readouterr().out
    assert read(instance_prompt="my [identifier] dog").identifier == "auto"
    assert read(instance_prompt="a dog", identifier="sks").identifier == "sks"
    assert "does not contain the identifier" in capsys.readouterr().out
    with pytest.raises(db.UserError, match=r"\[identifier\]"):
        read(instance_prompt="my fluffy zzq dog")


@pytest.fixture
def two(tmp_path):
    """Two subjects of one class with 3 and 1 photos, one of another; returns the path of their concepts file."""
    for name, count in (("rex", 3), ("lili", 1), ("tom", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            picture(10 * len(name) + ord(name[0]) + i).save(tmp_path / name / f"{i}.png")
    (tmp_path / "tom" / "class_prompt.txt").write_text("a cat")
    entries = [{"name": "rex", "instance_data_dir": "rex", "class_prompt": "a dog"},
               {"name": "lili", "instance_data_dir": "lili", "class_prompt": "a dog", "identifier": "sks",
                "num_class_images": 3},
               {"name": "tom", "instance_data_dir": "tom", "instance_prompt": "a photo of my [identifier] cat"}]
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    return tmp_path / "concepts.json"


def test_subjects_are_balanced_and_keep_their_captions(two, tiny_model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(db.SmallStableDiffusion, "class_steps", (1, 1))
    s = settings(concepts="concepts.json", num_class_images=2, seed=5)
    concepts = db.read_concepts(s, True, True)
    models = db.load_models(str(tiny_model("sd1")), torch.float32)
    subjects = db.settle_subjects(s, models, concepts)
    rex, lili, tom = subjects
    assert len({x.identifier for x in subjects}) == 3 and lili.identifier == "sks" and tom.class_prompt == "a cat"
    assert tom.instance_prompt == f"a photo of my {tom.identifier} cat" and rex.instance_prompt == f"a {rex.identifier} dog"

    class Alone:
        process_index, num_processes = 0, 1

        def wait_for_everyone(self):
            pass
    pools = db.class_pools(s, models, concepts, 32, db.plan_device(s), Alone())
    assert [len(pool) for pool in pools] == [2, 3, 2] and pools[0] == pools[1][:2]  # dogs share their images
    assert {caption for _, caption in pools[1]} == {"a dog"} and {caption for _, caption in pools[2]} == {"a cat"}
    photos = [db.captioned(c, x) for c, x in zip(concepts, subjects)]
    cache = db.cache_latents(models, photos, pools, 32, "cpu")
    assert len(cache.mean) == 3 + 1 + 2 + 3 + 2

    drawn, rows, classes = Counter(), Counter(), Counter()
    for step in range(60):
        batch = db.make_batch(cache, dataclasses.replace(s, train_batch_size=2), step, usual_noise())
        for prompt, time_id, is_class in zip(batch["prompt"].tolist(), batch["latents"], batch["is_class"].tolist()):
            (classes if is_class else drawn)[cache.prompts[prompt]] += 1
    assert drawn == {x.instance_prompt: 40 for x in subjects}
    assert classes == {"a dog": 80, "a cat": 40}
    for draw in range(36):
        rows.update(db.balanced(cache.photos, draw, 1, 0))
    assert [sorted(rows[row] for row in pool) for pool in cache.photos] == [[4, 4, 4], [12], [6, 6]]


QUICK = ["--num_class_images", "2", "--num_inference_steps", "2", "--steps", "2"]


def test_two_subjects_in_one_model(two, run, tiny_model, tmp_path):
    status, out, err = run("--train", "--model_name", tiny_model("sdxl"), "--concepts", "concepts.json", *QUICK)
    assert status == 0, err
    record = json.loads((tmp_path / "output" / "dreambooth.json").read_text())
    words = {x["name"]: x["identifier"] for x in record["subjects"]}
    assert words.keys() == {"rex", "lili", "tom"} and all(f'"{word}"' in out for word in words.values() if word != "sks")
    draw = ["--infer", "--num_images", 1, "--num_inference_steps", 1]
    status, out, err = run(*draw, "--prompt", "a [identifier:tom] cat and a [identifier:rex] dog")
    assert status == 0 and f'"a {words["tom"]} cat and a {words["rex"]} dog"' in out, err
    for prompt in ("a [identifier] dog", "a [identifier:bello] dog"):
        status, _, err = run(*draw, "--prompt", prompt)
        assert status == 2 and "[identifier:rex], [identifier:lili], [identifier:tom]" in err and err.count("\n") == 1
    assert "moon" in run(*draw)[1]


@pytest.mark.parametrize("method", ["lora", "textual_inversion", "pivotal"])
def test_adapters_of_several_subjects(method, two, run, tiny_model, tmp_path):
    for entry in (entries := json.loads(two.read_text())):
        entry.pop("identifier", None)
    two.write_text(json.dumps(entries))
    status, out, err = run("--train", "--model_name", tiny_model("sd1"), "--concepts", "concepts.json", *QUICK,
                           "--method", method)
    assert status == 0, err
    files = {p.name for p in (tmp_path / "output").glob("*.safetensors")}
    assert {f"learned_embeds-{name}.safetensors" for name in ("rex", "lili", "tom")} <= files or method == "lora"
    status, out, err = run("--infer", "--num_images", 1, "--num_inference_steps", 1, "--prompt", "a [identifier:tom] cat")
    assert status == 0 and (method == "lora" or '"a <tom> cat"' in out), err


def test_captions_of_single_photos(photos, capsys):
    (photos / "0.txt").write_text("a [identifier] dog\n asleep")
    (photos / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "no"}\n'
                                           '{"file_name": "1.png", "text": "a dog at sea"}\n')
    (given,) = read_concepts(instance_data_dir=str(photos), class_prompt="a dog")
    out = capsys.readouterr().out
    assert "2 of 3 photos" in out and "1 of them without [identifier]" in out and "Skipped" not in out
    subject = db.Subject("phol", "a dog", "a phol dog")
    captions = [caption for _, caption in db.captioned(given, subject)]
    assert captions == ["a phol dog asleep", "a dog at sea", "a phol dog"]
    (photos / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "fine"}\n{"file_name": "1.png"}\n')
    with pytest.raises(db.UserError, match="metadata.jsonl, line 2"):
        read_concepts(instance_data_dir=str(photos), class_prompt="a dog")


GOOD = {"name": "rex", "instance_data_dir": "photos", "class_prompt": "a dog"}


@pytest.mark.parametrize("text, said", [
    ("{", "not JSON"), ("{}", "must be a list"), ("[]", "must be a list"), ("[1]", "must be a list"),
    (json.dumps([{"name": "rex"}]), 'lacks "instance_data_dir"'),
    (json.dumps([GOOD | {"class_promt": "a dog"}]), '"class_promt"'),
    (json.dumps([GOOD | {"num_class_images": "many"}]), '"num_class_images"'),
    (json.dumps([GOOD | {"num_class_images": True}]), '"num_class_images"'),
    (json.dumps([GOOD | {"num_class_images": -3}]), '"num_class_images"'),
    (json.dumps([GOOD | {"class_prompt": ""}]), '"class_prompt"'),
    (json.dumps([GOOD | {"name": "../rex"}]), "../rex"),
    (json.dumps([GOOD | {"instance_data_dir": "nowhere"}]), "nowhere"),
    (json.dumps([GOOD, GOOD]), 'name "rex"'),
    (json.dumps([GOOD | {"identifier": "sks"}, GOOD | {"name": "tom", "identifier": "sks"}]), 'identifier "sks"'),
    (json.dumps([GOOD | {"class_prompt": "a [identifier] dog"}]), "class_prompt"),
])
def test_a_wrong_concepts_file_is_one_line(photos, run, tmp_path, text, said):
    (tmp_path / "concepts.json").write_text(text)
    status, _, err = run("--train", "--concepts", "concepts.json")
    assert status == 2 and err.count("\n") == 1 and said in err and "concepts.json" in err, err
    assert not (tmp_path / "output").exists()

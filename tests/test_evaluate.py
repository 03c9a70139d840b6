"""The paper's metrics: exact numbers on hand-made embeddings, the prompts, and the command from end to end."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, picture
from PIL import Image
from torch.nn.functional import normalize

import dreambooth_implementation as db

E = torch.eye(4)  # four embeddings at right angles


def record(folder, photos):
    """Make `folder` look as if --train had written it."""
    subject = {"identifier": "sks", "class_prompt": "a dog", "instance_prompt": "a sks dog", "name": "dog"}
    (folder / "dreambooth.json").write_text(json.dumps(
        {"method": "full", "base_model": "x", "subjects": [subject], "settings": {"instance_data_dir": str(photos)}}))


@pytest.fixture
def trained(tmp_path, tiny_model, photos):
    """trained(name, seed=0) makes the folder of a tiny model with the record of a training on `photos`."""
    def make(name, seed=0):
        shutil.copytree(tiny_model("sd1", seed), tmp_path / name)
        record(tmp_path / name, photos)

    return make


@pytest.fixture
def evaluate(run, networks, tmp_path):
    """evaluate(*flags) -> (output, evaluation.json) of a short --evaluate with two prompts and the random networks."""
    (tmp_path / "prompts.txt").write_text("a [identifier] [class] on the moon\na red [identifier] [class]\n")

    def call(*flags):
        status, out, err = run("--evaluate", "--prompts_file", "prompts.txt", "--num_images", 2, "--num_inference_steps", 2,
                               "--dino_model", networks / "vit", "--clip_model", networks / "clip", *flags)
        assert status == 0, err
        return out, json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())

    return call


# ---- scores


def test_identical_pictures_score_one():
    same = E[:1].expand(3, 4)
    assert db.mean_similarity(same, same) == 1.0
    assert db.real_row(same) == (1.0, 1.0)
    scores = db.prompt_scores((same, same), (same, same), E[:1], E[1:2])
    assert scores == {"dino": 1.0, "clip_i": 1.0, "clip_t": 1.0, "clip_t_raw": 0.0, "div_dino": 0.0}


def test_similarity_is_the_mean_over_all_pairs():
    drawn = torch.stack([E[0], normalize(E[0] + E[1], dim=0)])  # cosines with E0, E1: 1, 0 and 0.707, 0.707
    assert db.mean_similarity(drawn, E[:2]) == pytest.approx((1 + 0 + 2 * 0.5**0.5) / 4, abs=1e-7)
    assert db.mean_of_pairs(drawn @ drawn.T) == pytest.approx(0.5**0.5, abs=1e-7)
    assert db.prompt_scores((drawn, E[:2]), (E[:2], E[:1]), E[1:2], E[:1]) == pytest.approx(
        {"dino": (1 + 2**0.5) / 4, "clip_i": 0.5, "clip_t": 0.5, "clip_t_raw": 0.5, "div_dino": 1 - 0.5**0.5}, abs=1e-7)


@pytest.mark.parametrize("count", [2, 4, 5])
def test_self_pairs_raise_the_real_row_by_a_known_amount(count):
    real = normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(count)), dim=-1)
    without, with_self = db.real_row(real)
    pairs = [torch.dot(real[i], real[j]).item() for i in range(count) for j in range(count) if i != j]
    assert without == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert with_self == pytest.approx(without + (1 - without) / count, abs=1e-6)


def test_one_photo_or_picture_has_no_pairs():
    assert db.real_row(E[:1]) == (None, 1.0)
    assert db.prompt_scores((E[:1], E[:1]), (E, E), E[:1], E[:1])["div_dino"] is None
    assert db.mean_distance([picture(0)], lambda a, b: a.mean()) is None


def test_means_count_every_row_once():
    assert db.mean_scores([{"dino": 0.25, "div": 0.5}, {"dino": 0.75, "div": None}]) == {"dino": 0.5, "div": None}


def test_diversity_is_the_mean_distance_of_all_pairs():
    shades = [Image.new("RGB", (8, 8), (grey,) * 3) for grey in (0, 51, 255)]  # -1, -0.6 and 1 in the network's range
    seen = []

    def distance(a, b):
        assert a.shape == (3, 3, 8, 8)
        seen.extend(zip(a[:, 0, 0, 0].tolist(), b[:, 0, 0, 0].tolist()))
        return (a - b).abs().mean(dim=(1, 2, 3))

    assert db.mean_distance(shades, distance) == pytest.approx((0.4 + 2 + 1.6) / 3, abs=1e-6)
    assert len(seen) == 3
    assert db.mean_distance(shades, None) is None


# ---- prompts


def test_there_are_25_prompts_of_every_kind():
    bundled = db.read_prompts(db.BUNDLED_PROMPTS, "--prompts_file")
    for prompts in (*db.PROMPTS.values(), bundled):
        assert len(set(prompts)) == len(prompts) == 25
        assert all(prompt.count("[identifier] [class]") == 1 for prompt in prompts)
    assert set(db.PROMPTS) == {"object", "live"}
    common = set(db.PROMPTS["object"]) & set(db.PROMPTS["live"])
    assert len(common) == 15 and "a cube shaped [identifier] [class]" in common  # 10 places and 5 properties
    assert "a [identifier] [class] with the Eiffel Tower in the background" in db.PROMPTS["object"]
    assert "a [identifier] [class] wearing a black top hat and a monocle" in db.PROMPTS["live"]


def test_the_bundled_prompts_are_words_that_the_model_knows():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(REPOSITORY / "demo" / "model" / "tokenizer")
    for prompt in db.read_prompts(db.BUNDLED_PROMPTS, "--prompts_file"):
        words = prompt.replace("[identifier]", "wjq").replace("[class]", "robot").split()
        assert len(tokenizer(" ".join(words), add_special_tokens=False).input_ids) == len(words), prompt


@pytest.mark.parametrize("template, class_prompt, drawn, of_a_new_word, caption", [
    ("a [identifier] [class] on the moon", "a dog", "a sks dog on the moon", "a sks on the moon", "a dog on the moon"),
    ("a red [identifier] [class]", "an owl", "a red sks owl", "a red sks", "a red owl"),
    ("a [identifier] [class] in space", "an owl", "a sks owl in space", "a sks in space", "an owl in space"),
    ("a [identifier] [class]", "a photo of a teddy bear", "a sks teddy bear", "a sks", "a teddy bear"),
    ("a [identifier] dog asleep", "a dog", "a sks dog asleep", "a sks dog asleep", "a dog asleep"),
    ("a [identifier] in the snow", "a dog", "a sks in the snow", "a sks in the snow", "a dog in the snow"),
    ("[identifier], oil painting", "a dog", "sks, oil painting", "sks, oil painting", "dog, oil painting"),
])
def test_prompts_are_drawn_with_the_identifier_and_compared_without(template, class_prompt, drawn, of_a_new_word, caption):
    subject = db.Subject("sks", class_prompt, "", "dog")
    assert db.fill_template(template, subject, True) == (drawn, caption)
    assert db.fill_template(template, subject, False) == (of_a_new_word, caption)
    assert db.fill_template(template, db.Subject("", class_prompt, "", "dog"), True) == (caption, caption)


@pytest.mark.parametrize("class_prompt, live", [("a dog", True), ("a black Cat", True), ("a teapot", False),
                                                ("a stuffed animal", False), ("a teddy bear", False), ("a toy duck", False)])
def test_living_subjects_are_told_by_their_noun(class_prompt, live):
    assert db.is_live(class_prompt) is live


def test_subject_type_chooses_the_prompts(tmp_path):
    def prompts(base, **options):
        return db.usual_prompts(db.Settings("evaluate", **options), base, db.Subject("sks", "a dog", "", "dog"))

    assert prompts(tmp_path) == db.PROMPTS["live"]
    assert prompts(tmp_path, subject_type="object") == db.PROMPTS["object"]
    assert prompts(REPOSITORY / "demo" / "model") == db.read_prompts(db.BUNDLED_PROMPTS, "")
    assert prompts(REPOSITORY / "demo" / "model", subject_type="live") == db.PROMPTS["live"]


# ---- networks


def test_networks_embed_as_transformers_says(networks):
    from transformers import CLIPModel, ViTModel

    metrics = db.load_metrics(str(networks / "vit"), str(networks / "clip"), torch.device("cpu"))
    pictures = [picture(seed, size=(16, 16)) for seed in range(db.METRIC_BATCH + 2)]
    pixels = torch.tensor(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    dino, clip = metrics.images(pictures)
    with torch.no_grad():
        vit = ViTModel.from_pretrained(networks / "vit", add_pooling_layer=False)
        model = CLIPModel.from_pretrained(networks / "clip")
        assert torch.allclose(dino, normalize(vit(pixels).last_hidden_state[:, 0], dim=-1), atol=1e-4)
        assert torch.allclose(clip, normalize(model.get_image_features(pixels).pooler_output, dim=-1), atol=1e-4)
        one = torch.tensor([metrics.tokenizer("a red dog").input_ids])
        expected = normalize(model.get_text_features(one).pooler_output, dim=-1)
    texts = metrics.texts(["a red dog", "a dog on the moon in the city at night"])
    assert torch.allclose(texts[:1], expected, atol=1e-5)  # the padding beside a longer prompt changes nothing
    assert torch.allclose(texts.norm(dim=-1), torch.ones(2)) and dino.dtype == torch.float32


def test_dino_sees_what_its_own_evaluation_shows_it(networks, tmp_path, capsys):
    """The hub's preprocessor of facebook/dino-vits16 is not used as it is; other folders' are."""
    shutil.copytree(networks / "vit", tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(
        {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor", "resample": 2,
         "size": 224, **db.IMAGENET}))
    metrics = db.load_metrics(str(tmp_path / "vit"), str(networks / "clip"), torch.device("cpu"))
    assert "DINO's own evaluation" in capsys.readouterr().out
    image = picture(0, size=(640, 512))
    expected = image.resize((320, 256), Image.Resampling.BICUBIC).crop((48, 16, 272, 240))
    expected = (np.asarray(expected) / 255 - db.IMAGENET["image_mean"]) / db.IMAGENET["image_std"]
    pixels = metrics.prepare_dino([image], return_tensors="pt").pixel_values[0].permute(1, 2, 0).numpy()
    assert pixels.shape == (224, 224, 3) and np.abs(pixels - expected).max() < 1e-4
    db.load_metrics(str(networks / "vit"), str(networks / "clip"), torch.device("cpu"))
    assert "as its own preprocessor says" in capsys.readouterr().out


def test_networks_come_from_the_cache_first_and_only_as_safetensors():
    asked = []

    class Network(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, name, **options):
            asked.append(options)
            if options["local_files_only"]:
                raise OSError("not in the cache")
            return cls(), {"missing_keys": set()}

    db.load_network("--dino_model", "facebook/dino-vits16", Network)
    assert [options["local_files_only"] for options in asked] == [True, False]
    assert all(options["use_safetensors"] and options["revision"] == "refs/pr/1" for options in asked)


def test_lpips_measures_where_it_is_installed(monkeypatch):
    class Fake(torch.nn.Module):
        def __init__(self, net, verbose):
            assert net == "alex"
            super().__init__()

        def forward(self, a, b):
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # monkeypatch puts it back
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Fake))
    distance = db.load_lpips(torch.device("cpu"))
    assert distance(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)).tolist() == [1.0, 1.0]


def test_missing_lpips_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert db.load_lpips(torch.device("cpu")) is None
    assert "DIV: unavailable" in capsys.readouterr().out


# ---- the command


def test_two_models_are_compared_and_nothing_is_drawn_twice(evaluate, trained, tmp_path, photos):
    trained("output"), trained("other", seed=1)
    out, result = evaluate("--model_path", "output", "--model_path", "other")
    first, second = result["models"]
    assert [m["model_path"] for m in result["models"]] == ["output", "other"] and first["model_hash"] != second["model_hash"]
    assert first["pictures_drawn"] == second["pictures_drawn"] == 8  # two prompts of two, and as many of the class
    assert first["scores"] != second["scores"] and first["record"]["subjects"][0]["identifier"] == "sks"
    folder = tmp_path / "evaluation" / "output" / "dog"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [f"{n}-{seed}.png" for n in ("00-a-sks-dog-on-the-moon", "01-a-red-sks-dog") for seed in (0, 1)]
        + [f"class-{seed}.png" for seed in range(4)])
    assert db.png_parameters(folder / "01-a-red-sks-dog-1.png").startswith("a red sks dog\nSteps: 2, Sampler: PNDM")
    table = [line.split() for line in out.splitlines() if line.startswith(("real photos", "output ", "other "))]
    assert [row[:1] for row in table] == [["real"], ["output"], ["other"]]
    assert table[1][1:3] == [f"{first['scores'][name]:.3f}" for name in ("dino", "clip_i")]
    assert table[0][2] == f"{first['subjects'][0]['real']['dino']:.3f}"
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    (folder / "class-2.png").unlink()
    again = evaluate("--model_path", "output", "--model_path", "other")[1]
    assert [m["pictures_drawn"] for m in again["models"]] == [1, 0]
    assert [m["scores"] for m in again["models"]] == [m["scores"] for m in result["models"]]
    assert sum(p.stat().st_mtime_ns != before[p] for p in folder.iterdir()) == 1
    shutil.rmtree(tmp_path / "output")
    trained("output", seed=1)  # other weights of the same name: every picture is drawn anew
    assert evaluate("--model_path", "output", "--num_images", 1)[1]["models"][0]["pictures_drawn"] == 4
    assert not list((tmp_path / "evaluation").rglob("*.part"))


def test_scores_are_those_of_the_pictures_on_disk(evaluate, trained, tmp_path, photos, networks):
    trained("output")
    out, result = evaluate("--model_path", "output")
    metrics = db.load_metrics(str(networks / "vit"), str(networks / "clip"), torch.device("cpu"))
    folder = tmp_path / "evaluation" / "output" / "dog"

    def embedded(paths):
        return metrics.images([Image.open(path).convert("RGB") for path in paths])

    real = metrics.images([Image.open(path).crop((4, 0, 44, 40)) for path in sorted(photos.iterdir())])
    drawn, of_class = embedded(sorted(folder.glob("0*.png"))), embedded(sorted(folder.glob("class*.png")))
    captions = metrics.texts(["a dog on the moon", "a red dog"])
    raw = metrics.texts(["a sks dog on the moon", "a red sks dog"])
    scores = result["models"][0]["scores"]
    assert scores["dino"] == pytest.approx((drawn[0] @ real[0].T).mean().item(), abs=1e-5)
    assert scores["clip_i"] == pytest.approx((drawn[1] @ real[1].T).mean().item(), abs=1e-5)
    assert scores["pres"] == pytest.approx((of_class[0] @ real[0].T).mean().item(), abs=1e-5)
    assert scores["clip_t"] == pytest.approx((drawn[1] * captions.repeat_interleave(2, 0)).sum(1).mean().item(), abs=1e-5)
    assert scores["clip_t_raw"] == pytest.approx((drawn[1] * raw.repeat_interleave(2, 0)).sum(1).mean().item(), abs=1e-5)
    pairs = [torch.dot(drawn[0][i], drawn[0][i + 1]).item() for i in (0, 2)]
    assert scores["div_dino"] == pytest.approx(1 - sum(pairs) / 2, abs=1e-5) and scores["div"] is None
    entry = result["models"][0]["subjects"][0]
    assert entry["prompts"][1]["caption"] == "a red dog" and len(entry["prompts"][1]["files"]) == 2
    assert entry["real"]["dino"] == pytest.approx(((real[0] @ real[0].T).sum().item() - 3) / 6, abs=1e-5)
    sheet = Image.open(tmp_path / "evaluation" / "output" / "sheet.png")
    assert sheet.height == 3 * 34 and sheet.width == 300 + 3 * 34  # the photos and two prompts, 32 pixels and a gap each


def test_several_models_are_shown_side_by_side(evaluate, trained, tmp_path, tiny_model, photos):
    trained("output")
    out, result = evaluate("--model_path", "output", "--model_path", tiny_model("sd1"), "--instance_data_dir", photos,
                           "--class_prompt", "a dog", "--num_images", 1)
    sheet = Image.open(tmp_path / "evaluation" / "comparison.png")
    assert sheet.height == 3 * 34 and "comparison.png" in out
    for row in range(2):
        for column, (name, model) in enumerate(zip(("output", db.slug(str(tiny_model("sd1")))), result["models"])):
            path = tmp_path / "evaluation" / name / "dog" / model["subjects"][0]["prompts"][row]["files"][0]
            place = (300 + 34 * column, 34 * (row + 1))
            assert sheet.crop((*place, place[0] + 32, place[1] + 32)).tobytes() == Image.open(path).tobytes(), path
    evaluate("--model_path", "output", "--num_images", 1, "--eval_dir", "alone")
    assert not (tmp_path / "alone" / "comparison.png").exists()


def test_subjects_count_alike(evaluate, trained, tmp_path, photos):
    """Macro average: the mean of the subjects' scores, whatever the number of their photos."""
    trained("output")
    data = json.loads((tmp_path / "output" / "dreambooth.json").read_text())
    data["subjects"].append({**data["subjects"][0], "identifier": "ohwx", "name": "cat", "class_prompt": "a cat"})
    (tmp_path / "more").mkdir()
    for i in range(5):
        picture(10 + i).save(tmp_path / "more" / f"{i}.png")
    entries = [{"name": "dog", "instance_data_dir": "photos"}, {"name": "cat", "instance_data_dir": "more"}]
    (tmp_path / "two.json").write_text(json.dumps(entries))
    data["settings"] = {"instance_data_dir": None, "concepts": "two.json"}
    (tmp_path / "output" / "dreambooth.json").write_text(json.dumps(data))
    out, result = evaluate()  # where training found the photos
    model = result["models"][0]
    assert [len(entry["photos"]) for entry in model["subjects"]] == [3, 5]
    assert model["pictures_drawn"] == 16 and (tmp_path / "evaluation" / "output" / "cat").is_dir()
    for name in ("dino", "clip_i", "clip_t", "pres"):
        each = [entry["scores"][name] for entry in model["subjects"]]
        assert each[0] != each[1] and model["scores"][name] == pytest.approx(sum(each) / 2, abs=1e-12)
    real = [entry["real"]["dino"] for entry in model["subjects"]]
    row = next(line for line in out.splitlines() if line.startswith("real photos"))
    assert row.split()[2] == f"{sum(real) / 2:.3f}"
    (tmp_path / "two.json").unlink()
    entries[1]["instance_data_dir"] = "photos"
    (tmp_path / "moved.json").write_text(json.dumps(entries))
    again = evaluate("--concepts", "moved.json")[1]["models"][0]
    assert [len(entry["photos"]) for entry in again["subjects"]] == [3, 3] and again["pictures_drawn"] == 0


def test_a_model_without_record_is_measured_without_identifier(evaluate, tiny_model, photos):
    out, result = evaluate("--model_path", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt", "a dog")
    entry = result["models"][0]["subjects"][0]
    assert [row["prompt"] for row in entry["prompts"]] == ["a dog on the moon", "a red dog"]
    assert entry["scores"]["clip_t"] == entry["scores"]["clip_t_raw"] and "without an identifier" in out
    named = evaluate("--model_path", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt", "a dog",
                     "--identifier", "zqq")[1]["models"][0]
    assert named["subjects"][0]["prompts"][1]["prompt"] == "a red zqq dog"


@pytest.mark.parametrize("method, prompt", [("lora", "a red sks dog"), ("textual_inversion", "a red <dog>")])
def test_adapters_are_measured(method, prompt, evaluate, run, tiny_model, photos):
    assert run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, "--class_prompt", "a dog",
               "--steps", 2, "--num_class_images", 2, "--method", method, "--num_inference_steps", 1,
               *(["--identifier", "sks"] if method == "lora" else []))[0] == 0
    row = evaluate("--num_images", 1)[1]["models"][0]["subjects"][0]["prompts"][1]
    assert row["prompt"] == prompt and row["caption"] == "a red dog"


def test_the_bundled_model_has_its_own_metrics(tiny_model, tmp_path):
    s, demo = db.Settings("evaluate"), REPOSITORY / "demo"
    assert [db.Path(name).resolve() for name in db.metric_models(s, [str(demo / "model"), str(tiny_model("sd1"))])] == [
        demo / "metrics" / "vit", demo / "metrics" / "clip"]
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        config = {name: demo / "metrics" / part / "config.json" for name, part in (
            ("facebook/dino-vits16", "vit"), ("openai/clip-vit-base-patch32", "clip"))}
        patch.setattr(db, "hub_file", lambda name, file, **options: asked.append((name, options)) or config[name])
        assert db.metric_models(s, [str(demo / "model"), str(tmp_path)]) == tuple(config)
    assert [options["revision"] for _, options in asked] == ["refs/pr/1", "refs/pr/15"]  # where the hub has safetensors


def test_evaluate_imports_no_torch_to_complain(tmp_path, trained, networks, photos):
    """Every wrong input is one line and status 2, before torch is imported and before anything is written."""
    import subprocess

    trained("output"), trained("lost"), record(tmp_path / "lost", tmp_path / "nowhere")
    shutil.copytree(tmp_path / "output", tmp_path / "two")
    data = json.loads((tmp_path / "two" / "dreambooth.json").read_text())
    data["subjects"].append({**data["subjects"][0], "name": "cat", "identifier": "ohwx"})
    (tmp_path / "two" / "dreambooth.json").write_text(json.dumps(data))
    (tmp_path / "bad.txt").write_text("a [identifier] [class]\na dog\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "file").write_text("")
    plain = str(REPOSITORY / "demo" / "model")
    cases = [
        (["--model_path", "missing"], "--model_path missing"),
        (["--model_path", "lost"], "--instance_data_dir"),
        (["--model_path", "output", "--instance_data_dir", "gone"], "--instance_data_dir gone"),
        (["--model_path", plain], "no dreambooth.json"),
        (["--model_path", plain, "--instance_data_dir", "photos"], "--class_prompt is missing"),
        (["--model_path", "two"], "--concepts"),
        (["--model_path", "two", "--instance_data_dir", "photos"], "--concepts"),
        (["--prompts_file", "none.txt"], "--prompts_file none.txt"),
        (["--prompts_file", "bad.txt"], 'bad.txt: prompt 2, "a dog"'),
        (["--prompts_file", "empty.txt"], "no prompts"),
        (["--prompts_file", "bad.txt", "--subject_type", "live"], "leave one out"),
        (["--model_path", "two", "--identifier", "zqq"], "--identifier"),
        (["--dino_model", str(networks / "clip")], "of type clip; give one of type vit"),
        (["--clip_model", str(networks / "vit")], "of type vit; give one of type clip"),
        (["--dino_model", "photos"], "--dino_model photos"),
        (["--clip_model", "nobody/nothing"], "--clip_model nobody/nothing"),
        (["--eval_dir", "file"], "--eval_dir file"),
        (["--subject_type", "alien"], "--subject_type"),
        (["--steps", "3"], "--steps belongs to --train"),
        (["--lora_scale", "0.5"], "--lora_scale belongs to --infer"),
        (["--num_images", "0"], "--num_images 0"),
    ]
    script = (f"import sys, json; sys.path.insert(0, {str(REPOSITORY)!r}); import dreambooth_implementation as db\n"
              "for flags, _ in json.load(sys.stdin):\n    print(db.main(['--evaluate', *flags]))\n"
              "assert 'torch' not in sys.modules, 'torch was imported'")
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, input=json.dumps(cases), capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    complaints = result.stderr.splitlines()
    assert len(complaints) == len(cases), result.stderr
    for (flags, said), complaint in zip(cases, complaints):
        assert complaint.startswith("error: ") and said in complaint, (flags, complaint)
    assert [line for line in result.stdout.splitlines() if line.isdigit()] == ["2"] * len(cases)
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize("damage, flag", [
    ("vit/model.safetensors", "--dino_model"), ("clip/model.safetensors", "--clip_model"),
    ("clip/preprocessor_config.json", "--clip_model"), ("weights", "--dino_model")])
def test_networks_that_cannot_be_loaded_whole_are_refused(damage, flag, run, trained, networks, tmp_path, monkeypatch):
    trained("output")
    shutil.copytree(networks, tmp_path / "networks")
    if damage == "weights":  # transformers itself would make up what is missing
        from safetensors.torch import load_file, save_file

        path = tmp_path / "networks" / "vit" / "model.safetensors"
        tensors = load_file(path)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, path, {"format": "pt"})
    else:
        (tmp_path / "networks" / damage).unlink()
    monkeypatch.setattr(db, "load_pipeline", lambda *args: pytest.fail("the diffusion model was loaded first"))
    status, _, err = run("--evaluate", "--dino_model", "networks/vit", "--clip_model", "networks/clip")
    assert status == 2 and err.startswith(f"error: {flag} networks/") and err.count("\n") == 1, err


def test_an_interrupted_drawing_leaves_no_half_picture(evaluate, trained, tmp_path, monkeypatch):
    trained("output")
    save, saved = Image.Image.save, []

    def fail_at_third(image, path, *args, **options):
        save(image, path, *args, **options)
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", fail_at_third)
    with pytest.raises(AssertionError):
        evaluate("--model_path", "output")  # it ends with status 130
    folder = tmp_path / "evaluation" / "output" / "dog"
    assert len(list(folder.iterdir())) == 2 and not (tmp_path / "evaluation" / "evaluation.json").exists()
    monkeypatch.setattr(Image.Image, "save", save)
    assert evaluate("--model_path", "output")[1]["models"][0]["pictures_drawn"] == 6


def test_infer_takes_one_model(run, trained):
    trained("output"), trained("other")
    status, _, err = run("--infer", "--model_path", "output", "--model_path", "other", "--prompt", "a dog")
    assert status == 2 and "--adapter" in err


def test_the_real_row_of_held_out_subjects(tmp_path):
    """With the bundled networks: pictures of one drawing are alike, those of another are not."""
    demo = REPOSITORY / "demo"
    metrics = db.load_metrics(str(demo / "metrics" / "vit"), str(demo / "metrics" / "clip"), torch.device("cpu"))
    robot, poodle = (metrics.images([db.load_square(path) for path in sorted((demo / "subjects" / name).glob("*.png"))])[0]
                     for name in ("robot-t", "poodle-b"))
    without, with_self = db.real_row(robot)
    assert 0.6 < without < with_self < 1 and db.mean_similarity(robot, poodle) < without - 0.3

"""--evaluate: what is wrong is said before anything slow, and subjects count alike."""

import json
import shutil

import pytest
from conftest import REPOSITORY, picture, record
from without_torch import answers


def test_subjects_count_alike(evaluate, recorded, tmp_path, photos):
    """Macro average: the mean of the subjects' scores, whatever the number of their photos."""
    recorded("output")
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


def test_evaluate_imports_no_torch_to_complain(tmp_path, recorded, networks, photos):
    """Every wrong input is one line and status 2, before torch is imported and before anything is written."""
    recorded("output"), recorded("lost"), record(tmp_path / "lost", tmp_path / "nowhere")
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
    for (flags, said), (status, _, err) in zip(cases, answers(tmp_path, [["--evaluate", *flags] for flags, _ in cases])):
        assert status == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1, (flags, status, err)
    assert not (tmp_path / "evaluation").exists()

"""Which models are evaluated, on which subjects and with which words."""

import pytest
from PIL import Image

import dreambooth_implementation as db


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


@pytest.mark.parametrize("flags", [[], ["--mask", "none"]])
def test_photos_are_measured_where_their_mask_is(flags, run, tiny_model, tmp_path):
    """A square on the right is the subject; a larger one on the left stands out more."""
    photo, mask = Image.new("RGB", (96, 32), "white"), Image.new("L", (96, 32))
    photo.paste("black", (0, 0, 32, 32))
    photo.paste("red", (72, 8, 88, 24))
    mask.paste(255, (72, 8, 88, 24))
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "a.png")
    mask.save(tmp_path / "photos" / "a.mask.png")
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", "photos", "--class_prompt", "a dog", "--steps", 1,
                         "--no-with_prior_preservation", "--no-samples", "--method", "lora", *flags)
    assert status == 0, err
    (candidate,) = db.find_candidates(db.parse_settings(["--evaluate", "--model_path", "output"]))
    (seen,) = db.photos_of(candidate.trials[0])
    assert seen.size == (32, 32)
    assert (seen.tobytes() == photo.crop((64, 0, 96, 32)).tobytes()) == (not flags)

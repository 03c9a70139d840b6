"""What an evaluation shows side by side."""

from PIL import Image

import dreambooth_implementation as db


def test_several_models_are_shown_side_by_side(evaluate, recorded, tmp_path, tiny_model, photos):
    recorded("output")
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

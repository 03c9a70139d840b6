"""One line and status 2 for whatever can be told wrong before torch is imported."""

import json

import pytest
from conftest import REPOSITORY, picture
from without_torch import answers

WRONG = [
    ([], "--train"),
    (["--train", "--infer"], "not allowed"),
    (["--train", "--steps", "0"], "--steps 0"),
    (["--train", "--steps", "many"], "--steps"),
    (["--train", "--learning_rate", "nan"], "--learning_rate nan"),
    (["--train", "--resolution", "500"], "--resolution 500"),
    (["--train", "--prior_loss_weight", "-1"], "--prior_loss_weight -1"),
    (["--train", "--lr_scheduler", "wavy"], "--lr_scheduler"),
    (["--train", "--no_such_flag"], "--no_such_flag"),
    (["--train", "--prompt", "a dog"], "--prompt belongs to --infer"),
    (["--infer", "--steps", "30"], "--steps belongs to --train"),
    (["--infer", "--num_images", "0"], "--num_images 0"),
    (["--infer", "--seed", "99999999999999999999"], "--seed"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a dog", "--image_dir", "file"], "--image_dir"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a dog", "--negative_prompt", "[identifier]"], "dreambooth.json"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a [identifier] dog"], "--class_prompt"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--class_data_dir", "file"], "--class_data_dir"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--output_dir", "file/sub"], "--output_dir"),
    (["--infer"], "--train first"),
    (["--infer", "--model_path", "nowhere"], "--model_path nowhere"),
    (["--infer", "--model_path", "text_model"], "KandinskyPipeline"),
    (["--infer", "--model_path", "{demo}"], "--prompt is missing"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a [identifier] dog"], "dreambooth.json"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a dog", "--adapter", "nowhere"], "--adapter nowhere"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a dog", "--adapter", "nowhere.safetensors=0.5"], "nowhere.safetensors"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a dog", "--adapter", "{demo}"], "not a LoRA"),
    (["--infer", "--model_path", "{demo}", "--prompt", "a dog", "--model_name", "{demo}"], "needs no base"),
    (["--infer", "--model_path", "{demo}/unet/diffusion_pytorch_model.safetensors", "--prompt", "a dog"], "neither a LoRA"),
    (["--infer", "--model_path", "lost_lora", "--prompt", "a dog"], "pytorch_lora_weights.safetensors is missing"),
    (["--train", "--instance_data_dir", "nowhere"], "--instance_data_dir nowhere"),
    (["--train", "--instance_data_dir", "empty"], "no images"),
    (["--train", "--instance_data_dir", "text_as_jpg"], "fake.jpg"),
    (["--train", "--instance_data_dir", "truncated"], "cut.jpg"),
    (["--train", "--instance_data_dir", "good"], "--class_prompt is missing"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", " "], "--class_prompt is empty"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--identifier", "two words"], "--identifier"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--model_name", "no/such/folder"], "--model_name"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--model_name", "nobody/nothing"], "--model_name"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--model_name", "good"], "model_index.json"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--model_name", "{demo}", "--output_dir", "good"],
     "--output_dir good"),
    (["--train", "--instance_data_dir", "good", "--class_prompt", "a dog", "--model_name", "{demo}", "--output_dir", "file"],
     "--output_dir file"),
]


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """What the program answers to each of WRONG, in order, and the folder it was in."""
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("empty", "text_as_jpg", "truncated", "good", "text_model"):
        (folder / name).mkdir()
    (folder / "text_as_jpg" / "fake.jpg").write_text("not a picture")
    picture(0).save(folder / "truncated" / "whole.jpg")
    (folder / "truncated" / "cut.jpg").write_bytes((folder / "truncated" / "whole.jpg").read_bytes()[:-200])
    for i in range(3):
        picture(i).save(folder / "good" / f"{i}.png")
    (folder / "file").write_text("")
    (folder / "text_model" / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    (folder / "lost_lora").mkdir()
    subject = {"identifier": "phol", "class_prompt": "a dog", "instance_prompt": "a phol dog", "name": "dog"}
    (folder / "lost_lora" / "dreambooth.json").write_text(json.dumps({"method": "lora", "subjects": [subject]}))
    demo = REPOSITORY / "demo" / "model"
    return answers(folder, [[flag.format(demo=demo) for flag in flags] for flags, _ in WRONG]), folder


@pytest.mark.parametrize("number", range(len(WRONG)), ids=lambda number: " ".join(WRONG[number][0]))
def test_wrong_input_is_one_line_and_status_2(number, answered):
    (status, _, err), said = answered[0][number], WRONG[number][1]
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: ") and said in err, (status, err)


def test_wrong_input_leaves_nothing(answered):
    assert not (answered[1] / "output").exists() and not (answered[1] / "class_images").exists()

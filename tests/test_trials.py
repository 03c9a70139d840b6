"""Which models are evaluated, on which subjects and with which words."""

import pytest


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

"""Flags become settings; what makes no sense is refused."""


import pytest
from without_torch import answers

import dreambooth_implementation as db


def test_command_line_makes_settings():
    s = db.parse_settings(["--train", "--max_train_steps", "7", "--learning_rate", "2e-5", "--no-with_prior_preservation",
                           "--train_text_encoder", "--validation_prompt", "a", "--validation_prompt", "b"])
    assert (s.mode, s.steps, s.learning_rate) == ("train", 7, 2e-5)
    assert s.with_prior_preservation is False and s.train_text_encoder
    assert s.validation_prompt == ["a", "b"]
    assert s.method == "full" and s.prior_loss_weight == 1.0 and s.num_class_images == 200 and not s.random_flip


def test_settings_cannot_change():
    with pytest.raises(AttributeError):
        db.parse_settings(["--train"]).steps = 3


def test_help_does_not_import_torch(tmp_path):
    (status, out, err), = answers(tmp_path, [["--help"]])
    assert status == 0 and err == ""
    assert all(f"--{flag}" in out for flag in ("train", "infer", "evaluate", "class_prompt", "num_images"))


@pytest.mark.parametrize("flags, said", [
    (["--rank", "4"], "--rank has no meaning with --method full"),
    (["--method", "textual_inversion", "--train_text_encoder"], "--train_text_encoder has no meaning"),
    (["--method", "lora", "--num_vectors", "2"], "--num_vectors has no meaning with --method lora"),
    (["--method", "dreambooth"], "--method"),
    (["--concepts", "concepts.json", "--class_prompt", "a dog"], "--class_prompt: with --concepts"),
    (["--concepts", "nothing.json"], "--concepts nothing.json"),
])
def test_flags_of_other_methods_are_refused(run, flags, said):
    status, _, err = run("--train", *flags)
    assert status == 2 and err.count("\n") == 1 and said in err, err

"""What a training will be, where the flags leave it open."""

from training_runs import need


def test_prodigy_has_one_rate(flags, run):
    need("prodigy")
    status, _, err = run(*flags("lora"), "--optimizer", "prodigy", "--learning_rate", 0.5)
    assert status == 2 and err.splitlines()[-1].endswith("unet_lora 0.5, text_encoder_lora 1"), err

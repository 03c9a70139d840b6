"""New words of a tokenizer and its text encoder."""

import pytest
import torch
from training_runs import QUICK

import dreambooth_implementation as db


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_vector_is_looked_up_wherever_its_word_stands(family, tiny_model):
    """The conditioning with trained vectors equals that of a vocabulary whose table holds the same vectors."""
    models = db.load_models(str(tiny_model(family)), torch.float32)
    s = db.Settings("train", method="textual_inversion", num_vectors=2)
    group = db.new_words(s, models, [db.Subject("<rex>", "a dog", "")], db.Recipe(1, embedding_lr=1.0))
    prompts = ["a <rex> dog and <rex> on the moon", "a dog"]
    with torch.no_grad():
        initial, _ = db.encode_prompts(models, prompts)
        for rows in group.parameters:
            rows += torch.randn_like(rows)
        trained, pooled = db.encode_prompts(models, prompts)
    group.finish()
    with torch.no_grad():
        finished, pooled_after = db.encode_prompts(models, prompts)
    assert torch.equal(trained, finished) and (pooled is None or torch.equal(pooled, pooled_after))
    assert torch.equal(initial[1], trained[1]) and not torch.equal(initial[0], trained[0])


def test_a_word_of_the_vocabulary_is_no_new_word(run, tiny_model, photos):
    status, _, err = run("--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, *QUICK,
                         "--method", "textual_inversion", "--identifier", "cat")
    assert status == 2 and '"cat" is in this model' in err and err.count("\n") == 1

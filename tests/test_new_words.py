"""New words: what they start as, and when they rest."""

import re

import torch

import dreambooth_implementation as db


def test_words_start_as_the_class_noun(tiny_model, photos):
    models = db.load_models(str(tiny_model("sdxl")), torch.float32)
    s = db.Settings("train", method="textual_inversion", num_vectors=2)
    group = db.new_words(s, models, [db.Subject("<rex>", "a teddy bear", "")], db.Recipe(1, embedding_lr=1.0))
    for tokenizer, text_encoder, rows in zip(models.tokenizers, models.text_encoders, group.parameters):
        table = text_encoder.get_input_embeddings().weight
        teddy, bear = (table[tokenizer(word, add_special_tokens=False).input_ids[0]] for word in ("teddy", "bear"))
        assert torch.equal(rows, torch.stack([teddy, bear])) and rows.requires_grad and not table.requires_grad
        assert tokenizer.tokenize("a <rex> <rex>_1") == ["a</w>", "<rex>", "<rex>_1"]


def test_words_of_pivotal_tuning_start_as_different_rare_words(tiny_model, capsys):
    subjects = [db.Subject("<rex>", "a dog", ""), db.Subject("<tom>", "a cat", "")]
    recipe = db.Recipe(1, embedding_lr=1.0)

    def started(**options):
        db.say_once.cache_clear()
        models = db.load_models(str(tiny_model("sd1")), torch.float32)
        rows, = db.pivotal_words(db.Settings("train", method="pivotal", **options), models, subjects, recipe).parameters
        said = re.findall(r'New word "<\w+>" starts as "(\w+)"', capsys.readouterr().out)
        ids = [models.tokenizers[0](word, add_special_tokens=False).input_ids for word in said]
        table = models.text_encoders[0].get_input_embeddings().weight
        assert len(ids) == 2 and torch.equal(rows, table[sum(ids, [])])
        return said
    words = {tuple(started(seed=seed)) for seed in range(4)}
    assert len(words) > 1 and all(a != b and {a, b} <= set(db.RARE_WORDS.split()) for a, b in words)
    assert started(initializer_token="dog") == ["dog", "dog"]


def test_words_rest_after_their_part_of_a_pivotal_run(train_adapter, monkeypatch):
    rows, step = [], torch.optim.lr_scheduler.LambdaLR.step

    def watched(schedule, *args):
        rows.append(schedule.optimizer.param_groups[0]["params"][0].detach().clone())
        return step(schedule, *args)

    monkeypatch.setattr(torch.optim.lr_scheduler.LambdaLR, "step", watched)
    out = train_adapter("sd1", "pivotal", "--steps", 8, "--embedding_frac", "0.5")
    assert "new_words, 32 weights, learning rate 0.1, 4 steps" in out
    rows = rows[-8:]
    assert all(not torch.equal(rows[i], rows[i + 1]) for i in range(3))
    assert all(torch.equal(rows[3], later) for later in rows[4:])

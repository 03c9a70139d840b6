"""Whatever combination of flags is given: it trains, or one line says why not. Never a traceback, never half an output."""

import shutil

from conftest import FAMILIES
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

FLAGS = {  # flag -> values, good and bad
    "--method": ["full", "lora", "textual_inversion", "pivotal"],
    "--steps": ["1", "2", "3", "0"],
    "--resolution": ["32", "40", "64", "33"],
    "--train_batch_size": ["1", "3"],
    "--gradient_accumulation_steps": ["1", "2"],
    "--learning_rate": ["0", "1e-4", "1e3", "-1"],
    "--text_encoder_lr": ["1e-4"],
    "--embedding_lr": ["1e-3", "nan"],
    "--embedding_frac": ["0", "0.5", "1"],
    "--num_vectors": ["1", "3"],
    "--initializer_token": ["cat", "hippopotamus", "", "[identifier]"],
    "--rank": ["1", "4", "64"],
    "--lora_alpha": ["1", "8"],
    "--lora_target": ["attention", "attention+ff", "all"],
    "--lr_scheduler": ["constant", "constant_with_warmup", "linear", "cosine", "warmup_stable_decay"],
    "--lr_warmup_steps": ["0", "1", "5"],
    "--max_grad_norm": ["0", "1", "1e-9"],
    "--snr_gamma": ["0", "5", "inf"],
    "--prior_loss_weight": ["0", "1", "1e9"],
    "--adam_weight_decay": ["0", "0.5"],
    "--num_class_images": ["1", "2"],
    "--mixed_precision": ["no", "bf16", "auto", "fp16"],
    "--identifier": ["sks", "<my dog>", "<dog>", "dog", "auto", "ü", "../x", "[identifier]"],
    "--class_prompt": ["a dog", "an owl on a hill", "dog", "the dog's bowl", "🐕", "a [identifier] dog", " ",
                       "../../etc/passwd"],
    "--instance_prompt": ["a [identifier] dog", "a photo of sks dog", "[identifier]", "a dog", "a [identifier:rex] dog"],
    "--validation_steps": ["1", "2"],
    "--checkpointing_steps": ["0", "1"],
    "--seed": ["0", "4294967295", "-5"],
    "--guidance_scale": ["0", "1", "7.5"],
    "--class_guidance_scale": ["0", "1", "7.5"],
}
SWITCHES = ["--train_text_encoder", "--use_dora", "--no-with_prior_preservation", "--with_prior_preservation", "--random_flip",
            "--gradient_checkpointing", "--overwrite", "--resume"]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(family=st.sampled_from(FAMILIES), names=st.lists(st.sampled_from(sorted(FLAGS)), unique=True, max_size=5),
       switches=st.lists(st.sampled_from(SWITCHES), unique=True, max_size=2), data=st.data())
def test_every_combination_trains_or_is_refused(family, names, switches, data, tiny_model, photos, run, tmp_path):
    usual = {"--steps": "2", "--class_prompt": "a dog", "--num_class_images": "1"}
    flags = usual | {name: data.draw(st.sampled_from(FLAGS[name]), label=name) for name in names}
    words = [word for pair in flags.items() for word in pair]
    status, out, err = run("--train", "--model_name", tiny_model(family), "--instance_data_dir", photos,
                           "--num_inference_steps", 1, *[f"{name}={value}" for name, value in flags.items()], *switches)
    event("trained" if status == 0 else "refused")
    if status == 0:
        assert (tmp_path / "output" / "dreambooth.json").is_file() and not (tmp_path / "output.partial").exists()
    else:
        last = err.splitlines()[-1]
        assert status == 2 and last.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err, (words, err)
        assert not (tmp_path / "output.partial" / "model_index.json").exists()
    shutil.rmtree(tmp_path / "output", ignore_errors=True)
    shutil.rmtree(tmp_path / "output.partial", ignore_errors=True)
    assert {path.name for path in tmp_path.iterdir()} <= {"photos", "class_images", "output-1"}, list(tmp_path.iterdir())

"""Drawing what a model to evaluate lacks, and measuring all of it."""

import dataclasses
import hashlib
import time

from PIL import PngImagePlugin

from dreambooth.base import say, slug
from dreambooth.decode import load_image
from dreambooth.drawing.draw import draw, placed, sampling_settings
from dreambooth.drawing.foreign import lora_files
from dreambooth.drawing.pipeline import load_trained
from dreambooth.drawing.start import begun_as, start_of
from dreambooth.evaluation.scores import mean_distance, mean_scores, mean_similarity, prompt_scores, real_row
from dreambooth.evaluation.sheets import photos_of
from dreambooth.files import whole_file
from dreambooth.images import png_parameters
from dreambooth.models.families.known import guidance_scale, own_size


def picture_jobs(s, trial):
    """[(file, prompt, seed)] of a trial: --num_images of every prompt, then as many class pictures as those together."""
    jobs = [(f"{number:02d}-{slug(prompt)[:80]}-{seed}.png", prompt, seed)
            for number, (prompt, _) in enumerate(trial.prompts) for seed in range(s.seed, s.seed + s.num_images)]
    return jobs + [(f"class-{seed}.png", trial.subject.class_prompt, seed) for seed in range(s.seed, s.seed + len(jobs))]


def draw_candidate(s, candidate, plan):
    """Draw what a candidate's folder lacks; (model hash, pictures drawn, seconds).

    A picture is there if its text chunk says that these weights drew it in this way.
    """
    started = time.monotonic()
    prompts = sorted({prompt for trial in candidate.trials for _, prompt, _ in picture_jobs(s, trial)})
    begun = begun_as(s, candidate.trained.subjects, prompts)
    models = load_trained(s, candidate.base, candidate.trained, [], plan, prompts + begun)
    pipeline, model_hash = placed(models.pipeline, plan.device), hash_of(models, candidate.trained)
    start = start_of(s, candidate.base, candidate.trained, [], pipeline, plan)
    side = (candidate.trained.record.get("used", {}).get("resolution")
            or min(own_size(pipeline)))
    look = {**sampling_settings(s, pipeline, start), "Size": f"{side}x{side}", "Model": candidate.name, "Model hash": model_hash}
    missing = []
    for trial in candidate.trials:
        folder = candidate.folder / trial.subject.name
        folder.mkdir(parents=True, exist_ok=True)
        for name, prompt, seed in picture_jobs(s, trial):
            text = f"{prompt}\n" + ", ".join(f"{key}: {value}" for key, value in {**look, "Seed": seed}.items())
            if png_parameters(folder / name) != text:
                missing.append((folder / name, prompt, seed, text))
    total = sum(len(picture_jobs(s, trial)) for trial in candidate.trials)
    say(f"{candidate.name}: {total - len(missing)} of {total} pictures are in {candidate.folder}"
        + (f"; drawing {len(missing)}." if missing else "."))
    if missing:
        draw_missing(s, models, missing, side, start)
    return model_hash, len(missing), time.monotonic() - started


def hash_of(models, trained):
    """Ten hex digits that tell the weights that draw from any others."""
    if not models.book:
        return models.fingerprint[:10]
    files = lora_files(trained.lora) if trained.lora else []
    told = [models.fingerprint, models.base_precision, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)]
    return hashlib.sha256(" ".join(told).encode()).hexdigest()[:10]


def draw_missing(s, models, missing, side, start):
    """Draw each (file, prompt, seed, what its text chunk shall say) of `missing`, `side` pixels square."""
    drawn = draw(models.pipeline, [(prompt, seed) for _, prompt, seed, _ in missing], steps=s.num_inference_steps, height=side,
                 width=side, guidance_scale=guidance_scale(s, models.pipeline), batch_size=s.sample_batch_size, models=models,
                 start=start)
    for picture, (path, _, _, text) in zip(drawn, missing):
        chunk = PngImagePlugin.PngInfo()
        chunk.add_itxt("parameters", text)
        with whole_file(path) as part:
            picture.save(part, format="PNG", pnginfo=chunk)


def measure_trial(s, candidate, trial, metrics, distance):
    """A trial's entry in evaluation.json: its scores, its photos' and those of every prompt."""
    folder = candidate.folder / trial.subject.name
    files = [name for name, _, _ in picture_jobs(s, trial)]
    count = len(trial.prompts) * s.num_images
    pictures = [load_image(folder / name) for name in files]
    real, all_drawn = metrics.images(photos_of(trial)), metrics.images(pictures)
    raw_captions, captions = map(metrics.texts, zip(*trial.prompts))
    rows = []
    for number, (prompt, caption) in enumerate(trial.prompts):
        mine, row = slice(number * s.num_images, (number + 1) * s.num_images), slice(number, number + 1)
        scores = prompt_scores([part[mine] for part in all_drawn], real, captions[row], raw_captions[row])
        rows.append({"prompt": prompt, "caption": caption, "files": files[mine],
                     "scores": {**scores, "div": mean_distance(pictures[mine], distance)}})
    scores = {**mean_scores([row["scores"] for row in rows]), "pres": mean_similarity(all_drawn[0][count:], real[0])}
    (dino, dino_self), (clip, clip_self) = map(real_row, real)
    return {**dataclasses.asdict(trial.subject), "photos": [str(path) for path in trial.photos], "scores": scores,
            "real": {"dino": dino, "clip_i": clip}, "real_with_self_pairs": {"dino": dino_self, "clip_i": clip_self},
            "prompts": rows}

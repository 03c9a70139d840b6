"""--select_best: the samples are scored, and the best weights kept."""

import shutil

from dreambooth.base import say
from dreambooth.evaluation.scores import harmonic_mean, mean_scores, mean_similarity
from dreambooth.files import save_tensors, whole_file
from dreambooth.methods.groups import trained_tensors
from dreambooth.training.checkpoints import best_file, best_files, checkpoints_in
from dreambooth.training.run import best_of

SEEDS_SEEN = 4  # pictures of each prompt, unless --num_validation_images says otherwise


def score_samples(viewer, pictures, seed):
    """{"dino", "clip_t", "score"} of {(prompt, seed): picture}: means over subjects, and their harmonic mean."""
    rows = {}
    for number, prompt, caption in viewer.scored:
        dino, clip = viewer.metrics.images([pictures[prompt, seed + i] for i in range(viewer.pictures)])
        rows.setdefault(number, []).append({"dino": mean_similarity(dino, viewer.real[number]),
                                            "clip_t": mean_similarity(clip, viewer.metrics.texts([caption]))})
    means = mean_scores([mean_scores(of_subject) for of_subject in rows.values()])
    return {**means, "score": harmonic_mean(**means)}


def save_best(run, folder):
    """Save the weights if they scored best, and delete what is best neither now nor for a training resumed from here."""
    saved = int(checkpoints_in(folder)[-1].name.removeprefix("step-")) if checkpoints_in(folder) else 0
    needed = {best_of(scores)["step"] for scores in (run.scores, [r for r in run.scores if r["step"] <= saved]) if scores}
    if run.scores[-1]["step"] in needed:
        (folder / "checkpoints").mkdir(exist_ok=True)
        with whole_file(best_file(folder, run.scores[-1]["step"])) as part:
            save_tensors(trained_tensors(run.groups), part)
    for path in best_files(folder):
        if path not in [best_file(folder, step) for step in needed]:
            path.unlink()


def bring_best(run, checkpoint, folder):
    """Have the best weights of the steps before lie in this training's folder, too, where it goes on from a checkpoint elsewhere."""
    before, here = (best_file(place, best_of(run.scores)["step"]) for place in (checkpoint.parent.parent, folder))
    if not here.is_file():
        here.parent.mkdir(exist_ok=True)
        with whole_file(here) as part:
            shutil.copyfile(before, part)


def keep_best(run, folder):
    """Put the best weights back into what trained, and say how the scores went."""
    from safetensors.torch import load_file

    best = best_of(run.scores)
    say(f"{'step':>6}{'DINO':>8}{'CLIP-T':>8}{'mean':>8}")
    for row in run.scores:
        near = row["score"] >= 0.97 * best["score"]
        word = "good" if near else "too few steps" if row["step"] < best["step"] else "overfitted"
        say(f"{row['step']:>6}{row['dino']:>8.3f}{row['clip_t']:>8.3f}{row['score']:>8.3f}  "
            f"{'best, kept' if row is best else word}")
    if run.accelerator.is_main_process:
        saved = load_file(best_file(folder, best["step"]))
        for name, tensor in trained_tensors(run.groups).items():
            tensor.copy_(saved[name])
        for path in best_files(folder):
            path.unlink()
        if not checkpoints_in(folder):
            (folder / "checkpoints").rmdir()

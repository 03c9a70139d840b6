"""--evaluate: measure what was trained with the paper's metrics."""

import dataclasses
import json
import time
from importlib.metadata import version
from pathlib import Path

from dreambooth.base import say
from dreambooth.device import machine_name, plan_device
from dreambooth.drawing.room import check_bits
from dreambooth.evaluation.measure import draw_candidate, measure_trial
from dreambooth.evaluation.networks import load_lpips, load_metrics, metric_models
from dreambooth.evaluation.scores import mean_scores
from dreambooth.evaluation.sheets import comparison_sheet, contact_sheet, score_table
from dreambooth.evaluation.trials import find_candidates
from dreambooth.files import check_writable, whole_file


def evaluate(s):
    """Measure --model_path with the paper's metrics (paper section 4.1 and its ablations).

    Pictures, contact sheets and evaluation.json go to --eval_dir; nothing is drawn twice.
    """
    check_writable(s.eval_dir, "--eval_dir")
    candidates = find_candidates(s)
    names = metric_models(s, [candidate.base for candidate in candidates])
    plan = plan_device(s)
    for candidate in candidates:
        check_bits(s, candidate.base, [candidate.trained], plan)
    metrics, distance = load_metrics(*names, plan.device), load_lpips(plan.device)
    if (count := min(len(trial.prompts) for candidate in candidates for trial in candidate.trials) * s.num_images) < 100:
        say(f"Note: {count} pictures of a subject, and as many of its class; the paper's protocol has 100.")
    alike = len({tuple(trial.photos for trial in candidate.trials) for candidate in candidates}) == 1
    if not alike:
        say("Note: these models have different subjects; each row of the table is the mean over its own.")
    results = []
    for candidate in candidates:
        model_hash, drawn, drawing = draw_candidate(s, candidate, plan)
        started = time.monotonic()
        subjects = [measure_trial(s, candidate, trial, metrics, distance) for trial in candidate.trials]
        with whole_file(candidate.folder / "sheet.png") as part:
            contact_sheet(candidate, subjects).save(part, format="PNG")
        results.append({"model_path": candidate.name, "model_hash": model_hash, "record": candidate.trained.record,
                        "scores": mean_scores([subject["scores"] for subject in subjects]), "subjects": subjects,
                        "pictures_drawn": drawn, "seconds": {"drawing": round(drawing, 1),
                                                             "measuring": round(time.monotonic() - started, 1)}})
    sheets = [candidate.folder / "sheet.png" for candidate in candidates]
    if alike and len(candidates) > 1:
        sheets.append(Path(s.eval_dir) / "comparison.png")
        with whole_file(sheets[-1]) as part:
            comparison_sheet(candidates, results).save(part, format="PNG")
    record = {"dino_model": names[0], "clip_model": names[1], "models": results, "settings": dataclasses.asdict(s),
              "machine": machine_name(plan.device), "precision": plan.precision,
              "versions": {p: version(p) for p in ("torch", "diffusers", "transformers")}}
    with whole_file(Path(s.eval_dir) / "evaluation.json") as part:
        part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    say("\n".join(["", *score_table(results), ""]))
    say("DINO, CLIP-I: likeness to the photos; CLIP-T: to the prompt (raw: with its identifier); DIV: how the pictures of a "
        "prompt differ. More is better. PRES: likeness of the plain class to the photos; less is better.")
    say(f"Everything is in {Path(s.eval_dir) / 'evaluation.json'}; a look at it: "
        + ", ".join(map(str, sheets)))

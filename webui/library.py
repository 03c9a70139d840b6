"""What was trained, as cards: what the program's dreambooth.json says, samples, and scores of comparisons."""

import json
import re
from pathlib import Path

import dreambooth_implementation as db
from webui.guard import Refusal

TITLE, LONGEST_TITLE = "title.txt", 80
_read = {}  # {path: (when it was written, what it says)}


def read_json(path):
    """A file of JSON, read again only when it has changed; {} where there is none, or none that can be read."""
    try:
        written = path.stat().st_mtime_ns
        if _read.get(path, (None,))[0] != written:
            value = json.loads(path.read_text(encoding="utf-8"))
            _read[path] = written, value if isinstance(value, dict) else {}
        return _read[path][1]
    except (OSError, ValueError):
        return {}


def title_of(item):
    """What a person calls it: the folder keeps its name, as paths in its files lead there."""
    try:
        return (item.place / TITLE).read_text(encoding="utf-8").strip() or item.id
    except (OSError, TypeError):
        return item.id.removeprefix("./")


def rename(item, title):
    """Call an item by another name."""
    title = " ".join(str(title).split())
    if not title or len(title) > LONGEST_TITLE or not title.isprintable():
        raise Refusal("bad_title", longest=LONGEST_TITLE)
    if item.place is None:
        raise Refusal("not_ours")
    (item.place / TITLE).write_text(title, encoding="utf-8")


def record_of(item):
    """Its dreambooth.json; {} if it is not finished, or if that cannot be read."""
    record = read_json(item.output / "dreambooth.json")
    try:
        return record if record["subjects"][0]["identifier"] and record["method"] in db.METHODS else {}
    except (LookupError, TypeError):
        return {}


def card(library, item, scores):
    """All that the page shows of an item. `scores` are those of scores_of()."""
    record, job = record_of(item), item.job
    subjects = record.get("subjects") or [{}]
    settings, used = record.get("settings", {}), record.get("used", {})
    stem = item.id.removeprefix("./")
    return {
        "id": item.id, "title": title_of(item), "output": str(item.output), "own": item.place is not None,
        "trained": bool(record), "state": job.state() if job and job.is_whole else None,
        "job": job.folder.relative_to(library.root).as_posix() if job else None,
        "words": [subject.get("identifier") for subject in subjects if subject], "prompt": open_prompt(subjects[0]),
        "class_prompt": subjects[0].get("class_prompt") or (job.command.get("fields", {}).get("class_prompt") if job else None),
        "method": record.get("method") or (job.command.get("fields", {}).get("method") or "full" if job else None),
        "model": name_of_model(record.get("base_model", "")), "steps": used.get("selected_step") or used.get("steps"),
        "resolution": used.get("resolution"), "seed": settings.get("seed"), "seconds": record.get("seconds", {}).get("training"),
        "date": (item.output / "dreambooth.json").stat().st_mtime if record else None,
        "picture": library.url(best_picture(item, subjects[0]) if record else newest_picture(item)),
        "scores": scores.get(str(item.output), {}), "goes_on": how_to_go_on(item)[0] if record else None,
        "exported": [{"name": path.name, "url": library.url(path)} for path in sorted(library.exported.glob("*.safetensors"))
                     if path.stem == stem or path.stem.startswith(f"{stem}-") and path.stem.removeprefix(f"{stem}-") in
                     [subject.get("name") for subject in subjects]]}


def name_of_model(base):
    """A hub id as it is, the bundled model as it is called, a folder by its name, an item's output by the item's."""
    path = Path(base)
    if not base or not path.exists():
        return base
    if path.resolve() == db.BUNDLED_MODEL.resolve():
        return "demo"
    return path.parent.name if path.name == "output" else path.name


def open_prompt(subject):
    """How a prompt names the subject: "a [identifier] dog"."""
    prompt, word = subject.get("instance_prompt", ""), subject.get("identifier") or "\0"
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", lambda match: "[identifier]", prompt)


def best_picture(item, subject):
    """A sample to know it by: of the subject on the moon, else of the subject, else any."""
    samples, prompt = item.output / "samples", subject.get("instance_prompt", "")
    for name in (f"{db.slug(f'{prompt} on the moon')}-*.png", f"{db.slug(prompt)}-*.png", "grid*.png"):
        if found := sorted(samples.glob(name)):
            return found[0]
    return item.output / db.PHOTO_SHEET


def newest_picture(item):
    """What shows how an unfinished training goes."""
    steps = sorted(item.partial.glob("samples/step-*"))
    samples = sorted(steps[-1].glob("*.png"), key=lambda path: not path.name.startswith("01-")) if steps else []  # "on the moon"
    return samples[0] if samples else item.partial / db.PHOTO_SHEET


def samples_of(library, item):
    """[{step, pictures}] of the samples on the way, and those of the end with the step None."""
    folder = next((place / "samples" for place in (item.partial, item.output) if (place / "samples").is_dir()), None)
    if folder is None:
        return []
    rows = [(int(path.name.removeprefix("step-")), path.glob("*.png")) for path in folder.glob("step-*") if path.name[5:].isdigit()]
    final = [path for path in folder.glob("*.png") if not path.name.startswith(("grid", "timeline"))]
    rows = [*sorted(rows), *([(None, final)] if final and not rows else [])]
    return [{"step": step, "pictures": [library.url(path) for path in sorted(pictures)]} for step, pictures in rows]


def scores_of(library):
    """{model path: its scores} of the newest comparison that has it."""
    files = sorted(library.compared.glob("*/evaluation/evaluation.json"), key=lambda path: path.stat().st_mtime)
    return {model["model_path"]: model["scores"] for path in files for model in measured(path)}


def measured(path):
    """[{model_path, scores, real}] of an evaluation.json; [] if it is not there, or not whole."""
    try:
        return [{"model_path": model["model_path"], "scores": dict(model["scores"]), "real": dict(model["subjects"][0]["real"])}
                for model in read_json(path)["models"]]
    except (LookupError, TypeError, ValueError):
        return []


def how_to_go_on(item):
    """("checkpoint", path), ("model", path) or ("anew", None): what a longer training of the same begins with.

    A longer training begins as a shorter one does where the learning rate is constant; a whole model can be trained on.
    """
    record = record_of(item)
    checkpoints = db.checkpoints_in(item.output)
    if checkpoints and str(record.get("used", {}).get("lr_scheduler", "")).startswith("constant"):
        return "checkpoint", checkpoints[-1]
    return ("model", item.output) if record and not db.METHODS[record["method"]].is_adapter else ("anew", None)

"""All that the page shows, read out of the library's files each time."""

import dreambooth_implementation as db
from webui.jobs import Job
from webui.library import card, measured, samples_of, scores_of, title_of
from webui.pictures import pictures_of
from webui.places import folders_in
from webui.program import field_kinds, recipe

LOG_LINES, POINTS = 200, 300  # of a log and of a curve that are sent
SHOWN_JOBS = 12  # drawings and exports that have ended


def everything(page, query):
    """What changes by itself: items, jobs, comparisons."""
    library, scores = page.library, scores_of(page.library)
    items = [card(library, item, scores) for item in library.items().values()]
    jobs = [job_entry(page, id, job) for id, job in library.jobs().items()]
    jobs.sort(key=lambda job: job["made"])
    return {"machine": page.machine, "items": sorted(items, key=lambda item: -(item["date"] or 9e9)), "jobs": jobs,
            "compared": [comparison(library, place) for place in folders_in(library.compared)],
            "adapters": sorted(path.name for path in library.adapters.glob("*.safetensors")),
            "folder": str(library.root)}


def job_entry(page, id, job):
    """A job in short."""
    command, report = job.command, page.logs.report(job.log)
    state = job.state()
    is_over = state in ("stopped", "failed", "lost")
    last = report.error or (report.lines[-1] if report.lines else "") if is_over else ""
    return {"id": id, "kind": command["kind"], "title": command.get("title", ""), "state": state, "made": command["made"],
            "prompts": command.get("prompts", []), "uses": command.get("uses", []), "said": last[:1000],
            "bar": report.bar if state in ("running", "stopping") else {}, "training": report.training,
            "beside": (job.folder / "beside").exists(), "can_resume": is_over}


def one_job(page, query):
    """A job with its log, losses and samples. Refusal if there is none of this id."""
    library, id = page.library, query.get("id", "")
    job = library.job(id)
    report = page.logs.report(job.log)
    item = next((item for item in library.items().values() if item.job and item.job.folder == job.folder), None)
    every = -(-len(report.losses) // POINTS) or 1
    points = report.losses[::-1][::every][::-1]  # the last one always
    return job_entry(page, id, job) | {
        "lines": report.lines[-LOG_LINES:], "losses": points, "samples": samples_of(library, item) if item else [],
        "photos": library.url((item.partial if item.partial.exists() else item.output) / "photos.png") if item else None,
        "command": " ".join(job.command["flags"])}


def comparison(library, place):
    """An evaluation: its table of scores, once it is there, and its sheets."""
    folder, command = place / "evaluation", Job(place / "job").command
    titles = {str(item.output): title_of(item) for item in library.items().values()}
    rows = [{"name": titles.get(model["model_path"], model["model_path"]), "scores": model["scores"],
             "real": model["real"], "sheet": library.url(sheet_of(folder, model["model_path"]))}
            for model in measured(folder / "evaluation.json")]
    return {"id": place.name, "title": command.get("title", place.name), "made": command.get("made", 0),
            "job": f"{place.relative_to(library.root).as_posix()}/job", "rows": rows,
            "comparison": library.url(folder / "comparison.png")}


def sheet_of(folder, model_path):
    """The contact sheet of a model, in the folder that the program names after its path."""
    return folder / db.slug(model_path) / "sheet.png"


def draft(page, query):
    """The next training: photos as the program sees them, and the fields as they were left."""
    goes_on, _ = page.draft.begins_with()
    return {"seen": page.draft.look(page.has_gpu), "fields": page.draft.fields(), "goes_on": goes_on,
            "used": (page.draft.folder / "used").exists()}


def gallery(page, query):
    """The newest pictures."""
    count = query.get("count", "")
    pictures, total = pictures_of(page.library, int(count) if count.isdecimal() and len(count) < 6 else 60)
    return {"pictures": pictures, "total": total}


def defaults(page, query):
    """What the program takes where a field is left empty, and the fields."""
    values = {name: value for name, value in query.items()}
    return {"recipe": recipe(values, page.has_gpu), "fields": field_kinds()}


LOOKS = {"state": everything, "job": one_job, "draft": draft, "pictures": gallery, "defaults": defaults}

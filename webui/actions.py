"""What the page's buttons do: a job more, or a file changed. Each takes what the page sent, and answers with what it may want."""

import shutil

import dreambooth_implementation as db
from webui.guard import Refusal
from webui.jobs import ENDED, Job
from webui.library import rename, title_of
from webui.places import folders_in, found
from webui.program import FIELDS, as_flags, check_flags

KEPT_JOBS = 30  # drawings and exports that have ended; pictures and files stay
DRAWING = ("num_images", "seed", "num_inference_steps", "guidance_scale", "width", "height", "lora_scale",
           "subject_start")


def train(page, values):
    """Put a training of the draft in the line."""
    library, draft = page.library, page.draft
    fields = {name: value for name, value in values.get("fields", {}).items() if name in FIELDS}
    seen = draft.look(page.has_gpu)
    if seen["error"] or not seen["photos"]:
        raise Refusal("no_photos_yet") if not seen["error"] else Refusal("program", said=seen["error"])
    class_prompt = fields.get("class_prompt") or seen["class_prompt"] or ""
    if not class_prompt.strip():
        raise Refusal("no_class_prompt")
    goes_on, more = draft.begins_with()
    title = str(values.get("title") or "").strip() or class_prompt
    place = library.new_folder(library.trained, title)
    flags = ["--train", *as_flags({"instance_data_dir": str(place / "photos"), "output_dir": str(place / "output"),
                                   "class_data_dir": str(library.class_images), **fields, **more})]
    check_flags(flags)
    shutil.copytree(draft.photos, place / "photos")
    (place / "title.txt").write_text(title[:80], encoding="utf-8")
    draft.was_taken()
    uses = [place.name, *([goes_on["item"]] if goes_on else [])]
    Job.make(place / "job", "train", flags, title=title, uses=uses, fields={"class_prompt": class_prompt} | fields)
    return {"item": place.name}


def draw(page, values):
    """Put a drawing in the line."""
    library, item = page.library, page.library.item(values.get("item"))
    prompts = [line.strip() for line in str(values.get("prompt") or "").splitlines() if line.strip()]
    adapters = [source_of(library, each.get("source")) + (f"={each['strength']}" if each.get("strength") not in (None, "") else "")
                for each in values.get("adapters") or []]
    flags = ["--infer", *as_flags({
        "model_path": str(item.output), "image_dir": str(library.pictures), "prompt": prompts, "adapter": adapters,
        "negative_prompt": values.get("negative_prompt"), **{name: values.get(name) for name in DRAWING}})]
    check_flags(flags)
    prune(library)
    place = library.new_folder(library.job_folder, f"draw {title_of(item)}")
    job = Job.make(place, "draw", flags, title=title_of(item), uses=[item.id], prompts=prompts)
    return {"job": job.folder.relative_to(library.root).as_posix()}


def source_of(library, source):
    """The path of an adapter: an item's output, or a file in adapters/."""
    files = {path.name: path for path in library.adapters.glob("*.safetensors")}
    return str(files[source] if source in files else library.item(source).output)


def compare(page, values):
    """Put a measurement of one or several items in the line."""
    library = page.library
    items = [library.item(id) for id in dict.fromkeys(values.get("items") or [])]
    if not items:
        raise Refusal("nothing_chosen")
    title = " / ".join(map(title_of, items))
    place = library.new_folder(library.compared, title)
    prompts = str(values.get("prompts") or "").strip()
    flags = ["--evaluate", *as_flags({
        "model_path": [str(item.output) for item in items], "eval_dir": str(place / "evaluation"),
        "instance_data_dir": photos_of_all(items), "num_images": values.get("num_images"),
        "prompts_file": prompts and str(place / "prompts.txt")})]
    check_flags(flags)
    place.mkdir(parents=True)
    if prompts:
        (place / "prompts.txt").write_text(prompts, encoding="utf-8")
    Job.make(place / "job", "compare", flags, title=title, uses=[item.id for item in items])
    return {"compared": place.name}


def photos_of_all(items):
    """The folder of the photos if these items have the same ones: each has a copy, and the program sets side by side what was
    trained on one folder. None otherwise."""
    folders = [item.place and item.place / "photos" for item in items]
    if None in folders or not all(folder.is_dir() for folder in folders):
        return None
    photos = {frozenset(db.file_digest(path) for path in folder.iterdir() if db.is_picture(path)) for folder in folders}
    return str(folders[0]) if len(photos) == 1 else None


def export(page, values):
    """Put the writing of a file for other programs in the line. It is always of the same item, so it may be written anew."""
    library, item = page.library, page.library.item(values.get("item"))
    file = library.exported / f"{item.id.removeprefix('./')}.safetensors"
    flags = ["--export", *as_flags({"model_path": str(item.output), "overwrite": True})]
    flags[0] += f"={file}"
    check_flags(flags)
    prune(library)
    place = library.new_folder(library.job_folder, f"export {title_of(item)}")
    Job.make(place, "export", flags, title=title_of(item), uses=[item.id])
    return {}


def prune(library):
    """Forget drawings and exports that ended long ago."""
    ended = [folder for folder in folders_in(library.job_folder) if Job(folder).is_whole and Job(folder).state() in ENDED]
    for folder in sorted(ended, key=lambda folder: Job(folder).command["made"])[:-KEPT_JOBS]:
        shutil.rmtree(folder, ignore_errors=True)


def stop(page, values):
    page.library.job(values.get("job")).stop()
    return {}


def resume(page, values):
    """Put a job that has ended in the line once more; a training goes on where it was."""
    job = page.library.job(values.get("job"))
    command = job.command
    if job.state() not in ENDED:
        raise Refusal("in_use", name=command.get("title", ""))
    goes_on = command["kind"] == "train" and not any(flag.startswith("--resume") for flag in command["flags"])
    job.again([*command["flags"], "--resume"] if goes_on and job.log.exists() else command["flags"])
    return {}


def start_now(page, values):
    """Have a drawing begin beside a training."""
    (page.library.job(values.get("job")).folder / "beside").touch()
    return {}


def retitle(page, values):
    rename(page.library.item(values.get("item")), values.get("title", ""))
    return {}


def train_again(page, values):
    """Photos and fields of an item into the draft; with `longer`, to go on with it."""
    page.draft.take_over(page.library.item(values.get("item")), bool(values.get("longer")))
    return {}


def caption(page, values):
    page.draft.caption(values.get("name"), values.get("text"))
    return {}


def remove_photo(page, values):
    page.draft.remove(values.get("name"))
    return {}


def clear_draft(page, values):
    page.draft.clear()
    return {}


def keep_fields(page, values):
    """Remember the fields of the next training."""
    fields = {name: value for name, value in values.items() if name in (*FIELDS, "title") and isinstance(value, (str, bool))}
    page.draft.keep("fields.json", fields)
    return {}


# ---- what deletes, which is asked first


def asked_first(values, id, name):
    """Refusal, which the page shows as a question, unless the answer came along."""
    if values.get("confirmed") != id:
        raise Refusal("really_delete", 409, id=id, name=name)


def delete_item(page, values):
    """Delete a training with everything of it, once that was confirmed; not while a job needs it."""
    library, item = page.library, page.library.item(values.get("item"))
    if item.place is None:
        raise Refusal("not_ours")
    for job in library.jobs().values():
        if item.id in job.command.get("uses", []) and job.state() not in ENDED and not (job.folder.parent == item.place and
                                                                                       job.state() == "waiting"):
            raise Refusal("in_use", 409, name=title_of(item))
    asked_first(values, item.id, title_of(item))
    remove_folder(item.place)
    return {}


def delete_compared(page, values):
    library = page.library
    place = found({path.name: path for path in folders_in(library.compared)}, values.get("id"))
    job = Job(place / "job")
    if job.is_whole and job.state() in ("running", "stopping"):
        raise Refusal("in_use", 409, name=place.name)
    asked_first(values, place.name, job.command.get("title", place.name))
    remove_folder(place)
    return {}


def delete_picture(page, values):
    path = found({path.name: path for path in page.library.pictures.glob("*.png")}, values.get("name"))
    asked_first(values, path.name, path.name)
    path.unlink()
    return {}


def delete_adapter(page, values):
    path = found({path.name: path for path in page.library.adapters.glob("*.safetensors")}, values.get("name"))
    asked_first(values, path.name, path.name)
    path.unlink()
    return {}


def remove_folder(place):
    """Delete a folder; what is left of it, should that fail, is no item."""
    hidden = place.with_name(f".{place.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    place.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


ACTIONS = {function.__name__: function for function in (
    train, draw, compare, export, stop, resume, start_now, retitle, train_again, caption, remove_photo, clear_draft, keep_fields,
    delete_item, delete_compared, delete_picture, delete_adapter)}

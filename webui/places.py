"""The folders of the library, what is in them, and which of its files the page may have.

    trained/NAME/     photos, output of a training; in job/ how it went      draft/       photos of the next training
    compared/NAME/    an evaluation, and how it went                         pictures/    what was drawn
    adapters/         others' files                                          exported/    files for other programs
    jobs/NAME/        drawings and exports, the latest of them               class_images/
"""

import threading
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import dreambooth_implementation as db
from webui.guard import Refusal
from webui.jobs import Job

KINDS = {".png": "image/png", ".jpg": "image/jpeg"}  # of files that the page shows
DOWNLOADS = ".safetensors"


@dataclass(frozen=True)
class Item:
    """Something that was trained, or is to be."""

    id: str
    output: Path  # its --output_dir
    place: Path | None  # its folder in the library; None: it was made without the page, and the page changes nothing in it

    @property
    def partial(self):
        return self.output.with_name(f"{self.output.name}.partial")

    @property
    def job(self):
        """Its training; None if it was made without the page."""
        return Job(self.place / "job") if self.place else None

    @property
    def is_trained(self):
        return (self.output / "dreambooth.json").is_file()


class Library:
    """Everything that the page keeps. Whoever changes something holds its lock."""

    def __init__(self, root="library"):
        self.root, self.lock = Path(root), threading.RLock()
        self.trained, self.compared, self.job_folder, self.draft = (
            self.root / name for name in ("trained", "compared", "jobs", "draft"))
        self.pictures, self.adapters, self.exported, self.class_images = (
            self.root / name for name in ("pictures", "adapters", "exported", "class_images"))

    def items(self):
        """{id: Item}: the library's own, and outputs of the program in the working folder."""
        own = {path.name: Item(path.name, path / "output", path) for path in folders_in(self.trained)}
        found = [path.parent for path in sorted(Path().glob("*/dreambooth.json"))]
        return own | {f"./{path.name}": Item(f"./{path.name}", path, None) for path in found}

    def item(self, id):
        """The Item of this id. Refusal if there is none: what a request names is looked up, and never becomes a path."""
        return found(self.items(), id)

    def jobs(self):
        """{id: Job} of all jobs; the id is where it is in the library."""
        folders = [path / "job" for place in (self.trained, self.compared) for path in folders_in(place)]
        jobs = [Job(folder) for folder in (*folders, *folders_in(self.job_folder))]
        return {job.folder.relative_to(self.root).as_posix(): job for job in jobs if job.is_whole}

    def job(self, id):
        return found(self.jobs(), id)

    def new_folder(self, place, title):
        """A folder in `place`, not there yet, whose name is made of a title."""
        name = db.slug(title)[:60].strip("-")
        return next(path for n in range(1, 10**6) if not (path := place / (name if n == 1 else f"{name}-{n}")).exists())

    def file(self, path, outside=False):
        """(a file to show, its media type) of a path in the library, or in an output outside it. Refusal for everything else."""
        parts = path.split("/")
        top = self.root
        if outside:
            top = self.item(f"./{parts.pop(0)}").output
        wanted = top.joinpath(*parts)
        kind = KINDS.get(wanted.suffix.lower())
        if wanted.suffix == DOWNLOADS and not outside and parts[0] == self.exported.name:
            kind = "application/octet-stream"
        hidden = any(part in ("", "..") or part.startswith(".") or "\\" in part or ":" in part or "\0" in part for part in parts)
        if hidden or kind is None or not wanted.is_file() or not wanted.resolve().is_relative_to(top.resolve()):
            raise Refusal("no_file", 404)
        return wanted, kind

    def url(self, path):
        """Where the page finds a file of the library or of an output outside it; a changed file has another address."""
        if not path.is_file():
            return None
        inside = path.is_relative_to(self.root)
        place = ("/files/" if inside else "/outside/") + (path.relative_to(self.root) if inside else path).as_posix()
        return f"{urllib.parse.quote(place)}?{path.stat().st_mtime_ns}"


def folders_in(place):
    """The folders directly in `place`, by name, without hidden ones."""
    try:
        return [path for path in sorted(place.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return []


def found(known, id):
    if not isinstance(id, str) or id not in known:
        raise Refusal("gone", 404)
    return known[id]

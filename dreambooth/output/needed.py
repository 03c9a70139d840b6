"""What a training reads and its output needs afterwards must not lie where an earlier output is renamed or deleted."""

from pathlib import Path

from dreambooth.base import UserError, short_path
from dreambooth.files import unused_name
from dreambooth.methods.table import METHODS


def lies_in(path, folder):
    """Whether a path that exists is in a folder, is the folder, or has files that lead into it, through whatever links."""
    path, folder = Path(path), Path(folder).resolve()
    if not path.exists() or not folder.exists():
        return False
    files = [path, *path.glob("*"), *path.glob("*/*")] if path.is_dir() else [path]
    return any(folder in (place, *place.parents) for place in (file.resolve() for file in files))


def check_needed(s, name, concepts):
    """UserError if --output_dir holds the model that an adapter will need, or photos, or what only --overwrite would delete."""
    if lies_in(name, s.output_dir):
        what = f"--output_dir {s.output_dir}: the model to start from, {name}, lies in it"
        if METHODS[s.method].is_adapter:
            raise UserError(f"{what}, and what --method {s.method} makes needs it there afterwards; give another --output_dir, such as "
                            f"{s.output_dir.rstrip('/')}-{s.method.replace('_', '-')}")
        if s.overwrite and Path(name).resolve() != Path(s.output_dir).resolve():
            raise UserError(f"{what} and would be deleted by --overwrite; give another --output_dir")
    for concept in concepts:
        if any(lies_in(path, s.output_dir) for path, _ in concept.photos):
            raise UserError(f"--output_dir {s.output_dir}: the photos in {concept.instance_data_dir} lie in it, and it will get another name "
                            f"or be deleted; give another --output_dir, or copy the photos elsewhere")


def name_when_done(s, name):
    """How the model to start from will be called when the output has its name: an earlier output gets another one."""
    if not lies_in(name, s.output_dir):
        return name
    if s.overwrite:
        return f"{name} (as it was; deleted by --overwrite)"
    target, place = Path(s.output_dir).resolve(), Path(name).resolve()
    is_inside = target in (place, *place.parents)  # and not only some of its files
    return short_path(unused_name(target) / place.relative_to(target)) if is_inside else name

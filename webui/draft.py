"""The next training before it begins: its photos, their captions, and the fields of the page, so that a reload loses nothing."""

import json
import re
import shutil
import threading
from pathlib import Path

import dreambooth_implementation as db
from webui.guard import Refusal
from webui.library import how_to_go_on, read_json, record_of, title_of
from webui.program import FIELDS, recipe
from webui.seen import looked_at

LARGEST_PHOTO = 200 << 20  # bytes
CAPTIONS = (".txt", ".caption", ".jsonl", ".csv")  # that may lie beside photos
USUAL_SIDE = 512  # pixels that a model trains at of which nothing is known


class Draft:
    """The folder of the next training: photos/, what was seen of them, fields.json and whose photos they are."""

    def __init__(self, library):
        self.library, self.folder, self.lock = library, library.draft, threading.Lock()
        self.photos, self.seen = self.folder / "photos", self.folder / "seen"

    def fields(self):
        """{name: value} as they were left, without what is no field."""
        return {name: value for name, value in read_json(self.folder / "fields.json").items() if name in (*FIELDS, "title")}

    def keep(self, name, value):
        """Write fields.json, from.json or seen.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with db.whole_file(self.folder / name) as part:
            part.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")

    def add(self, name, stream, length):
        """A photo, or a file of captions, that was dropped on the page. New photos replace those that were trained already."""
        name = safe_name(name)
        if length > LARGEST_PHOTO:
            raise Refusal("too_large", 413, megabytes=LARGEST_PHOTO >> 20)
        if (self.folder / "used").exists():
            self.clear()
        self.photos.mkdir(parents=True, exist_ok=True)
        save_stream(self.unused(name), stream, length)
        return {}

    def unused(self, name):
        """A place for a file of this name: no photo replaces another."""
        path = self.photos / name
        if path.suffix.lower() in CAPTIONS:
            return path
        return next(place for n in range(1, 10**6) if not (place := path.with_stem(f"{path.stem}-{n}") if n > 1 else path).exists())

    def files(self):
        try:
            return {path.name: path for path in self.photos.iterdir() if path.is_file()}
        except OSError:
            return {}

    def remove(self, name):
        """Take a photo, its caption and its mask out again."""
        files = self.files()
        if name not in files:
            raise Refusal("gone", 404)
        for path in [files[name], *caption_files_of(files[name]), *mask_files_of(files[name])]:
            path.unlink(missing_ok=True)

    def caption(self, name, text):
        """Give a photo a caption of its own, or none."""
        files = self.files()
        if name not in files or not isinstance(text, str) or len(text) > 2000:
            raise Refusal("gone", 404)
        for path in caption_files_of(files[name]):
            path.unlink(missing_ok=True)
        if text.strip():
            (self.photos / f"{name}.txt").write_text(" ".join(text.split()), encoding="utf-8")

    def clear(self):
        """Forget the photos, and whose they are; the fields stay."""
        for name in ("photos", "seen"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("used", "from.json", "seen.json"):
            (self.folder / name).unlink(missing_ok=True)

    def was_taken(self):
        """A training of it is in the line: the next one begins anew and has another name; photos and other fields stay."""
        (self.folder / "used").touch()
        (self.folder / "from.json").unlink(missing_ok=True)
        self.keep("fields.json", {name: value for name, value in self.fields().items() if name != "title"})

    def look(self, has_gpu):
        """What the program sees, as look() has it; looked at again only when a file has changed, or the pixels to train at."""
        with self.lock:
            return self.look_if_changed(self.resolution(has_gpu))

    def resolution(self, has_gpu):
        """Pixels of a training with the fields as they are."""
        fields = self.fields()
        given = str(fields.get("resolution") or "")
        return int(given) if given.isdecimal() and 64 <= int(given) <= 4096 else recipe(fields, has_gpu).get("resolution") or USUAL_SIDE

    def look_if_changed(self, resolution):
        key = [[resolution], *([name, path.stat().st_mtime_ns, path.stat().st_size] for name, path in sorted(self.files().items()))]
        if not key[1:]:
            return {"photos": [], "remarks": [], "class_prompt": None, "error": None}
        known = read_json(self.folder / "seen.json")
        if known.get("key") != key:
            known = {"key": key, **looked_at(self.photos, self.seen, resolution)}
            self.keep("seen.json", known)
        photos = [photo | {"url": self.library.url(self.seen / photo["shown"])} for photo in known["photos"]]
        return {name: value for name, value in known.items() if name != "key"} | {"photos": photos}

    def take_over(self, item, goes_on):
        """Photos and fields of an item, to train it once more; with `goes_on`, longer."""
        if not (item.place and (item.place / "photos").is_dir()):
            raise Refusal("no_photos")
        self.clear()
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(item.place / "photos", self.photos)
        fields = dict(item.job.command.get("fields", {}), title="")
        if goes_on:
            how, _ = how_to_go_on(item)
            steps = record_of(item)["used"]["steps"]
            fields |= {"steps": str(2 * steps if how == "checkpoint" else steps), "title": f"{title_of(item)} +"}
            self.keep("from.json", {"item": item.id})
        self.keep("fields.json", fields)

    def begins_with(self):
        """({item, title, how}, its flags) of the item that is gone on with; (None, {}) if it begins anew."""
        item = self.library.items().get(read_json(self.folder / "from.json").get("item"))
        if item is None or not record_of(item):
            return None, {}
        how, path = how_to_go_on(item)
        word = record_of(item)["subjects"][0]["identifier"]
        flags = {"checkpoint": {"resume": str(path)}, "model": {"model_name": str(path), "identifier": word}, "anew": {}}[how]
        step = int(path.name.removeprefix("step-")) if how == "checkpoint" else 0
        return {"item": item.id, "title": title_of(item), "how": how, "step": step}, flags


def caption_files_of(photo):
    """The text files that are a photo's caption, by their names."""
    stems = (photo.stem.casefold(), photo.name.casefold())
    return [path for path in photo.parent.iterdir()
            if path.suffix.lower() in db.CAPTION_SUFFIXES and path.stem.casefold() in stems and path != photo]


def mask_files_of(photo):
    """The files beside a photo that are its mask, by their names."""
    return [path for path in photo.parent.iterdir()
            if db.is_mask_name(path) and path != photo and db.masked_stem(path) in (db.folded(photo.stem), db.folded(photo.name))]


def safe_name(name):
    """The last part of a name that came with a file, if it can be one here. Refusal if not."""
    name = re.split(r"[\\/]", str(name))[-1].strip()
    if not name or name.startswith(".") or not name.isprintable() or len(name.encode()) > 200 or set(name) & set('<>:"|?*'):
        raise Refusal("bad_name")
    return name


def save_stream(path, stream, length):
    """Write `length` bytes of a stream to a file; nothing is there if fewer come."""
    with db.whole_file(path) as part, open(part, "wb") as file:
        left = length
        while left and (piece := stream.read(min(left, 1 << 20))):
            file.write(piece)
            left -= len(piece)
        if left:
            Path(part).unlink(missing_ok=True)
            raise Refusal("cut_short")

"""Photos as the program sees them: which it takes, what of each it uses, masks, captions, and its remarks.

A photo is decoded by the program's own code in a process of its own, `look`, so that none, however large, ends the page.
"""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
import zlib
from pathlib import Path

from PIL import Image

import dreambooth_implementation as db

SIDE = 320  # pixels of the longer side of what is shown
MULTIPLE = 8  # of which the program makes the sides of shapes, but for models of 1024 pixels, whose shapes are of 64s anyway


def look(photos, seen, resolution):
    """{photos: [{name, caption, size, shown, has_mask}], remarks, class_prompt, error} of a folder of photos, for a model that trains
    at `resolution` pixels. A picture of each goes into `seen`, named by `shown`: all of the photo, dim where training does not look,
    and tinted where a mask has it count little.
    """
    remarks = io.StringIO()
    answer = {"photos": [], "class_prompt": None, "error": None}
    with contextlib.redirect_stdout(remarks):
        try:
            concept = db.Concept(str(photos), "", 0)
            found, answer["class_prompt"] = db.find_photos(concept)
            masks = db.find_masks(Path(photos), [path for path, _ in found])
            concept = dataclasses.replace(concept, photos=tuple(found), masks=masks)
            views = db.views_of(db.Settings("train"), [concept], resolution, MULTIPLE)
            seen.mkdir(parents=True, exist_ok=True)
            answer["photos"] = [entry_of(path, caption, views[path], seen) for path, caption in found]
        except db.UserError as problem:
            answer["error"] = without_folder(str(problem), photos)
    answer["remarks"] = [without_folder(line, photos) for line in remarks.getvalue().splitlines()]
    return answer


def entry_of(path, caption, view, seen):
    """What the page shows of a photo; its picture is made unless it is there."""
    image = db.load_image(path)
    traits = zlib.crc32(repr((path.stat().st_mtime_ns, view.size, view.traits())).encode())
    target = seen / f"{path.name}.{traits:08x}.jpg"
    if not target.exists():
        with db.whole_file(target) as part:
            shown(image, view).save(part, format="JPEG", quality=85)
    return {"name": path.name, "caption": caption, "size": list(image.size), "shown": target.name, "has_mask": view.mask is not None}


def shown(image, view):
    """A photo made small, dim beside what is cut out of it, and tinted there where its mask is black."""
    share = min(1, SIDE / max(image.size))
    size = [max(1, round(side * share)) for side in image.size]
    small = image.resize(size, Image.Resampling.LANCZOS)
    dim = Image.blend(small, Image.new("RGB", small.size, "white"), 0.72)
    if view.mask is not None:
        small = db.View(small.size, mask=view.mask).tinted(small)
    dim.paste(small.crop(box := box_of(view, small.size)), box)
    return dim


def box_of(view, size):
    """What a view cuts out of a picture of `size` (width, height): left, top, right, bottom."""
    scale = max(cut / whole for cut, whole in zip(view.size, size))
    width, height = (min(whole, round(cut / scale)) for cut, whole in zip(view.size, size))
    left, top = (round((whole - cut) * at) for whole, cut, at in zip(size, (width, height), view.at))
    return left, top, left + width, top + height


def without_folder(line, folder):
    """A remark without the folder's name, of which the page has but one."""
    return line.replace(f"--instance_data_dir {folder}: ", "").replace(f"{folder}/", "").replace(str(Path(folder)), "")


def looked_at(photos, seen, resolution):
    """What look() finds, in a process of its own."""
    webui = Path(__file__).resolve().parent.parent / "webui.py"
    command = [sys.executable, str(webui), "look", str(photos), str(seen), str(resolution)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", errors="replace")
    try:
        return json.loads(result.stdout)
    except ValueError:
        last = (result.stderr.strip().splitlines() or ["?"])[-1]
        return {"photos": [], "class_prompt": None, "remarks": [], "error": last[:300]}

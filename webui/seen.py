"""Photos as the program sees them: which it takes, what of each it uses, captions, and its remarks.

A photo is decoded by the program's own code in a process of its own, `look`, so that none, however large, ends the page.
"""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

import dreambooth_implementation as db

SIDE = 320  # pixels of the longer side of what is shown


def look(photos, seen, class_prompt=""):
    """{photos: [{name, caption, size}], remarks, class_prompt, error} of a folder of photos; a picture of each into `seen`.

    Such a picture is all of the photo, dim where training does not look.
    """
    remarks = io.StringIO()
    answer = {"photos": [], "class_prompt": None, "error": None}
    with contextlib.redirect_stdout(remarks):
        try:
            concept = db.Concept(str(photos), "", 0, class_prompt=class_prompt or None)
            found, answer["class_prompt"] = db.find_photos(concept)
            seen.mkdir(parents=True, exist_ok=True)
            answer["photos"] = [entry_of(path, caption, seen) for path, caption in found]
        except db.UserError as problem:
            answer["error"] = without_folder(str(problem), photos)
    answer["remarks"] = [without_folder(line, photos) for line in remarks.getvalue().splitlines()]
    return answer


def entry_of(path, caption, seen):
    """What the page shows of a photo; its picture is made unless it is there."""
    image = db.load_image(path)
    target = seen / f"{path.name}.jpg"
    if not target.exists() or target.stat().st_mtime < path.stat().st_mtime:
        with db.whole_file(target) as part:
            shown(image).save(part, format="JPEG", quality=85)
    return {"name": path.name, "caption": caption, "size": list(image.size)}


def shown(image):
    """A photo made small, dim beside the square in its middle that is used."""
    _, (height, width, top, left, side, _) = db.fitted(image, [min(image.size)] * 2)
    dim = Image.blend(image, Image.new("RGB", image.size, "white"), 0.72)
    box = (left, top, left + side, top + side)
    dim.paste(image.crop(box), box)
    dim.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return dim


def without_folder(line, folder):
    """A remark without the folder's name, of which the page has but one."""
    return line.replace(f"--instance_data_dir {folder}: ", "").replace(f"{folder}/", "").replace(str(Path(folder)), "")


def looked_at(photos, seen, class_prompt=""):
    """What look() finds, in a process of its own."""
    webui = Path(__file__).resolve().parent.parent / "webui.py"
    command = [sys.executable, str(webui), "look", str(photos), str(seen), f"--class_prompt={class_prompt}"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", errors="replace")
    try:
        return json.loads(result.stdout)
    except ValueError:
        last = (result.stderr.strip().splitlines() or ["?"])[-1]
        return {"photos": [], "class_prompt": None, "remarks": [], "error": last[:300]}

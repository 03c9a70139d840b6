"""What was drawn: each picture with what made it, read out of the picture itself."""

import re

import dreambooth_implementation as db

SETTING = re.compile(r"([A-Z][\w ]*): (.*?)(?=, [A-Z][\w ]*: |$)", re.DOTALL)
ADAPTER = re.compile(r"(.+?)=([-+.\deE]+)")
_made = {}  # {path: (when it was written, what made it)}


def pictures_of(library, count):
    """(the newest `count` pictures as the page shows them, how many there are)."""
    paths = []
    for path in library.pictures.glob("*.png"):
        try:
            if not path.name.startswith(("grid-", ".")):
                paths.append((path.stat().st_mtime_ns, path.name, path))
        except OSError:  # deleted just now
            pass
    paths = [path for *_, path in sorted(paths, reverse=True)]
    known = {str(item.output): item.id for item in library.items().values()}
    return [{"name": path.name, "url": library.url(path), **made_by(path, known)} for path in paths[:count]], len(paths)


def made_by(path, known):
    """What made a picture, as its text chunk says. `known` is {model path: id}."""
    try:
        written = path.stat().st_mtime_ns
    except OSError:
        return {}
    if _made.get(path, (None,))[0] != written:
        _made[path] = written, parse_parameters(db.png_parameters(path) or "")
    made = _made[path][1]
    return made | {"item": known.get(made.get("model"))}


def parse_parameters(text):
    """{prompt, negative_prompt, seed, ..., settings} of the text that A1111 and this program write into pictures."""
    prompt, *rest = text.split("\n")
    negative = "\n".join(line.removeprefix("Negative prompt: ") for line in rest[:-1])
    last = rest[-1] if rest else ""
    values = dict(SETTING.findall(last))
    width, _, height = values.get("Size", "").partition("x")
    adapters = [ADAPTER.fullmatch(each) for each in values.get("Adapters", "").split("; ") if each]
    return {"prompt": prompt, "negative_prompt": negative, "seed": values.get("Seed"), "num_inference_steps": values.get("Steps"),
            "guidance_scale": values.get("CFG scale"), "width": width, "height": height, "model": values.get("Model"),
            "lora_scale": values.get("LoRA scale"), "subject_start": values.get("Subject start"),
            "adapters": [[found[1], found[2]] for found in adapters if found], "settings": last}

"""The notebook runs from top to bottom."""

import json
import os
import shutil
import sys

import forked
from conftest import REPOSITORY


def run_cells(script):
    """With the program that lies in the working folder."""
    forked.forget_repository()
    sys.path.insert(0, os.getcwd())
    exec(compile(script, "notebook", "exec"), {"__name__": "__main__"})


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """As a script, in a copy of the repository; only made short, and without its installation."""
    notebook = json.loads((REPOSITORY / "dreambooth_colab.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and all(cell["outputs"] == [] for cell in cells)
    installing = [cell for cell in cells if "install" in cell["metadata"].get("tags", [])]
    assert len(installing) == 1 and installing[0] is cells[0]
    for name in ("dreambooth_implementation.py", "demo/model", "instance_images"):
        source, target = REPOSITORY / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    script = "\n".join("".join(cell["source"]) for cell in cells[1:])
    assert script.count("STEPS, CLASS_IMAGES = 800, 100") == 1 and script.count('"--num_images", 4') == 1
    script = script.replace("800, 100", "2, 2").replace('"--num_images", 4', '"--num_images", 1, "--num_inference_steps", 1')
    script = script.replace('"--overwrite")', '"--overwrite", "--num_inference_steps", 1)', 1)
    statuses, said = forked.finish([forked.begin(tmp_path, run_cells, script)], tmp_path)
    assert statuses == [0], said[-2000:]
    assert len(list((tmp_path / "images").glob("*.png"))) == 3 and (tmp_path / "my_dog.safetensors").exists()

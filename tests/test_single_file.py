"""The single file alone in an empty folder, no repository around: it trains and draws, and says what else it would need."""

import os
import runpy
import shutil
import subprocess
import sys

import forked
import pytest
from conftest import REPOSITORY
from training_runs import METHODS, SHORT

NAME = "dreambooth_implementation.py"


@pytest.fixture
def alone(tmp_path):
    """A folder with nothing but the file."""
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(REPOSITORY / NAME, folder)
    return folder


def run_copy(*flags):
    """The file in the working folder as the main program of this process."""
    forked.forget_repository()
    sys.argv = [NAME, *flags]
    runpy.run_path(NAME, run_name="__main__")  # ends with SystemExit


def call(folder, *flags):
    """(exit status, what was said) of the copied file, forked from a process that has imported the libraries."""
    (status,), said = forked.finish([forked.begin(folder, run_copy, *map(str, flags))], folder)
    (folder / forked.LOG).unlink()
    return status, said


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_and_draws(method, alone, tiny_model, photos):
    status, said = call(alone, "--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, *SHORT,
                        "--steps", 2, "--method", method, *METHODS[method])
    assert status == 0, said
    assert f"Try next: python {NAME} --infer" in said
    status, said = call(alone, "--infer", "--num_images", 1, "--num_inference_steps", 1)
    assert status == 0 and len(list((alone / "images").glob("a-*.png"))) == 1, said
    assert {path.name for path in alone.iterdir()} - {"class_images"} == {NAME, "output", "images"}


@pytest.mark.long
def test_it_does_so_in_a_fresh_interpreter(alone, tiny_model, photos):
    flags = ["--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, *SHORT, "--steps", 1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-I", alone / NAME, *map(str, flags)], cwd=alone, env=environment,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (alone / "output" / "dreambooth.json").is_file()


@pytest.mark.parametrize("flags, said", [
    (["--train"], "the bundled model"), (["--train", "--model_name", "demo"], "the bundled model"),
    (["--infer", "--model_path", "demo", "--prompt", "a dog"], "the bundled model"),
    (["--infer"], "--train first"), (["--evaluate"], "--train first")], ids=" ".join)
def test_what_it_lacks_is_said_in_a_line(flags, said, alone, photos):
    if "--train" in flags:
        flags = [*flags, "--instance_data_dir", photos, "--class_prompt", "a dog"]
    status, words = call(alone, *flags)
    complaint = [line for line in words.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(complaint) == 1 and said in complaint[0] and "Traceback" not in words, words
    assert words.splitlines()[-1] == complaint[0]
    assert [path.name for path in alone.iterdir()] == [NAME]

"""The modules: each stands alone, needs only what is below it and is small; the single file is all of them."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import single_file
from conftest import FOUND, REPOSITORY
from conftest import SLOW as SLOW_TESTS

import dreambooth_implementation as db

MODULES = single_file.read_modules(single_file.PACKAGE)  # {name: (source, syntax tree)}
# Imported where they are needed, so that --help and complaints come at once.
SLOW = {"accelerate", "diffusers", "huggingface_hub", "lpips", "numpy", "peft", "pillow_heif", "prodigyopt",
        "safetensors.torch", "torch", "torchao", "transformers"}
# Test files after no module: of the whole program, or of what lies beside it.
OTHERS = {"bad_input", "benchmarks", "demo", "docs", "families", "family_trainings", "kills", "notebook", "people_flags", "people_machines", "people_models",
          "people_photos", "pretended_gpu", "properties", "single_file",
          "structure", "webui", "webui_browser", "webui_jobs"}
# In an interpreter that has imported nothing of the program: each module in a fork of its own. Prints {module: what is wrong}.
ALONE = """
import importlib, json, os, sys, traceback
import filelock, PIL.Image, safetensors, tqdm  # quick, but not so quick as to be imported again for each
def complaint(module):
    try:
        importlib.import_module(module)
    except BaseException:
        return traceback.format_exc()
    return ", ".join(name for name in SLOW if name in sys.modules)
wrong = {}
for module in MODULES:
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, complaint(module).encode()[-3000:])
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        wrong[module] = pipe.read()
    os.wait()
assert not any(name.split(".")[0] == "dreambooth" for name in sys.modules)
print(json.dumps({module: text for module, text in wrong.items() if text}))
"""


def inside_functions(tree):
    """Names of the modules that are imported inside functions."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in (node for function in functions for node in ast.walk(function)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def is_slow(name):
    return any(name == slow or name.startswith(f"{slow}.") for slow in SLOW)


def test_the_single_file_was_made_from_the_modules_of_today():
    assert os.environ[FOUND] == "true", "dreambooth_implementation.py was not what the modules give: make single, and commit"


def test_every_module_imports_alone_and_quickly():
    """Whichever comes first; and none imports what is slow."""
    modules = [f"dreambooth.{name}" for name in MODULES]
    script = f"MODULES, SLOW = {modules!r}, {sorted(SLOW)!r}\n{ALONE}"
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(modules) > 50 and json.loads(result.stdout) == {}


def test_an_import_of_what_is_slow_would_be_found():
    tree = ast.parse("import os\ndef f():\n    import json\n    from torch import nn\n    import safetensors.torch")
    assert [name for name in inside_functions(tree) if not is_slow(name)] == ["json"]


@pytest.mark.parametrize("name", MODULES)
def test_only_what_is_slow_is_imported_inside_functions(name):
    assert [other for other in inside_functions(MODULES[name][1]) if not is_slow(other)] == []


def test_modules_are_small():
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in single_file.PACKAGE.rglob("*.py")}
    assert {path.name: size for path, size in sizes.items() if size > 300} == {}


def test_every_module_tells_what_it_is_and_has_a_name_of_its_own():
    assert [name for name, (_, tree) in MODULES.items() if not ast.get_docstring(tree)] == []
    last = [name.split(".")[-1] for name in MODULES]
    assert len(set(last)) == len(last)  # tests are named after them


def test_test_files_follow_the_modules():
    modules = {name.split(".")[-1] for name in MODULES}
    named = {path.stem.removeprefix("test_") for path in (REPOSITORY / "tests").glob("test_*.py")}
    assert named - modules - OTHERS == set() and OTHERS <= named and not OTHERS & modules


@pytest.mark.parametrize("line", SLOW_TESTS)
def test_what_is_named_slow_exists(line):
    file, function = re.match(r"(\w+\.py)::(\w+)", line).groups()
    assert f"def {function}" in (REPOSITORY / "tests" / file).read_text(encoding="utf-8")


def test_every_name_of_the_modules_is_in_the_single_file():
    for name, (_, tree) in MODULES.items():
        assert [word for word in defined(tree) if not hasattr(db, word)] == [], name


def defined(tree):
    return [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


# ---- what the tool refuses


@pytest.fixture
def package(tmp_path):
    """package(**{"folder/module": source}) -> a package of these modules."""
    def make(**sources):
        for name, source in {"__init__": "", **sources}.items():
            path = tmp_path / "dreambooth" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'"""About {name}."""\n\n{source}\n')
        return tmp_path / "dreambooth"

    return make


ABOVE, BELOW = single_file.FLOORS[-1], single_file.FLOORS[0]
GOOD = {BELOW: "import os\n\n\ndef low():\n    return os.sep",
        "models/one": f"from dreambooth.{BELOW} import low\n\nONE = low()",
        ABOVE: f"import sys\n\nfrom dreambooth.{BELOW} import low\nfrom dreambooth.models.one import ONE\n\n\ndef main():\n"
               f"    return 0 if low() == ONE else 1"}


def test_modules_in_order_become_one_program(package, tmp_path):
    text = single_file.single_file(package(**GOOD))
    (tmp_path / "one.py").write_text(text)
    assert subprocess.run([sys.executable, "-I", tmp_path / "one.py"], cwd=tmp_path).returncode == 0
    assert [line for line in text.splitlines() if "dreambooth." in line] == []
    at = [text.index(line) for line in ("def low()", "ONE = low()", "def main()")]
    assert at == sorted(at) and text.count("import os") == 1


@pytest.mark.parametrize("changed, said", [
    ({BELOW: "from dreambooth.models.one import ONE"}, f"imports upward: {BELOW} from models.one"),
    ({BELOW: "def low():\n    from dreambooth.models.one import ONE"}, f"imports upward: {BELOW} from models.one"),
    ({"models/one": "from dreambooth.models.two import TWO", "models/two": "from dreambooth.models.one import ONE"},
     "modules import each other: models"),
    ({"models/two": "ONE = 1"}, "ONE is defined in models"), ({"models/two": "TWO, ONE = 2, 1"}, "ONE is defined in models"),
    ({"models/two": "class ONE:\n    pass"}, "ONE is defined in models"),
    ({"models/two": "def low():\n    return 2"}, f"low is defined in {BELOW} and in models.two"),
])
def test_what_is_not_in_order_is_refused(changed, said, package):
    with pytest.raises(SystemExit, match=re.escape(said)):
        single_file.single_file(package(**GOOD | changed))


# ---- the package as a program


def test_the_package_is_a_program():
    result = subprocess.run([sys.executable, "-m", "dreambooth", "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0 and all(f"--{mode}" in result.stdout for mode in ("train", "infer", "evaluate", "export"))
    assert result.stderr == ""


@pytest.mark.long
def test_the_package_trains_to_the_weights_of_the_single_file(tiny_model, photos, run, tmp_path):
    """To the bit."""
    from training_runs import QUICK, assert_same_weights

    flags = ["--train", "--model_name", tiny_model("sd1"), "--instance_data_dir", photos, *QUICK, "--steps", 1]
    status, out, err = run(*flags, "--output_dir", "of_the_file")
    assert status == 0, err
    command = [sys.executable, "-m", "dreambooth", *flags, "--output_dir", "of_the_package"]
    result = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert result.returncode == 0, result.stderr
    assert_same_weights(tmp_path / "of_the_file", tmp_path / "of_the_package")
    assert "Try next: python -m dreambooth --infer" in result.stdout
    assert Path(re.search(r"Try next: python (\S+) --infer", out)[1]).resolve() == single_file.TARGET

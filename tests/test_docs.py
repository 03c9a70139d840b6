"""The documents: that they agree with one another and with the program, and that what they tell people to type runs."""

import collections
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY

ENGLISH, CHINESE, FLAGS = REPOSITORY / "README.md", REPOSITORY / "README.zh-CN.md", REPOSITORY / "docs" / "flags.md"
PAGES = [ENGLISH, CHINESE, *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?: ?%)?")
SINGLE = "python dreambooth_implementation.py "
NEEDED = ["demo/model", "demo/metrics", "demo/subjects", "demo/two_dogs.json", "instance_images"]  # by what is typed


def blocks(page):
    """[(language, code)] of a page's code blocks."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def prose(page):
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def headings(page):
    """[(level, title)]"""
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", prose(page), re.MULTILINE)]


def links(page):
    """What a page's links and pictures point to."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page):
    """The names that GitHub gives to a page's headings."""
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for _, title in headings(page)]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def commands(page):
    """Every command of the program in a page's code blocks, continued lines joined."""
    code = "\n".join(code for language, code in blocks(page) if language in ("", "bash", "sh"))
    return [line for line in code.replace("\\\n", " ").splitlines() if line.startswith(SINGLE)]


# ---- the pages among themselves


def test_the_readme_is_short():
    assert len(ENGLISH.read_text(encoding="utf-8").splitlines()) <= 250


def test_the_chinese_readme_has_the_same_headings():
    assert [level for level, _ in headings(CHINESE)] == [level for level, _ in headings(ENGLISH)]


def test_the_chinese_readme_has_the_same_code():
    def code(page):
        return [(language, re.sub(r"[ \t]*#.*", "", text)) for language, text in blocks(page)]

    assert code(CHINESE) == code(ENGLISH)


def test_the_chinese_readme_has_the_same_numbers():
    english, chinese = (collections.Counter(NUMBER.findall(prose(page))) for page in (ENGLISH, CHINESE))
    assert not english - chinese and not chinese - english, (english - chinese, chinese - english)


def test_the_chinese_readme_has_the_same_links():
    english, chinese = ({link.replace(CHINESE.name, ENGLISH.name) for link in links(page)} for page in (ENGLISH, CHINESE))
    assert english == chinese


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(REPOSITORY), link
        assert not anchor or anchor in anchors(target), link


def test_the_module_map_is_true():
    """Every module has its place in the README's list, and imports only from those before it."""
    modules = []
    for line in next(code for language, code in blocks(ENGLISH) if language == "text").splitlines():
        first, *others = line.split()
        modules += [f"{first}{name}" for name in others] if first.endswith("/") else [first, *others]
    package = REPOSITORY / "dreambooth"
    there = {path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*.py")}
    assert sorted(modules) == sorted(name for name in there if not name.rpartition("/")[2].startswith("__"))
    for number, name in enumerate(modules):
        text = (package / f"{name}.py").read_text(encoding="utf-8")
        imported = {module.replace(".", "/") for module in re.findall(r"^ *from dreambooth\.([\w.]+) import", text, re.MULTILINE)}
        assert imported <= set(modules[:number]), (name, imported - set(modules[:number]))


# ---- the pages and the program


def help_block(page):
    """(what comes before the help in the page, the help, what comes after it)."""
    before, rest = page.split("```text\n")
    block, after = rest.split("```\n", 1)
    return before + "```text\n", block, "```\n" + after


def help_text():
    environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1"}
    return subprocess.run([sys.executable, REPOSITORY / "dreambooth_implementation.py", "--help"], env=environment,
                          capture_output=True, text=True, check=True).stdout


def test_the_flags_are_those_of_today():
    """To renew the page: python tests/test_docs.py"""
    assert help_block(FLAGS.read_text(encoding="utf-8"))[1] == help_text()


def made_short(flags):
    """The same command with a few steps and pictures, and the bundled model for a hub's."""
    if "--model_name" in flags and "/" in flags[flags.index("--model_name") + 1]:
        flags[flags.index("--model_name") + 1] = "demo/model"
    if "--train" in flags:
        flags += ["--steps", "2", "--num_class_images", "2"]
    if "--select_best" in flags:  # it scores several prompts at every step otherwise
        flags += ["--validation_prompt", "a [identifier] [class]"]
    if "--evaluate" in flags:
        flags += ["--num_images", "2", "--prompts_file", "prompts.txt"]
    if any(mode in flags for mode in ("--train", "--infer", "--evaluate")):
        flags += ["--num_inference_steps", "2", "--mixed_precision", "no"]
    return flags


@pytest.mark.parametrize("page", [page for page in PAGES if page != CHINESE and commands(page)], ids=lambda page: page.name)
def test_what_a_page_tells_to_type_runs(page, run, tmp_path):
    """Its commands as written, in order, in a folder with what comes with the program; only made short."""
    for name in NEEDED:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy)(REPOSITORY / name, tmp_path / name)
    (tmp_path / "prompts.txt").write_text("a [identifier] [class] on the moon\n")
    for command in commands(page):
        status, _, err = run(*made_short(shlex.split(command.removeprefix(SINGLE), comments=True)))
        assert status == 0, (command, err)
    for language, code in blocks(page):
        if language == "python" and "demo/model" in code:  # what needs no other model: plain diffusers draws
            exec(code, {})
            assert (tmp_path / "poodle.png").exists()


def test_the_readme_has_every_command():
    """What is typed most is among what is tried above."""
    typed = " ".join(commands(ENGLISH))
    assert all(f"{SINGLE}--{mode}" in typed for mode in ("train", "infer", "evaluate", "export"))


if __name__ == "__main__":
    before, _, after = help_block(FLAGS.read_text(encoding="utf-8"))
    FLAGS.write_text(before + help_text() + after, encoding="utf-8")

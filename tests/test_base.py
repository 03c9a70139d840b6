"""What every module may use: how the program is called, and names of files."""

import sys

import pytest
from conftest import REPOSITORY

import dreambooth.base
import dreambooth_implementation as db


def test_the_single_file_is_called_by_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert db.own_command() == "python dreambooth_implementation.py"
    monkeypatch.chdir(REPOSITORY / "demo")
    assert db.own_command() == "python ../dreambooth_implementation.py"
    monkeypatch.setattr(db, "__file__", str(tmp_path / "my programs" / "db.py"))
    monkeypatch.chdir(tmp_path)
    assert db.own_command() == 'python "my programs/db.py"'


@pytest.mark.parametrize("called, command", [
    ("/usr/bin/dreambooth", "dreambooth"), ("dreambooth.exe", "dreambooth"),
    (str(REPOSITORY / "dreambooth" / "__main__.py"), "python -m dreambooth"), ("-c", "python -m dreambooth")])
def test_the_package_is_called_as_it_was(called, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called, "--train"])
    assert dreambooth.base.own_command() == command


def test_both_forms_know_where_the_program_lies():
    assert db.HERE == dreambooth.base.HERE == REPOSITORY


@pytest.mark.parametrize("text, name", [("A [identifier] dog, on the Moon!", "a-identifier-dog-on-the-moon"), ("…", "prompt"),
                                        ("ü" * 100, "ü" * 60), ("-a-", "a")])
def test_prompts_become_names_of_files(text, name):
    assert db.slug(text) == name

"""What CONTRIBUTING.md shows works, and the paths that documents name are there."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from mest_compile import __version__

INSIDE = ("schedules", "targets", "autotune_logs")  # folders of the top level that are installed in the package
FILE = re.compile(r"^```(?:python|toml)\n# ((?:mest_compile|targets)/\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"`([\w.-]+/(?:[\w./-]+/|[\w./-]+\.py)?)[`:]")
MADE = {".device/", "benchmarks/environments/"}  # folders that commands make

USE = """
import json
import numpy as np
import mest_compile as mest
from mest_compile.data.dataset import load
from mest_compile.models.catalog import build_model

data = load("stripes")
shape = (32, 1, 8, 8)
net = build_model("mlp", shape, 2, 16)
step = mest.compile(net, shape, scheme="pair", sparsity=0.8, target="old-laptop", threads=1)
recipe = mest.Recipe(3, "em", lr=0.05, mutate_every=1, augment=False)
accuracy = mest.Trainer(step, recipe).fit(data.train, data.test).test_accuracy
pairs = [bool((mask[::2] == mask[1::2]).all()) for mask in step.masks().values()]
print(json.dumps([accuracy, len(pairs), all(pairs), step.describe()["target"], mest.__file__]))
"""


@pytest.mark.docs
def test_the_files_that_it_shows_are_plug_ins_that_train(repository, tmp_path):
    files = FILE.findall((repository / "CONTRIBUTING.md").read_text())
    assert [path.split("/")[-2] for path, _ in files] == ["schemes", "sources", "targets"]
    package = tmp_path / "mest_compile"
    shutil.copytree(repository / "mest_compile", package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in INSIDE:
        shutil.copytree(repository / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in files:
        path = tmp_path / path if path.startswith("mest_compile") else package / path
        assert not path.exists()
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    accuracy, layers, pairs, target, where = json.loads(done.stdout.splitlines()[-1])
    assert accuracy > 0.9 and layers and pairs and target == "old-laptop" and where.startswith(str(package))


def test_paths_in_documents_are_there(repository):
    for document in (*repository.glob("*.md"), *(repository / "docs").glob("*.md")):
        if document.name != "CHANGELOG.md":
            for path in set(PATH.findall(document.read_text())) - MADE:
                assert any((where / path).exists() for where in (repository, repository / "mest_compile")), (
                    f"{document.name}: no {path}"
                )


def test_modules_in_texts_of_code_are_there(repository):
    """Code that other processes run, and the documents': no import of ours fails there."""
    for top, kind in (("tests", "py"), ("mest_compile", "py"), ("benchmarks", "py"), ("docs", "md")):
        for path in (repository / top).rglob(f"*.{kind}"):
            for module, names in set(re.findall(r"from (mest_compile[\w.]*) import ([\w, ]+)", path.read_text())):
                for name in {name.split()[0] for name in names.split(",") if name.strip()}:
                    if path.name != "test_import_order.py" and not hasattr(importlib.import_module(module), name):
                        importlib.import_module(f"{module}.{name}")


def test_make_help_lists_every_target(repository):
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=repository, capture_output=True, text=True
    ).stdout
    wanted = re.search(r"^\.PHONY: (.*)$", (repository / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert {line.split()[0] for line in listed.splitlines()} == set(wanted) and len(listed.splitlines()) == len(wanted)


def test_hooks_run_programs_that_there_are(repository):
    text = (repository / ".pre-commit-config.yaml").read_text()
    entries = re.findall(r"^ +entry: (.*)$", text, re.MULTILINE)
    assert len(entries) == text.count("- id: ") == text.count("language: system") == 4
    for entry in entries:
        program, *arguments = entry.split()
        if program == "make":
            assert (
                subprocess.run(["make", "--dry-run", *arguments], cwd=repository, capture_output=True).returncode == 0
            )
        else:
            assert f"$(BIN)/{program.removeprefix('.venv/bin/')}" in (repository / "Makefile").read_text()


def test_the_citation_names_the_papers_method_the_licence_and_the_release(repository):
    text, project = (
        (repository / "CITATION.cff").read_text(),
        tomllib.loads((repository / "pyproject.toml").read_text())["project"],
    )
    assert f"license: {project['license']}\n" in text and f'title: "{project["name"]}: ' in text
    (released,) = re.findall(rf"^version: {re.escape(__version__)}\ndate-released: (.*)$", text, re.MULTILINE)
    assert f"\n## {__version__} - {released}\n" in (repository / "CHANGELOG.md").read_text()
    assert "arXiv:2110.14032" in text and "arxiv.org/abs/2110.14032" in (repository / "README.md").read_text()


def test_nothing_reads_pickles_as_the_security_page_says(repository):
    assert "no pickle is read anywhere" in (repository / "SECURITY.md").read_text()
    for path in (repository / "mest_compile").rglob("*.py"):
        assert not re.search(
            r"^\s*(import|from) (pickle|cloudpickle)\b|allow_pickle=True", path.read_text(), re.MULTILINE
        ), path

"""What CONTRIBUTING.md shows works, and the paths that documents name are there."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from mest_compile import __version__

INSIDE = ("schedules", "targets", "autotune_logs")  # folders of the top level that are installed in the package
FILE = re.compile(
    r"^```(?:python|toml)\n# ((?:mest_compile|schedules|targets)/\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL
)
PATH = re.compile(r"`([\w.-]+/(?:[\w./-]+/|[\w./-]+\.py)?)[`:]")
MADE = {".device/", "benchmarks/environments/"}  # folders that commands make

NEW = ("pair", "stripes", "old-laptop", "softsign", "flip", "flip", "flip", "poisson", "adagrad", "debug")
# Contract tests that walk registries: of these the parts that are about what is new.
WALKS = (
    "contracts/test_plug_ins.py",
    "operators/test_operators.py",
    "operators/test_losses.py",
    "operators/test_optimizers.py",
    "operators/test_activations.py",
    "operators/test_nonfinite.py",
)
ON_OPENCL = "operators/test_opencl_kernels.py"
# torch's softsign is made of several operators, and its gradient a difference of two: NaN where an infinite one comes.
NOT = "operators/test_activations.py::test_value_and_gradient_are_torchs_at_kinks_and_infinities_too[softsign]"
ABOUT = "newcomers or Pair or softsign or poisson or adagrad"


@pytest.mark.docs
@pytest.mark.slow
def test_the_files_that_it_shows_are_plug_ins_that_pass_every_test_and_train(repository, tmp_path):
    files = FILE.findall((repository / "CONTRIBUTING.md").read_text())
    assert len(files) == len(NEW)
    package, skipped = tmp_path / "mest_compile", shutil.ignore_patterns("__pycache__")
    for folder in ("mest_compile", "tests", "benchmarks"):
        shutil.copytree(repository / folder, tmp_path / folder, ignore=skipped)
    shutil.copy(repository / "pyproject.toml", tmp_path)
    for folder in INSIDE:
        shutil.copytree(repository / folder, package / folder, ignore=skipped)
    for (name, text), new in zip(files, NEW, strict=True):
        path = tmp_path / name if name.startswith("mest_compile") else package / name
        assert not path.exists() and new in name
        if not path.parent.exists():
            path.parent.mkdir()
            (path.parent / "__init__.py").touch()
        path.write_text(text)
    walks = [*WALKS, *([ON_OPENCL] if importlib.util.find_spec("pyopencl") else [])]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rA",
            "-k",
            ABOUT,
            "--deselect",
            f"tests/{NOT}",
            "tests/contracts/newcomers.py",
        ]
        + [f"tests/{path}" for path in walks],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    passed = set(re.findall(r"^PASSED (\S+)", done.stdout, re.MULTILINE))
    for path in walks:  # every walk met what is new
        assert any(test.startswith(f"tests/{path}::") for test in passed), path
    for new in ("Pair", "PoissonNLL", "Adagrad", "pair", "softsign"):
        assert any(f"[{new}" in test or f"-{new}]" in test for test in passed), new


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
            if path.name in ("test_import_order.py", "newcomers.py"):  # of modules that are not there
                continue
            for module, names in set(re.findall(r"from (mest_compile[\w.]*) import ([\w, ]+)", path.read_text())):
                for name in {name.split()[0] for name in names.split(",") if name.strip()}:
                    if not hasattr(importlib.import_module(module), name):
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

"""The wheel holds what the folders hold, and what is installed works without the repository."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

FOLDERS = {
    "mest_compile": "mest_compile",
    "mest_compile/schedules": "schedules",
    "mest_compile/targets": "targets",
    "mest_compile/autotune_logs": "autotune_logs",
}
WITHOUT_CACHES = shutil.ignore_patterns("__pycache__", "*.pyc")


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory) -> Path:
    """Of the source distribution, which is built from a copy, because setuptools puts stale files of an earlier build/
    into later wheels."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, copy / name)
    for folder in FOLDERS.values():
        shutil.copytree(repository / folder, copy / folder, ignore=WITHOUT_CACHES)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", "out", "."],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = (copy / "out").glob("*.whl")
    assert list((copy / "out").glob("*.tar.gz"))
    return built


def test_wheel_holds_every_file_of_the_folders(wheel, repository):
    wanted = {
        f"{inside}/{file.relative_to(repository / folder)}"
        for inside, folder in FOLDERS.items()
        for file in (repository / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == wanted, (
        f"missing {sorted(wanted - found)}, extra {sorted(found - wanted)}: see packages in pyproject.toml"
    )


def test_wheel_works_without_the_repository(wheel, repository, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import mest_compile, mest_compile.schedules as schedules; from mest_compile.hardware.target import "
        "find_target;"
        "print(mest_compile.__file__, schedules.__file__, find_target('local').device, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    package, schedules, device = done.stdout.splitlines()
    site = str(tmp_path / "site" / "mest_compile")
    assert package.startswith(site) and schedules.startswith(site) and device == "cpu"


def test_editable_install_finds_the_mapped_folders(repository, tmp_path):
    script = "import mest_compile.schedules, mest_compile.autotune_logs as logs; print(logs.__file__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == repository / "autotune_logs" / "__init__.py"


def test_what_installs_torch_keeps_to_the_bound_of_pyproject(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    (bound,) = [name for name in project["dependencies"] if name.startswith("torch")]
    assert f'pip install "{bound}" --index-url' in (repository / "docs" / "getting-started.md").read_text()
    (made,) = re.findall("^TORCH := (.*)$", (repository / "Makefile").read_text(), re.MULTILINE)
    below = made.partition("<")[2]
    newest = f"{Version(below).major}.{Version(below).minor - 1}"
    assert newest in Requirement(made).specifier and newest in Requirement(bound).specifier
    assert made.partition("<")[0] == bound.partition("<")[0]


def test_make_venv_does_nothing_when_it_is_current(repository, tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(repository / name, tmp_path / name)
    stamp = tmp_path / ".venv" / ".installed-for-pyproject"
    stamp.parent.mkdir()
    stamp.touch()

    def current() -> bool:
        return subprocess.run(["make", "--question", "venv"], cwd=tmp_path, capture_output=True).returncode == 0

    os.utime(tmp_path / "pyproject.toml", (1, 1))
    assert current()
    os.utime(stamp, (0, 0))
    assert not current()


def test_ci_runs_lint_and_then_the_tests(repository):
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    *_, before, last = (line.split("#")[0].split() for line in lines if line.startswith("make "))
    assert lines[1] == "set -euo pipefail" and "lint" in before and last == ["make", "test"]

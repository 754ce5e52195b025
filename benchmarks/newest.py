"""The tests of import and steps under another Python and the newest torch: `python benchmarks/newest.py PYTHON`.

Makes benchmarks/environments/PYTHON with that interpreter (a program, as python3.13), whatever torch pip gives it from
2.9 on, what else pyproject.toml asks for in the newest versions that it takes, and the wheel that is built of the
source distribution of what is committed; runs the tests in a folder without the package's sources; and keeps what came
of them in benchmarks/results/newest.json, an entry a Python and torch. Gigabytes where pip's torch has CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from mest_compile.base.files import write_json
from mest_compile.measuring.machine import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "newest.json"
FOLDER = ROOT / "benchmarks" / "environments"
TESTS = ("tests/frontend", "tests/runtime/test_step.py", "tests/runtime/test_method_step.py", "tests/models")
TOLD = ("python", "torch", "apache-tvm", "apache-tvm-ffi", "numpy", "onnx")
VERSIONS = (
    "import json, platform, sys; from importlib import metadata; print(json.dumps({name: platform.python_version() if "
    "name == 'python' else metadata.version(name) for name in sys.argv[1:]}))"
)


def requirements(project: dict[str, Any]) -> list[str]:
    """What pyproject.toml asks for, extras `dev` and those in it among them, but torch, which comes first and alone."""
    extras, found, waiting = project["optional-dependencies"], [], [*project["dependencies"], f"{project['name']}[dev]"]
    while waiting:
        one = Requirement(waiting.pop(0))
        if one.name == project["name"]:
            waiting += [text for extra in one.extras for text in extras[extra]]
        elif one.name != "torch":
            found.append(str(one))
    return found


def make(program: str, folder: Path) -> tuple[Path, Path]:
    """(the environment's interpreter, a folder with the tests and what else is no part of the wheel)."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([program, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--upgrade", "torch>=2.9"], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    subprocess.run([*pip, *requirements(project)], check=True)
    source, built = folder / "source", folder / "built"
    for stale in (source, built):
        shutil.rmtree(stale, ignore_errors=True)
    archive = folder / "source.tar"
    subprocess.run(["git", "archive", "--output", archive, "HEAD"], cwd=ROOT, check=True)
    with tarfile.open(archive) as committed:
        committed.extractall(source, filter="data")
    build = [python, "-m", "build", "--no-isolation", "--outdir", built, source]  # sdist, and the wheel out of it
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = built.glob("*.whl")
    subprocess.run([*pip, "--no-deps", "--force-reinstall", wheel], check=True)
    for part in ("mest_compile", "schedules", "targets", "autotune_logs"):
        shutil.rmtree(source / part)
    return python, source


def outcome(report: Path) -> dict[str, Any]:
    """{"passed", "skipped": numbers, "failed": names} of pytest's JUnit file."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    kinds = [{child.tag for child in case} for case in cases]
    failed = [
        f"{one.get('classname')}::{one.get('name')}" for one, kind in zip(cases, kinds) if kind & {"failure", "error"}
    ]
    skipped = sum("skipped" in kind for kind in kinds)
    return {"passed": len(cases) - skipped - len(failed), "skipped": skipped, "failed": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("python", help="an interpreter: python3.13, or the path of one")
    program = parser.parse_args().python
    folder = FOLDER / Path(program).name
    python, source = make(program, folder)
    told = subprocess.run([python, "-c", VERSIONS, *TOLD], check=True, capture_output=True, text=True).stdout
    report, one = folder / "tests.xml", {"OMP_NUM_THREADS": "1"}
    asked = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not thorough",
        f"--junit-xml={report}",
        *TESTS,
    ]
    subprocess.run(asked, cwd=source, env={**os.environ, **one})
    versions = json.loads(told)
    entry = {
        "versions": versions,
        "tests": list(TESTS),
        **outcome(report),
        "machine": machine(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["entries"] if RESULTS.exists() else {}
    kept[f"python {versions['python']} torch {versions['torch']}"] = entry
    write_json(RESULTS, {"command": "python benchmarks/newest.py python3.13", "entries": kept})
    print(json.dumps(entry, indent=1))
    return 1 if entry["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

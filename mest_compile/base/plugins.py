"""Plug-ins that lie outside the package: Python files that register what those in its folders do, and targets."""

from __future__ import annotations

import importlib.util
import os
import sys
from hashlib import sha256
from pathlib import Path

from mest_compile.base.errors import MestError, UsageError

GIVEN = "MEST_COMPILE_PLUGINS"  # paths, as PATH has them: what this process starts has its plug-ins by that
_targets: dict[str, Path] = {}


def plug_in(*paths: str | os.PathLike) -> None:
    """Takes files for this process and those that it starts, once each: a scheme, an operator, an activation, a
    schedule, a loss, an optimizer or a data source in Python (CONTRIBUTING.md has one of each), or a target's TOML
    file, whose name is the target's. Call it before anything is compiled.

    Raises UsageError where a file cannot be read or imported, DuplicateName where a name is there already.
    """
    for path in map(Path, paths):
        file = path.resolve()
        if not file.is_file() or file.suffix not in (".py", ".toml"):
            raise UsageError(f"plug-in {path} is no Python file and no target's .toml file that is there")
        if os.pathsep in str(file):
            raise UsageError(f"plug-in {path} has {os.pathsep!r} in its path; move it")
        _take(file)
        there = given()
        if file not in there:
            os.environ[GIVEN] = os.pathsep.join(map(str, [*there, file]))


def take_given() -> None:
    """Those of the process that started this one."""
    for file in given():
        _take(file)


def targets() -> dict[str, Path]:
    """{name: its file} of the targets that were plugged in."""
    return dict(_targets)


def given() -> list[Path]:
    """The files that this process and those that it starts have taken, or will."""
    return [Path(path) for path in os.environ.get(GIVEN, "").split(os.pathsep) if path]


def _take(file: Path) -> None:
    if file.suffix == ".toml":
        _targets[file.stem] = file
        return
    name = f"mest_compile_plugin_{file.stem}_{sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as problem:
        del sys.modules[name]
        if isinstance(problem, MestError) or not isinstance(problem, Exception):
            raise
        raise UsageError(f"plug-in {file} cannot be imported: {type(problem).__name__}: {problem}") from problem

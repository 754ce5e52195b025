"""Artifacts: a folder with all that a device needs to train, and the runner that does it with numpy, tvm_ffi and TVM's
runtime library.

step.so            kernels and the virtual machine's executable
state.safetensors  a checkpoint: weights, optimizer state, statistics, masks
manifest.json      format, versions, what the step was compiled from, size and digest of the files, and a digest of all
                   that
Index arrays are made from the masks when the artifact is opened, and by every mutation: kernels read them, nothing is
compiled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mest_compile import __version__
from mest_compile.base.errors import BuildError, StateError, TargetError, UsageError
from mest_compile.base.files import write_json
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.cpu import host_machine, lacking_features
from mest_compile.hardware.target import needed_features
from mest_compile.ir.program import Program
from mest_compile.kernels.elf import read_library
from mest_compile.models.sources import CHECKPOINTS
from mest_compile.planning.facts import Facts
from mest_compile.runtime.compiled import Compiled, Knobs

FORMAT = "mest-compile artifact 2"
LIBRARY, STATE, MANIFEST = "step.so", CHECKPOINTS[1], "manifest.json"


def write(
    compiled: Compiled,
    save: Callable[[Path], None],
    path: str | os.PathLike,
    coming: Sequence[tuple[Facts, Knobs]] = (),
) -> dict[str, Any]:
    """Writes a step as an artifact, whole or not at all; returns its manifest. save: writes its state to a file;
    coming: what the step will become as it freezes. Raises UsageError, BuildError, NotInstalled.
    """
    path = Path(path)
    if compiled.library is None:
        raise UsageError(
            "a step that was opened from an artifact has no compiler to make another; copy its folder and a checkpoint"
        )
    if not backend_of(compiled.facts.target).processor:
        raise UsageError(
            f"target {compiled.facts.target.name!r} is an OpenCL device, artifacts are for CPUs; drive the "
            "device over a "
            "tracker (docs/devices.md), or build for its CPU"
        )
    _check_place(path)
    manifest = {
        "format": FORMAT,
        "versions": {"mest-compile": __version__, "apache-tvm": metadata.version("apache-tvm")},
        "facts": dict(compiled.document),
        "features": sorted(needed_features(compiled.facts.target)),
        "functions": _signatures(compiled.train, compiled.predict),
        **({"coming": [_signatures(*facts.lower()) for facts, _ in coming]} if coming else {}),
    }
    return _put(path, manifest, compiled.library(coming), lambda made: save(made / STATE))


def with_files(source: str | os.PathLike, fill: Callable[[Path], None], path: str | os.PathLike) -> dict[str, Any]:
    """Writes an artifact again with another state of its step, whole or not at all; no compiler is needed.

    fill  writes the state as STATE into a folder, and what else is to lie beside it
    Raises StateError, UsageError.
    """
    manifest, files = _read(Path(source))
    _check_place(Path(path))
    return _put(Path(path), manifest, files[LIBRARY], fill)


def _check_place(path: Path) -> None:
    if path.exists() and not (path / MANIFEST).is_file():
        raise UsageError(f"{path} is there and is no artifact; pass another path")


def _put(path: Path, manifest: dict[str, Any], library: bytes, fill: Callable[[Path], None]) -> dict[str, Any]:
    """manifest: all that it says but the facts of files, and its digest; fill: writes all but it and the library."""
    try:
        place = path.resolve()  # where a link leads
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=place.parent, prefix=f".{place.name}.", ignore_cleanup_errors=True
        ) as scratch:
            made = Path(scratch) / "new"
            made.mkdir()
            _write(made / LIBRARY, library)
            fill(made)
            manifest["files"] = {name: _facts_of((made / name).read_bytes()) for name in (LIBRARY, STATE)}
            manifest["digest"] = _digest(manifest)
            write_json(made / MANIFEST, manifest)
            made.chmod(0o755)
            _take_place(made, place, Path(f"{scratch}.old"))
    except OSError as problem:
        raise UsageError(
            f"artifact {path} cannot be written: {problem.strerror}; one that was there is untouched"
        ) from problem
    return manifest


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _take_place(made: Path, path: Path, old: Path) -> None:
    """Gives a folder the name `path`. What had that name waits under the name `old`, and gets its own again when the
    new one cannot take its place. Others may do the same at the same time: the last one's is left.
    """
    while not _moved(made, path):
        try:
            os.replace(path, old)
            done = _moved(made, path)
        except FileNotFoundError:  # another one is quicker
            continue
        except BaseException:
            if old.exists() and not _moved(old, path):
                shutil.rmtree(old, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
        if done:
            return


def _moved(folder: Path, path: Path) -> bool:
    """Gives a folder the name `path`; False when a folder has it that is not empty."""
    try:
        os.replace(folder, path)
        return True
    except OSError as problem:
        if problem.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise


def size_bytes(manifest: Mapping[str, Any]) -> int:
    return sum(entry["bytes"] for entry in manifest["files"].values())


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(manifest, content of each file), of which every byte that decides anything is what was written. Raises
    StateError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            raise StateError(f"{path} is of format {manifest.get('format')!r}, this version reads {FORMAT!r}")
        if manifest.pop("digest") != _digest(manifest):
            raise ValueError("it is not what was written")
        files = {name: (path / name).read_bytes() for name in (LIBRARY, STATE)}
        for name, content in files.items():
            if _facts_of(content) != manifest["files"][name]:
                raise StateError(
                    f"{path / name} is not what was built (size or SHA-256 differ); copy the artifact again"
                )
        return manifest, files
    except FileNotFoundError as problem:
        raise StateError(
            f"{path} is no whole artifact: {Path(problem.filename).name} is missing; make one with mest-compile build"
        ) from problem
    except OSError as problem:
        raise StateError(
            f"artifact {path} cannot be read: {Path(problem.filename or path).name}: {problem.strerror}"
        ) from problem
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as problem:
        raise StateError(f"{path / MANIFEST} is damaged ({problem}); copy the artifact again") from problem


def _digest(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says but its digest, whatever its layout as text."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _facts_of(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _signatures(train: Program, predict: Program) -> dict[str, list[list[Any]]]:
    """The arrays that each program takes, in order: what the library and who calls it must agree on."""
    return {
        program.name: [[buffer.name, buffer.dtype, buffer.elems] for buffer in program.held()]
        for program in (train, predict)
    }


def _check_host(path: Path, library: bytes, facts: Facts, features: list[str]) -> None:
    """Raises TargetError when this machine is not one that the library was compiled for. features: that its code may
    use."""
    try:
        machine = read_library(library, str(path / LIBRARY)).machine
    except BuildError as problem:
        raise StateError(str(problem)) from problem
    if machine != host_machine():
        raise TargetError(
            f"artifact {path} is for {machine}, target {facts.target.name!r}; this machine is {host_machine()}: "
            "build it for "
            "this machine's target"
        )
    if lacking := lacking_features(features):
        raise TargetError(
            f"artifact {path} is for {facts.target.tvm_fields.get('mcpu')}, target {facts.target.name!r}; this "
            "machine's CPU "
            f"lacks {', '.join(lacking)}: build it for a target that does without"
        )

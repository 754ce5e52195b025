"""Artifacts: a folder with all that a device needs to train, and the runner that does it with numpy, tvm_ffi and TVM's runtime library.

step.so            kernels and the virtual machine's executable
state.safetensors  a checkpoint: weights, momentum, statistics, masks
manifest.json      format, versions, what the step was compiled from, size and digest of the files, and a digest of all that
Index arrays are made from the masks when the artifact is opened, and by every mutation: kernels read them, nothing is compiled.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile import __version__, checks, exclusive
from mest_compile.elf import read_library
from mest_compile.errors import BuildError, DeviceError, NotInstalled, StateError, TargetError, UsageError
from mest_compile.facts import Facts, read_facts
from mest_compile.graph.program import FUNCTIONS, Program, Stage
from mest_compile.hardware import host_machine, lacking_features, needed_features
from mest_compile.host import cores
from mest_compile.loading import load_library
from mest_compile.runfolder import write_json
from mest_compile.runtime import checkpoint

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep

FORMAT = "mest-compile artifact 2"
LIBRARY, STATE, MANIFEST = "step.so", "state.safetensors", "manifest.json"
RUNTIME = "libtvm_runtime.so"
ALIGN_BYTES = 64  # of every array: vectorised kernels assume it
CPU, POOLED = 1, 2  # DLPack's device, TVM's allocator that hands the same memory out again


def write(step: TrainStep, path: str | os.PathLike) -> dict[str, Any]:
    """Writes the step as an artifact, whole or not at all; returns its manifest. Raises UsageError, BuildError, NotInstalled."""
    compiled, path = step._compiled, Path(path)
    if compiled.library is None:
        raise UsageError("a step that was opened from an artifact has no compiler to make another; copy its folder and a checkpoint")
    if compiled.facts.target.device == "opencl":
        raise UsageError(f"target {compiled.facts.target.name!r} is an OpenCL device, artifacts are for CPUs; drive the device over a "
                         "tracker (docs/devices.md), or build for its CPU")
    if path.exists() and not (path / MANIFEST).is_file():
        raise UsageError(f"{path} is there and is no artifact; pass another path")
    content = compiled.library()
    try:
        place = path.resolve()  # where a link leads
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.", ignore_cleanup_errors=True) as scratch:
            made = Path(scratch) / "new"
            made.mkdir()
            _write(made / LIBRARY, content)
            step.save(made / STATE)
            manifest = {"format": FORMAT, "versions": {"mest-compile": __version__, "apache-tvm": metadata.version("apache-tvm")},
                        "facts": dict(compiled.document), "features": sorted(needed_features(compiled.facts.target)),
                        "functions": _signatures(compiled.train, compiled.predict),
                        "files": {name: _facts_of((made / name).read_bytes()) for name in (LIBRARY, STATE)}}
            manifest["digest"] = _digest(manifest)
            write_json(made / MANIFEST, manifest)
            made.chmod(0o755)
            _take_place(made, place, Path(f"{scratch}.old"))
    except OSError as problem:
        raise UsageError(f"artifact {path} cannot be written: {problem.strerror}; one that was there is untouched") from problem
    return manifest


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _take_place(made: Path, path: Path, old: Path) -> None:
    """Gives a folder the name `path`. What had that name waits under the name `old`, and gets its own again when the new one cannot take
    its place. Others may do the same at the same time: the last one's is left.
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


def open_artifact(path: str | os.PathLike, threads: int | None = None, runtime: str | os.PathLike | None = None) -> TrainStep:
    """The step of an artifact, to train here: no compiler, no torch, no tvm package.

    threads  None: as many as it was built for, at most the cores there are
    runtime  TVM's libtvm_runtime.so; None: in the artifact's folder, in an installed tvm package, or where the system looks
    Raises StateError when files are damaged, TargetError when this machine lacks what the kernels use, NotInstalled.
    """
    from mest_compile.runtime.step import Compiled, TrainStep

    exclusive.this_process()
    path = Path(path)
    manifest, files = _read(path)
    facts = read_facts(manifest["facts"], f"artifact {path}")
    _check_host(path, files[LIBRARY], facts, manifest["features"])
    train, predict = facts.lower()
    if manifest["functions"] != _signatures(train, predict):
        raise StateError(f"artifact {path} was built by mest-compile {manifest['versions']['mest-compile']}, whose steps have other arrays "
                         f"than those of {__version__}, which is installed here; use the same version on both sides")
    functions = {name: ({"train": train, "predict": predict}[program], stages) for name, (program, stages) in FUNCTIONS.items()}
    wanted = facts.threads if threads is None else checks.whole("threads", threads, 1, ", or None for as many as it was built for")
    module = _load(path, files[LIBRARY], find_runtime(path, runtime))
    runner = partial(LibraryRunner, module, functions, min(wanted, cores()))

    def dense() -> TrainStep:
        raise DeviceError("gradients of dead weights need a dense step, which an artifact does not have; use method em, em_s or set")

    zeros = {name: np.zeros(shape, np.float32) for name, shape in facts.graph.state_shapes.items()}
    step = TrainStep(Compiled(facts, train, predict, manifest["facts"], runner), zeros, dense)
    step._restore(*checkpoint.unpack(files[STATE], path / STATE), path / STATE)
    return step


def find_runtime(path: Path, given: str | os.PathLike | None = None) -> Path | str:
    """TVM's runtime library. Raises NotInstalled."""
    if given is not None:
        if not Path(given).is_file():
            raise NotInstalled(f"no TVM runtime library {given}; give the path of {RUNTIME}")
        return Path(given).resolve()
    if (path / RUNTIME).is_file():
        return (path / RUNTIME).resolve()
    package = importlib.util.find_spec("tvm")  # found, not imported
    for folder in (package.submodule_search_locations or []) if package else []:
        if (there := Path(folder) / "lib" / RUNTIME).is_file():
            return there
    try:
        ctypes.CDLL(RUNTIME)
        return RUNTIME
    except OSError as problem:
        raise NotInstalled(f"TVM's {RUNTIME} is not here: take it out of the apache-tvm wheel for this machine and put it into {path}, or "
                           "pass its path") from problem


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(manifest, content of each file), of which every byte that decides anything is what was written. Raises StateError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            raise StateError(f"{path} is of format {manifest.get('format')!r}, this version reads {FORMAT!r}")
        if manifest.pop("digest") != _digest(manifest):
            raise ValueError("it is not what was written")
        files = {name: (path / name).read_bytes() for name in (LIBRARY, STATE)}
        for name, content in files.items():
            if _facts_of(content) != manifest["files"][name]:
                raise StateError(f"{path / name} is not what was built (size or SHA-256 differ); copy the artifact again")
        return manifest, files
    except FileNotFoundError as problem:
        raise StateError(f"{path} is no whole artifact: {Path(problem.filename).name} is missing; make one with "
                         "mest-compile build") from problem
    except OSError as problem:
        raise StateError(f"artifact {path} cannot be read: {Path(problem.filename or path).name}: {problem.strerror}") from problem
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as problem:
        raise StateError(f"{path / MANIFEST} is damaged ({problem}); copy the artifact again") from problem


def _digest(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says but its digest, whatever its layout as text."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _facts_of(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _signatures(train: Program, predict: Program) -> dict[str, list[list[Any]]]:
    """The arrays that each program takes, in order: what the library and who calls it must agree on."""
    return {program.name: [[buffer.name, buffer.dtype, buffer.elems] for buffer in program.held()] for program in (train, predict)}


def _check_host(path: Path, library: bytes, facts: Facts, features: list[str]) -> None:
    """Raises TargetError when this machine is not one that the library was compiled for. features: that its code may use."""
    try:
        machine = read_library(library, str(path / LIBRARY)).machine
    except BuildError as problem:
        raise StateError(str(problem)) from problem
    if machine != host_machine():
        raise TargetError(f"artifact {path} is for {machine}, target {facts.target.name!r}; this machine is {host_machine()}: build it for "
                          "this machine's target")
    if lacking := lacking_features(features):
        raise TargetError(f"artifact {path} is for {facts.target.tvm_fields.get('mcpu')}, target {facts.target.name!r}; this machine's CPU "
                          f"lacks {', '.join(lacking)}: build it for a target that does without")


def _load(path: Path, library: bytes, runtime: Path | str) -> Any:
    """The module of a library, which needs TVM's runtime: `runtime`, unless this process has one, for there can be only one. Raises
    NotInstalled, DeviceError.
    """
    # One thread would be tied to a core, with all threads that it starts; and TVM takes half of the cores for second threads of others.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_NUM_THREADS", str(cores()))
    try:
        import tvm_ffi
    except ImportError as problem:
        raise NotInstalled(f"tvm_ffi cannot be imported ({problem}); run: pip install apache-tvm-ffi==0.1.14.post1") from problem
    try:
        if tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is None:
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)  # stays, as libraries do that ctypes opens
        return load_library(library, [path.resolve().parent])
    except (OSError, RuntimeError) as problem:
        raise DeviceError(f"{path / LIBRARY} cannot be loaded: {problem}") from problem


class LibraryRunner:
    """A step's arrays and a shared library in this process, through tvm_ffi alone.

    module    what `linking.link_step` made, loaded
    programs  what `run` runs, by name: a program and the stages of it
    """

    uploaded_bytes = 0  # nothing leaves this process

    def __init__(self, module: Any, programs: Mapping[str, tuple[Program, tuple[Stage, ...]]], threads: int):
        import tvm_ffi

        self._ffi, self._module = tvm_ffi, module
        self._programs, self._threads = programs, threads
        self._threadpool = tvm_ffi.get_global_func("runtime.config_threadpool")
        self._machine = module["vm_load_executable"]()
        self._machine["vm_initialization"](CPU, 0, POOLED)
        self._functions = {name: self._machine[name] for name in programs}
        self._held: dict[str, tuple[np.ndarray, Any]] = {}  # with the tensor in its memory
        self._arguments: dict[str, list] = {}

    def put(self, name: str, array: np.ndarray) -> None:
        """Copies an array, flat, into the one of that name; a new size makes a new one."""
        flat, held = np.asarray(array).ravel(), self._held.get(name)
        if held is None or held[0].size != flat.size or held[0].dtype != flat.dtype:
            self._arguments.clear()  # first, and then all at once: an interruption leaves no arguments that are not what is held
            there = _aligned(flat.size, flat.dtype)
            self._held[name] = held = there, self._ffi.from_dlpack(there)
        held[0][...] = flat

    def get(self, name: str) -> np.ndarray:
        """A copy of the array of that name."""
        return self._held[name][0].copy()

    def run(self, function: str) -> None:
        """Runs one of `programs`."""
        self._threadpool(1, self._threads)
        if function not in self._arguments:
            self._arguments[function] = [self._held[buffer.name][1] for buffer in self._programs[function][0].held()]
        self._functions[function](*self._arguments[function])

    def profile(self, function: str, repeats: int) -> dict[str, float]:
        raise DeviceError("an artifact's step cannot be profiled call by call; compile it on this machine and profile that")


def _aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """A new array that starts at a multiple of ALIGN_BYTES."""
    room = np.empty(size * dtype.itemsize + ALIGN_BYTES, np.uint8)
    start = -room.ctypes.data % ALIGN_BYTES
    return room[start:start + size * dtype.itemsize].view(dtype)

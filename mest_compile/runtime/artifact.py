"""Artifacts: a folder with all that a device needs to train, and the runner that does it with numpy, tvm_ffi and TVM's runtime library.

step.so            kernels and the virtual machine's executable
state.safetensors  a checkpoint: weights, momentum, statistics, masks
manifest.json      format, versions, what the step was compiled from, size and digest of the files
Index arrays are made from the masks when the artifact is opened, and by every mutation: kernels read them, nothing is compiled.
"""

from __future__ import annotations

import ctypes
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

from mest_compile import __version__
from mest_compile.elf import read_library
from mest_compile.errors import BuildError, DeviceError, NotInstalled, StateError, TargetError, UsageError
from mest_compile.facts import Facts
from mest_compile.graph.program import FUNCTIONS, Program, Stage
from mest_compile.hardware import host_machine, lacking_features, needed_features
from mest_compile.runfolder import write_json

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep

FORMAT = "mest-compile artifact 1"
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
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as problem:
        raise UsageError(f"artifact {path} cannot be written: {problem.strerror}") from problem
    try:
        (made / LIBRARY).write_bytes(content)
        step.save(made / STATE)
        manifest = {"format": FORMAT, "versions": {"mest-compile": __version__, "apache-tvm": metadata.version("apache-tvm")},
                    "facts": dict(compiled.document), "features": sorted(needed_features(compiled.facts.target)),
                    "functions": _signatures(compiled.train, compiled.predict),
                    "files": {name: _facts_of(made / name) for name in (LIBRARY, STATE)}}
        write_json(made / MANIFEST, manifest)
        made.chmod(0o755)
        if path.exists():
            old = made.with_name(made.name + ".old")
            os.replace(path, old)
            os.replace(made, path)
            shutil.rmtree(old)
        else:
            os.replace(made, path)
    except OSError as problem:
        raise UsageError(f"artifact {path} cannot be written: {problem.strerror}") from problem
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return manifest


def size_bytes(manifest: Mapping[str, Any]) -> int:
    return sum(entry["bytes"] for entry in manifest["files"].values())


def open_artifact(path: str | os.PathLike, threads: int | None = None, runtime: str | os.PathLike | None = None) -> TrainStep:
    """The step of an artifact, to train here: no compiler, no torch, no tvm package.

    threads  None: as many as it was built for, at most the cores there are
    runtime  TVM's libtvm_runtime.so; None: in the artifact's folder, in an installed tvm package, or where the system looks
    Raises StateError when files are damaged, TargetError when this machine lacks what the kernels use, NotInstalled.
    """
    from mest_compile.runtime.step import Compiled, TrainStep

    path = Path(path)
    manifest = _read_manifest(path)
    try:
        facts = Facts.from_json(manifest["facts"])
        signatures, features = manifest["functions"], manifest["features"]
    except (KeyError, TypeError) as problem:
        raise StateError(f"{path / MANIFEST} lacks {problem}; the artifact is of another version of mest-compile") from problem
    _check_host(path, facts, features)
    train, predict = facts.lower()
    if signatures != _signatures(train, predict):
        raise StateError(f"artifact {path} was built by mest-compile {manifest['versions']['mest-compile']}, whose steps have other arrays "
                         f"than those of {__version__}, which is installed here; use the same version on both sides")
    functions = {name: ({"train": train, "predict": predict}[program], stages) for name, (program, stages) in FUNCTIONS.items()}
    wanted = facts.threads if threads is None else threads
    runner = partial(LibraryRunner, path / LIBRARY, functions, min(wanted, len(os.sched_getaffinity(0))), find_runtime(path, runtime))

    def dense() -> TrainStep:
        raise DeviceError("gradients of dead weights need a dense step, which an artifact does not have; use method em, em_s or set")

    zeros = {name: np.zeros(shape, np.float32) for name, shape in facts.graph.state_shapes.items()}
    step = TrainStep(Compiled(facts, train, predict, manifest["facts"], runner), zeros, dense)
    step.restore(path / STATE)
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


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest.get("format") != FORMAT:
            raise StateError(f"{path} is of format {manifest.get('format')!r}, this version reads {FORMAT!r}")
        for name, wanted in manifest["files"].items():
            if _facts_of(path / name) != wanted:
                raise StateError(f"{path / name} is not what was built (size or SHA-256 differ); copy the artifact again")
        return manifest
    except FileNotFoundError as problem:
        raise StateError(f"{path} is no whole artifact: {Path(problem.filename).name} is missing; make one with "
                         "mest-compile build") from problem
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as problem:
        raise StateError(f"{path / MANIFEST} is damaged ({problem!r}); copy the artifact again") from problem


def _facts_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _signatures(train: Program, predict: Program) -> dict[str, list[list[Any]]]:
    """The arrays that each program takes, in order: what the library and who calls it must agree on."""
    return {program.name: [[buffer.name, buffer.dtype, buffer.elems] for buffer in program.held()] for program in (train, predict)}


def _check_host(path: Path, facts: Facts, features: list[str]) -> None:
    """Raises TargetError when this machine is not one that the library was compiled for. features: that its code may use."""
    try:
        machine = read_library((path / LIBRARY).read_bytes(), str(path / LIBRARY)).machine
    except BuildError as problem:
        raise StateError(str(problem)) from problem
    if machine != host_machine():
        raise TargetError(f"artifact {path} is for {machine}, target {facts.target.name!r}; this machine is {host_machine()}: build it for "
                          "this machine's target")
    if lacking := lacking_features(features):
        raise TargetError(f"artifact {path} is for {facts.target.tvm_fields.get('mcpu')}, target {facts.target.name!r}; this machine's CPU "
                          f"lacks {', '.join(lacking)}: build it for a target that does without")


class LibraryRunner:
    """A step's arrays and a shared library in this process, through tvm_ffi alone.

    library   path of what `linking.link_step` made
    programs  what `run` runs, by name: a program and the stages of it
    runtime   TVM's runtime library
    """

    uploaded_bytes = 0  # nothing leaves this process

    def __init__(self, library: Path, programs: Mapping[str, tuple[Program, tuple[Stage, ...]]], threads: int, runtime: Path | str):
        # One thread would be tied to a core, with all threads that it starts; and TVM takes half of the cores for second threads of others.
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        try:
            import tvm_ffi
        except ImportError as problem:
            raise NotInstalled(f"tvm_ffi cannot be imported ({problem}); run: pip install apache-tvm-ffi==0.1.14.post1") from problem
        self._ffi = tvm_ffi
        try:
            self._runtime = ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
            module = tvm_ffi.load_module(str(library.resolve()))
        except (OSError, RuntimeError) as problem:
            raise DeviceError(f"{library} cannot be loaded: {problem}") from problem
        self._programs, self._threads = programs, threads
        self._threadpool = tvm_ffi.get_global_func("runtime.config_threadpool")
        self._machine = module["vm_load_executable"]()
        self._machine["vm_initialization"](CPU, 0, POOLED)
        self._functions = {name: self._machine[name] for name in programs}
        self._arrays: dict[str, np.ndarray] = {}
        self._tensors: dict[str, Any] = {}
        self._arguments: dict[str, list] = {}

    def put(self, name: str, array: np.ndarray) -> None:
        """Copies an array, flat, into the one of that name; a new size makes a new one."""
        flat, there = np.asarray(array).ravel(), self._arrays.get(name)
        if there is None or there.size != flat.size or there.dtype != flat.dtype:
            self._arrays[name] = there = _aligned(flat.size, flat.dtype)
            self._tensors[name] = self._ffi.from_dlpack(there)
            self._arguments.clear()
        there[...] = flat

    def get(self, name: str) -> np.ndarray:
        """A copy of the array of that name."""
        return self._arrays[name].copy()

    def run(self, function: str) -> None:
        """Runs one of `programs`."""
        self._threadpool(1, self._threads)
        if function not in self._arguments:
            self._arguments[function] = [self._tensors[buffer.name] for buffer in self._programs[function][0].held()]
        self._functions[function](*self._arguments[function])

    def profile(self, function: str, repeats: int) -> dict[str, float]:
        raise DeviceError("an artifact's step cannot be profiled call by call; compile it on this machine and profile that")


def _aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """A new array that starts at a multiple of ALIGN_BYTES."""
    room = np.empty(size * dtype.itemsize + ALIGN_BYTES, np.uint8)
    start = -room.ctypes.data % ALIGN_BYTES
    return room[start:start + size * dtype.itemsize].view(dtype)

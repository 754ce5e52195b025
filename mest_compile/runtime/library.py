"""A step's arrays and a shared library in this process, through tvm_ffi alone."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import DeviceError, NotInstalled
from mest_compile.hardware.host import cores
from mest_compile.hardware.tvmruntime import machine_of, tensor, tvm_ffi
from mest_compile.ir.program import Program, Stage
from mest_compile.kernels.loading import load_library
from mest_compile.runtime.artifact import LIBRARY

RUNTIME = "libtvm_runtime.so"


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
        raise NotInstalled(
            f"TVM's {RUNTIME} is not here: take it out of the apache-tvm wheel for this machine and put it into "
            f"{path}, or "
            "pass its path"
        ) from problem


def _load(path: Path, library: bytes, runtime: Path | str) -> Any:
    """The module of a library, which needs TVM's runtime: `runtime`, unless this process has one, for there can be only
    one. Raises NotInstalled, DeviceError.
    """
    # One thread would be tied to a core, with all threads that it starts; and TVM takes half of the cores for second
    # threads of others.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_NUM_THREADS", str(cores()))
    try:
        found = tvm_ffi()
    except ImportError as problem:
        raise NotInstalled(
            f"tvm_ffi cannot be imported ({problem}); run: pip install apache-tvm-ffi==0.1.14.post1"
        ) from problem
    try:
        if found.get_global_func("runtime.config_threadpool", allow_missing=True) is None:
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)  # stays, as libraries do that ctypes opens
        return load_library(library, [path.resolve().parent])
    except (OSError, RuntimeError) as problem:
        raise DeviceError(f"{path / LIBRARY} cannot be loaded: {problem}") from problem


class LibraryRunner:
    """A step's arrays and a shared library in this process, through tvm_ffi alone.

    module    what `linking.link_step` made, loaded
    programs  what `run` runs, by name: a program and the stages of it
    number    of the step in the library
    """

    uploaded_bytes = 0  # nothing leaves this process

    def __init__(
        self, module: Any, programs: Mapping[str, tuple[Program, tuple[Stage, ...]]], threads: int, number: int = 0
    ):
        self._ffi, self._module = tvm_ffi(), module
        self._programs, self._threads = programs, threads
        self._threadpool = self._ffi.get_global_func("runtime.config_threadpool")
        self._machine = machine_of(module)
        self._functions = {name: self._machine[f"{name}{number or ''}"] for name in programs}
        self._held: dict[str, tuple[np.ndarray, Any]] = {}  # with the tensor in its memory
        self._arguments: dict[str, list] = {}

    def put(self, name: str, array: np.ndarray) -> None:
        """Copies an array, flat, into the one of that name; a new size makes a new one."""
        flat, held = np.asarray(array).ravel(), self._held.get(name)
        if held is None or held[0].size != flat.size or held[0].dtype != flat.dtype:
            # first, and then all at once: an interruption leaves no arguments that are not what is held
            self._arguments.clear()
            self._held[name] = held = tensor(flat.size, flat.dtype)
        held[0][...] = flat

    def get(self, name: str) -> np.ndarray:
        """A copy of the array of that name."""
        return self._held[name][0].copy()

    def spare(self) -> None:
        """Gives back the arena, which TVM's allocator keeps for the next that wants storages of just these sizes."""
        self._ffi.get_global_func("vm.builtin.memory_manager.clear")()

    def run(self, function: str) -> None:
        """Runs one of `programs`."""
        self._threadpool(1, self._threads)
        if function not in self._arguments:
            self._arguments[function] = [self._held[buffer.name][1] for buffer in self._programs[function][0].held()]
        self._functions[function](*self._arguments[function])

    def profile(self, function: str, repeats: int) -> dict[str, float]:
        raise DeviceError(
            "an artifact's step cannot be profiled call by call; compile it on this machine and profile that"
        )

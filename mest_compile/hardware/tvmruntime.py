"""TVM's runtime in this process: what compiled code needs, without the compiler and without torch, which take a second
each to import."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

CPU, POOLED = 1, 2  # DLPack's device, TVM's allocator that hands the same memory out again
ALIGN_BYTES = 64  # of every array: vectorised kernels assume it


def tvm_ffi() -> Any:
    """The package of that name. Raises ImportError."""
    with _without_torch():
        return importlib.import_module("tvm_ffi")


@cache
def runtime() -> Any:
    """The same, with TVM's runtime library in this process, as importing tvm loads it where the package is. Raises
    ImportError."""
    found, package = tvm_ffi(), importlib.util.find_spec("tvm")
    if package is not None and found.get_global_func("runtime.config_threadpool", allow_missing=True) is None:
        folders = [Path(folder) / "lib" for folder in package.submodule_search_locations or []]
        found.libinfo.load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=folders)
    return found


def tensor(size: int, dtype: np.dtype) -> tuple[np.ndarray, Any]:
    """A new flat array, and TVM's tensor in its memory, which starts at a multiple of ALIGN_BYTES."""
    room = np.empty(size * dtype.itemsize + ALIGN_BYTES, np.uint8)
    start = -room.ctypes.data % ALIGN_BYTES
    array = room[start : start + size * dtype.itemsize].view(dtype)
    return array, runtime().from_dlpack(array)


def machine_of(executable: Any) -> Any:
    """A virtual machine that runs it on this processor."""
    machine = executable["vm_load_executable"]()
    machine["vm_initialization"](CPU, 0, POOLED)
    return machine


class _NoTorch:
    """Of `sys.meta_path`: the thread that made it finds no torch."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("torch is not needed here", name=name)


@contextmanager
def _without_torch() -> Iterator[None]:
    """tvm_ffi imports torch first where it is there, as on Windows the two must be loaded in that order."""
    if "torch" in sys.modules or sys.platform == "win32":
        yield
        return
    finder: Any = _NoTorch()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)

"""What a worker process does for a runner: compile a kernel, or run, check and time it. A crash here costs one
trial."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.kernels.cache import Builder
from mest_compile.kernels.linking import link_kernel
from mest_compile.kernels.source import KernelSource
from mest_compile.tuning.task import Arrays

COLD_BYTES = (
    96 * 2**20
)  # of copies of the arguments, beyond the last-level cache: what a call finds cached is what the one before left
MOST_COPIES = 8

_loaded: dict[Path, tuple[Arrays, list[list[Any]]]] = {}


def compile_kernel(source: KernelSource, path: str) -> None:
    """Writes the kernel's library. Raises BuildError, NotInstalled."""
    link_kernel(source, Path(path))


def compile_check_and_time(
    source: KernelSource, arrays_path: str, repeats: int, threads: int
) -> tuple[str | None, list[float]]:
    """As `check_and_time`, without a library on disk: linking would take as long as compiling. Raises BuildError."""
    return _check_and_time(Builder.compile_here(source), arrays_path, repeats, threads)


def check_and_time(
    arrays_path: str, library: str, symbol: str, repeats: int, threads: int
) -> tuple[str | None, list[float]]:
    """(what is wrong with the answer, or None; seconds of each run)."""
    import tvm_ffi

    return _check_and_time(tvm_ffi.load_module(library, keep_module_alive=False)[symbol], arrays_path, repeats, threads)


def _check_and_time(function: Any, arrays_path: str, repeats: int, threads: int) -> tuple[str | None, list[float]]:
    import tvm

    arrays, copies = copies_of(Path(arrays_path))
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    for tensor, array in zip(copies[0], arrays.arguments):
        tensor.copyfrom(array)
    function(*copies[0])
    wrong = arrays.check([tensor.numpy() for tensor in copies[0]])
    if wrong:
        return wrong, []
    seconds = []
    for turn in range(repeats):
        copy = copies[(turn + 1) % len(copies)]
        for place in arrays.warm:
            copy[place].copyfrom(arrays.arguments[place])
        start = time.perf_counter()
        function(*copy)
        seconds.append(time.perf_counter() - start)
    return None, seconds


def copies_of(path: Path) -> tuple[Arrays, list[list[Any]]]:
    """The arguments, and as many copies of them on the device as are never in cache together."""
    import tvm

    from mest_compile.backends.cpu.runner import back_by_huge_pages

    if path not in _loaded:
        _loaded.clear()
        arrays = Arrays.load(path)
        size = sum(array.nbytes for array in arrays.arguments)
        copies = []
        for _ in range(min(max(2, -(-COLD_BYTES // size)), MOST_COPIES)):
            copy = [tvm.runtime.empty(array.shape, str(array.dtype)) for array in arrays.arguments]
            back_by_huge_pages(copy)
            for tensor, array in zip(copy, arrays.arguments):
                tensor.copyfrom(np.ascontiguousarray(array))
            copies.append(copy)
        _loaded[path] = arrays, copies
    return _loaded[path]

"""Runs a step's programs in this process: TVM's virtual machine calls the kernels by name."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mest_compile.graph.emitting import emit, kernel_name
from mest_compile.graph.program import Program, Stage
from mest_compile.hardware import Target

_numbers = itertools.count()


class LocalRunner:
    """A step's arrays and kernels in this process.

    kernels   program name -> call name -> callable
    programs  what `run` runs, by name: a program and the stages of it
    """

    uploaded_bytes = 0  # nothing leaves this process

    def __init__(self, kernels: Mapping[str, Mapping[str, Any]], programs: Mapping[str, tuple[Program, tuple[Stage, ...]]], target: Target,
                 threads: int):
        import tvm

        self._tvm, self._device = tvm, tvm.cpu(0)
        self._programs, self._threads = programs, threads
        self._tensors: dict[str, Any] = {}
        self._views: dict[str, np.ndarray] = {}  # of the tensors' memory: TVM's own copies cost more than most arrays of a layer
        self._arguments: dict[str, list] = {}
        self._prefix = prefix = f"mest.step{next(_numbers)}"  # global names are the process's: each step has its own
        self._functions = {kernel_name(prefix, program, call.name): kernels[program.name][call.name]
                           for program in {program.name: program for program, _ in programs.values()}.values() for call in program.calls}
        self._functions[f"{prefix}.arena"] = lambda *storages: ask_for_huge_pages(storages)

        def name(program: Program, call: str) -> str:
            return kernel_name(prefix, program, call)

        self._executable = tvm.compile(emit(programs, name, f"{prefix}.arena"), target=target.to_tvm())
        self._executable.mod.clear_imports()  # an object without code, which TVM would link, load and never let go
        self._machine = self._new_machine()
        self._machine["arena"]()

    def put(self, name: str, array: np.ndarray) -> None:
        """Copies an array, flat, into the tensor of that name; a new size makes a new tensor."""
        view = self._views.get(name)
        if view is not None and view.size == array.size:
            view[...] = array.reshape(-1)
            return
        tensor = self._tensors[name] = self._tvm.runtime.tensor(np.ascontiguousarray(array).ravel(), self._device)
        self._views[name] = np.from_dlpack(tensor)
        self._arguments.clear()

    def get(self, name: str) -> np.ndarray:
        """A copy of the array of that name."""
        return self._views[name].copy()

    def exchange(self, kernels: Mapping[str, Any]) -> None:
        """Puts other kernels in place of some of the training program's: {call name: callable}."""
        program, _ = self._programs["train"]
        self._functions |= {kernel_name(self._prefix, program, call): kernel for call, kernel in kernels.items()}
        self._machine = self._new_machine()

    def run(self, function: str) -> None:
        """Runs one of `programs`."""
        self._tvm.get_global_func("runtime.config_threadpool")(1, self._threads)
        if function not in self._arguments:
            self._arguments[function] = [self._tensors[buffer.name] for buffer in self._programs[function][0].held()]
        self._machine[function](*self._arguments[function])

    def profile(self, function: str, repeats: int) -> dict[str, float]:
        """{call: seconds}, the median of `repeats` runs; "rest" is what a run that nobody watches takes beside its kernels."""
        begun: dict[str, float] = {}
        passes: list[dict[str, float]] = []
        infix = f".{self._programs[function][0].name}."

        def watch(function, name, before, result, *arguments):
            name = name.partition(infix)[2]
            if name and before:
                begun[name] = time.perf_counter()
            elif name:
                passes[-1][name] = time.perf_counter() - begun[name]
            return 0  # go on

        watched, usual = self._new_machine(), self._machine
        whole = []
        try:
            self._machine = watched
            self.run(function)
            watched.set_instrument(watch)
            for _ in range(repeats):
                passes.append({})
                self._machine = watched
                self.run(function)
                self._machine = usual
                start = time.perf_counter()
                self.run(function)
                whole.append(time.perf_counter() - start)
        finally:
            self._machine = usual
        seconds = {name: float(np.median([one[name] for one in passes])) for name in passes[0]}
        return seconds | {"rest": max(0.0, float(np.median(whole)) - sum(seconds.values()))}

    def _new_machine(self) -> Any:
        """A virtual machine looks every kernel up by its global name once, when it is made. The names go again, or kernels would outlive
        their step: a process that compiles many has no room for the mappings of some ten thousand libraries.
        """
        from tvm import relax
        from tvm_ffi.registry import remove_global_func

        for name, function in self._functions.items():
            self._tvm.register_global_func(name, function, override=True)
        try:
            return relax.VirtualMachine(self._executable, self._device)
        finally:
            for name in self._functions:
                remove_global_func(name)


def ask_for_huge_pages(storages: Iterable[Any]) -> None:
    """Lets the kernel back the arena with 2 MiB pages where it may: kernels jump between channels, and with 4 KiB pages address
    translation costs 7% of a step (wide ResNet-32, block, 90%, Zen 3). Where the system has no such advice nothing is done.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    advise = ctypes.CDLL(None).madvise
    for storage in storages:
        view = np.from_dlpack(storage)
        start = -(-view.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        size = view.ctypes.data + view.nbytes - start
        if size >= 2**21:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)

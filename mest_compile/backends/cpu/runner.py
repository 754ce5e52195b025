"""Runs a step's programs in this process: TVM's virtual machine calls the kernels by name."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import numpy as np

from mest_compile.base import exclusive
from mest_compile.hardware.folders import Kept, cache_folder, digest
from mest_compile.hardware.host import ask_for_huge_pages
from mest_compile.hardware.target import Target
from mest_compile.hardware.tvmruntime import machine_of, runtime, tensor
from mest_compile.ir.program import Functions, Program
from mest_compile.kernels.linkers import scratch_folder
from mest_compile.lowering.emitting import emit, kernel_name, said_of

PREFIX = "mest.step"  # of the global names under which a virtual machine finds its kernels when it is made
ARENA = f"{PREFIX}.arena"
EXECUTABLE = "relax.VMExecutable"  # TVM's name of the format
MOST_BYTES = 64 * 2**20  # of executables, that of resnet20 some 100 KB
_naming = threading.Lock()  # TVM's table of global names is the process's


class LocalRunner:
    """A step's arrays and kernels in this process.

    kernels   program name -> call name -> callable
    programs  what `run` runs, by name: a program and the stages of it
    """

    uploaded_bytes = 0  # nothing leaves this process

    def __init__(
        self,
        kernels: Mapping[str, Mapping[str, Any]],
        programs: Functions,
        target: Target,
        threads: int,
    ):
        self._ffi = runtime()
        self._ffi.register_error(
            "KeyboardInterrupt", KeyboardInterrupt
        )  # else Ctrl-C where TVM calls us comes out as a RuntimeError
        self._programs, self._threads, self._target = dict(programs), threads, target
        # Each with TVM's tensor in its memory: TVM's own copies cost more than most arrays of a layer.
        self._held: dict[str, tuple[np.ndarray, Any]] = {}
        self._arguments: dict[str, list] = {}
        self._functions = self._named(programs, kernels)
        self._functions[ARENA] = lambda *storages: back_by_huge_pages(storages)
        self._executable = self._compiled(programs, ARENA)
        machine = self._new_machine(self._executable, self._functions)
        self._machines = dict.fromkeys(programs, machine)
        machine["arena"]()

    def put(self, name: str, array: np.ndarray) -> None:
        """Copies an array, flat, into the tensor of that name; a new size makes a new tensor."""
        held = self._held.get(name)
        if held is not None and held[0].size == array.size:
            held[0][...] = array.reshape(-1)
            return
        # first, and then all at once: an interruption leaves no arguments that are not what is held
        self._arguments.clear()
        made = tensor(array.size, array.dtype)
        made[0][...] = array.reshape(-1)
        self._held[name] = made

    def get(self, name: str) -> np.ndarray:
        """A copy of the array of that name."""
        return self._held[name][0].copy()

    def exchange(self, kernels: Mapping[str, Any]) -> None:
        """Puts other kernels in place of some of the training program's: {call name: callable}."""
        program, _ = self._programs["update"]  # which every training program has
        self._functions |= {kernel_name(PREFIX, program, call): kernel for call, kernel in kernels.items()}
        machine, before = self._new_machine(self._executable, self._functions), self._machines["update"]
        self._machines |= {name: machine for name, one in self._machines.items() if one is before}

    def extend(self, programs: Functions, kernels: Mapping[str, Mapping[str, Any]]) -> None:
        """Lets `run` run more, of the same arrays and in the same memory. kernels: as at first."""
        machine = self._new_machine(self._compiled(programs), self._named(programs, kernels))
        self._programs |= programs
        self._machines |= dict.fromkeys(programs, machine)

    def forget(self, functions: Iterable[str]) -> None:
        """Lets go of what `extend` brought."""
        for name in functions:
            del self._programs[name], self._machines[name]
            self._arguments.pop(name, None)

    def spare(self) -> None:
        """Gives back the arena, which TVM's allocator keeps for the next that wants storages of just these sizes: of
        every step in this process that does not run now. Those take new ones, without huge pages."""
        self._ffi.get_global_func("vm.builtin.memory_manager.clear")()

    def run(self, function: str) -> None:
        """Runs one of `programs`."""
        self._ffi.get_global_func("runtime.config_threadpool")(1, self._threads)
        if function not in self._arguments:
            self._arguments[function] = [self._held[buffer.name][1] for buffer in self._programs[function][0].held()]
        self._machines[function][function](*self._arguments[function])

    def profile(self, function: str, repeats: int) -> dict[str, float]:
        """{call: seconds}, the median of `repeats` runs; "rest" is what a run that nobody watches takes beside its
        kernels. Of one thread they are seconds of its processor: what else runs on the machine does not count, which
        would interrupt long kernels and not short ones."""
        now = time.thread_time if self._threads == 1 else time.perf_counter
        begun: dict[str, float] = {}
        passes: list[dict[str, float]] = []
        program, _ = self._programs[function]
        calls = {kernel_name(PREFIX, program, call.name): call.name for call in program.calls}

        def watch(function: Any, name: str, before: bool, result: Any, *arguments: Any) -> int:
            call = calls.get(name)
            if call and before:
                begun[call] = now()
            elif call:
                passes[-1][call] = now() - begun[call]
            return 0  # go on

        watched, whole = self._new_machine(self._executable, self._functions), []
        self.run(function)
        watched[function](*self._arguments[function])
        watched["set_instrument"](watch)
        for _ in range(repeats):
            passes.append({})
            watched[function](*self._arguments[function])
            start = now()
            self.run(function)
            whole.append(now() - start)
        seconds = {name: float(np.median([one[name] for one in passes])) for name in passes[0]}
        return seconds | {"rest": max(0.0, float(np.median(whole)) - sum(seconds.values()))}

    def _named(self, programs: Functions, kernels: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Kernels of all calls by their global names."""
        return {
            kernel_name(PREFIX, program, call.name): kernels[program.name][call.name]
            for program in {program.name: program for program, _ in programs.values()}.values()
            for call in program.calls
        }

    def _compiled(self, programs: Functions, arena: str | None = None) -> Any:
        """The virtual machine's executable, which is kept for other processes. arena: as `emit` has it."""

        def name(program: Program, call: str) -> str:
            return kernel_name(PREFIX, program, call)

        def make() -> bytes:
            import tvm

            with exclusive.COMPILER, scratch_folder() as scratch:
                executable = tvm.compile(emit(programs, name, arena), target=self._target.to_tvm()).mod
                executable.clear_imports()  # an object without code, which TVM would link, load and never let go
                executable.write_to_file(str(scratch / "executable"), EXECUTABLE)
                return (scratch / "executable").read_bytes()

        said = [metadata.version("apache-tvm"), self._target.tvm_fields, said_of(programs, name, arena)]
        key = digest(json.dumps(said).encode())
        content = Kept(cache_folder() / "programs", MOST_BYTES).made(key, make)
        return self._ffi.get_global_func(f"ffi.Module.load_from_bytes.{EXECUTABLE}")(content)

    def _new_machine(self, executable: Any, functions: Mapping[str, Any]) -> Any:
        """A virtual machine looks every kernel up by its global name once, when it is made. The names go again, or
        kernels would outlive their step: a process that compiles many has no room for the mappings of some ten thousand
        libraries.
        """
        with _naming:
            try:
                for name, function in functions.items():
                    self._ffi.register_global_func(name, function, override=True)
                return machine_of(executable)
            finally:
                for name in functions:
                    self._ffi.remove_global_func(name)


def back_by_huge_pages(storages: Iterable[Any]) -> None:
    """Asks for pages of 2 MiB behind the arena: kernels jump between channels, and with 4 KiB pages address translation
    costs 7% of a step (wide ResNet-32, block, 90%, Zen 3)."""
    for storage in storages:
        view = np.from_dlpack(storage)
        ask_for_huge_pages(view.ctypes.data, view.nbytes)

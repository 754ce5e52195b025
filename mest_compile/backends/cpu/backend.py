"""Processors, as planning, building and running ask of them. What a step needs to train is imported here, what
compiling needs when it is asked for: a device that trains from an artifact has no compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mest_compile.hardware.backend import Backend, backend
from mest_compile.hardware.cpu import host_model
from mest_compile.hardware.target import LLVM_LEVEL, Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.layouts.layout import ACTIVATIONS
from mest_compile.ir.program import Functions, Program
from mest_compile.kernels.source import SCHEDULES, object_code
from mest_compile.schedules.cpu.gather_grad import keeps_sums
from mest_compile.schedules.cpu.gather_sizes import section_channels
from mest_compile.schedules.cpu.tiles import widens_once


@backend("cpu")
class CpuBackend(Backend):
    suffix = ".so"
    device_type = 1
    tuner = "local"
    processor = True
    activations = ACTIVATIONS

    def has(self, kernel: str) -> bool:
        return f"cpu/{kernel}" in SCHEDULES.load()

    def section_channels(
        self,
        source: Image,
        source_step: tuple[int, int],
        kernel: tuple[int, int],
        unit: tuple[int, int],
        target: Target,
        caches: int = 1,
    ) -> int:
        return section_channels(source, source_step, kernel, unit, target, caches)

    def widens_once(self, source: Image, target: Target) -> bool:
        return widens_once(source, target)

    def keeps_sums(self, problem: Any, target: Target) -> bool:
        return keeps_sums(problem, target)

    @property
    def recomputes_norms(self) -> bool:
        return True

    def key_parts(self, target: Target, checked: bool) -> list[Any]:
        from mest_compile.backends.cpu import bfloat16, intrinsics
        from mest_compile.backends.cpu.code import PASSES

        return [PASSES, LLVM_LEVEL, intrinsics.KEY, bfloat16.KEY, checked]

    def compile(self, text: str, symbol: str, target: Target, checked: bool = True) -> Any:
        from mest_compile.backends.cpu.code import compile_cpu

        return compile_cpu(text, symbol, target, checked)

    def dump(self, code: Any, target: Target) -> bytes:
        from mest_compile.kernels.linkers import link_here

        return link_here(object_code(code), target)

    def load(self, content: bytes, symbol: str, folders: Sequence[Path] = ()) -> Any:
        from mest_compile.kernels.loading import load_library

        return load_library(content, folders)[symbol]

    def link_kernel(
        self, symbol: str, text: str, target: Target, checked: bool, path: Path, system_calls: Collection[str]
    ) -> None:
        from mest_compile.kernels.linkers import scratch_folder
        from mest_compile.kernels.linking import link

        with scratch_folder() as scratch:
            made = scratch / "kernel.o"
            self.compile(text, symbol, target, checked).write_to_file(str(made))
            path.write_bytes(link([made], target, scratch, system_calls))

    def link_step(
        self,
        functions: Functions,
        symbol: Callable[[Program, str], str],
        sources: Collection[Any],
        target: Target,
        builder: Any,
    ) -> bytes:
        from mest_compile.kernels.linking import link_step

        return link_step(functions, symbol, builder.objects(sources), target)

    def runner(
        self, kernels: Mapping[str, Mapping[str, Any]], functions: Functions, target: Target, threads: int
    ) -> Any:
        from mest_compile.backends.cpu.runner import LocalRunner

        return LocalRunner(kernels, functions, target, threads)

    def machine(self, target: Target) -> str:
        return host_model()

"""OpenCL devices, as planning, building and running ask of them. What compiling needs is imported when it is asked
for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mest_compile.hardware.backend import Backend, backend
from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.program import Functions, Program
from mest_compile.kernels.source import SCHEDULES
from mest_compile.schedules.opencl.gather_conv import section_channels


@backend("opencl")
class OpenclBackend(Backend):
    suffix = ".json"
    device_type = 4
    tuner = "opencl"
    processor = False
    activations = ("float32",)
    whole_buffers = True

    def has(self, kernel: str) -> bool:
        return f"opencl/{kernel}" in SCHEDULES.load()

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

    def check(self, programs: Iterable[Program], target: Target) -> None:
        from mest_compile.backends.opencl.code import check_buffers

        check_buffers(programs, target)

    def key_parts(self, target: Target, checked: bool) -> list[Any]:
        return [asdict(target.limits)]  # a kernel is checked against them when it is made

    def compile(self, text: str, symbol: str, target: Target, checked: bool = True) -> Any:
        from mest_compile.backends.opencl.code import compile_opencl

        return compile_opencl(text, symbol, target)

    def dump(self, code: Any, target: Target) -> bytes:
        return code.to_json().encode()

    def load(self, content: bytes, symbol: str, folders: Sequence[Path] = ()) -> Any:
        from mest_compile.backends.opencl.code import OpenclKernel

        return OpenclKernel.from_json(content.decode())

    def link_kernel(
        self, symbol: str, text: str, target: Target, checked: bool, path: Path, system_calls: Collection[str]
    ) -> None:
        from mest_compile.backends.opencl.code import compile_opencl_library
        from mest_compile.backends.opencl.linking import _link_opencl

        kernels = compile_opencl_library({symbol: text}, target)
        path.write_bytes(_link_opencl(kernels, kernels, target.processor))

    def link_step(
        self,
        functions: Functions,
        symbol: Callable[[Program, str], str],
        sources: Collection[Any],
        target: Target,
        builder: Any,
    ) -> bytes:
        from mest_compile.backends.opencl.linking import link_opencl_step

        return link_opencl_step(
            functions, symbol, {source.symbol: source.text for source in sources}, target, builder.keep
        )

    def find_device(self, target: Target) -> None:
        from mest_compile.backends.opencl.runner import find_device

        find_device(target.limits.name)

    def runner(
        self, kernels: Mapping[str, Mapping[str, Any]], functions: Functions, target: Target, threads: int
    ) -> Any:
        from mest_compile.backends.opencl.runner import OpenclRunner, find_device

        return OpenclRunner(kernels, functions, find_device(target.limits.name))

    def machine(self, target: Target) -> str:
        from mest_compile.backends.opencl.runner import machine

        return machine(target.limits.name)

    def describe_device(self, target: Target) -> dict[str, str]:
        from mest_compile.backends.opencl.runner import describe_device

        return {"opencl": describe_device(target.limits.name)}

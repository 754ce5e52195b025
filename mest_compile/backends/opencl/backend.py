"""OpenCL devices, as planning, building and running ask of them. What compiling needs is imported when it is asked for."""

from __future__ import annotations

from dataclasses import asdict

from mest_compile.hardware.backend import Backend, backend
from mest_compile.kernels.source import SCHEDULES
from mest_compile.schedules.opencl.gather_conv import section_channels


@backend("opencl")
class OpenclBackend(Backend):
    suffix = ".json"
    device_type = 4
    tuner = "opencl"
    processor = False

    def has(self, kernel):
        return f"opencl/{kernel}" in SCHEDULES.load()

    def section_channels(self, source, source_step, kernel, source_block, cache_bytes):
        return section_channels(source, source_step, kernel, source_block, cache_bytes)

    def check(self, programs, target):
        from mest_compile.backends.opencl.code import check_buffers

        check_buffers(programs, target)

    def key_parts(self, target, checked):
        return [asdict(target.limits)]  # a kernel is checked against them when it is made

    def compile(self, text, symbol, target, checked=True):
        from mest_compile.backends.opencl.code import compile_opencl

        return compile_opencl(text, symbol, target)

    def dump(self, code, target):
        return code.to_json().encode()

    def load(self, content, symbol, folders=()):
        from mest_compile.backends.opencl.code import OpenclKernel

        return OpenclKernel.from_json(content.decode())

    def link_kernel(self, symbol, text, target, checked, path, system_calls):
        from mest_compile.backends.opencl.code import compile_opencl_library
        from mest_compile.backends.opencl.linking import _link_opencl

        kernels = compile_opencl_library({symbol: text}, target)
        path.write_bytes(_link_opencl(kernels, kernels, target.processor))

    def link_step(self, functions, symbol, sources, target, builder):
        from mest_compile.backends.opencl.linking import link_opencl_step

        return link_opencl_step(functions, symbol, {source.symbol: source.text for source in sources}, target, builder.keep)

    def runner(self, kernels, functions, target, threads):
        from mest_compile.backends.opencl.runner import OpenclRunner, find_device

        return OpenclRunner(kernels, functions, find_device(target.limits.name))

    def machine(self, target):
        from mest_compile.backends.opencl.runner import machine

        return machine(target.limits.name)

    def describe_device(self, target):
        from mest_compile.backends.opencl.runner import describe_device

        return {"opencl": describe_device(target.limits.name)}

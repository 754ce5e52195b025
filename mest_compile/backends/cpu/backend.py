"""Processors, as planning, building and running ask of them. What a step needs to train is imported here, what compiling needs when it is
asked for: a device that trains from an artifact has no compiler.
"""

from __future__ import annotations

from mest_compile.hardware.backend import Backend, backend
from mest_compile.hardware.cpu import host_model
from mest_compile.kernels.source import SCHEDULES, object_code
from mest_compile.schedules.cpu.gather_conv import section_channels
from mest_compile.schedules.cpu.tiles import widens_once


@backend("cpu")
class CpuBackend(Backend):
    suffix = ".so"
    device_type = 1
    tuner = "local"
    processor = True

    def has(self, kernel):
        return f"cpu/{kernel}" in SCHEDULES.load()

    def section_channels(self, source, source_step, kernel, source_block, cache_bytes):
        return section_channels(source, source_step, kernel, source_block, cache_bytes)

    def widens_once(self, source, target):
        return widens_once(source, target)

    @property
    def recomputes_norms(self):
        return True

    def key_parts(self, target, checked):
        from mest_compile.backends.cpu.code import PASSES

        return [PASSES, checked]

    def compile(self, text, symbol, target, checked=True):
        from mest_compile.backends.cpu.code import compile_cpu

        return compile_cpu(text, symbol, target, checked)

    def dump(self, code, target):
        from mest_compile.kernels.linkers import link_here

        return link_here(object_code(code), target)

    def load(self, content, symbol, folders=()):
        from mest_compile.kernels.loading import load_library

        return load_library(content, folders)[symbol]

    def link_kernel(self, symbol, text, target, checked, path, system_calls):
        from mest_compile.kernels.linkers import scratch_folder
        from mest_compile.kernels.linking import link

        with scratch_folder() as scratch:
            made = scratch / "kernel.o"
            self.compile(text, symbol, target, checked).write_to_file(str(made))
            path.write_bytes(link([made], target, scratch, system_calls))

    def link_step(self, functions, symbol, sources, target, builder):
        from mest_compile.kernels.linking import link_step

        return link_step(functions, symbol, builder.objects(sources), target)

    def runner(self, kernels, functions, target, threads):
        from mest_compile.backends.cpu.runner import LocalRunner

        return LocalRunner(kernels, functions, target, threads)

    def machine(self, target):
        return host_model()

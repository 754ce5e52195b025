"""Kernels for tests that run each of them once: what compiling them takes is nearly all of such a test's time, and four
fifths of that are LLVM's optimisations."""

import os
from dataclasses import fields, replace
from pathlib import Path


def hastily(usual):
    """Builder's method that compiles, in the place of `usual`: LLVM does not optimise, which a kernel's key does not
    show."""
    from mest_compile.hardware.target import Target

    class Unoptimised(Target):
        __slots__ = ()

        def to_tvm(self):
            import tvm

            super().to_tvm()  # which knows whether there is such a CPU
            return tvm.target.Target({**self.tvm_fields, "opt-level": 0})

    def new_library(builder, source):
        target = Unoptimised(**{field.name: getattr(source.target, field.name) for field in fields(Target)})
        return usual(builder, replace(source, target=target))

    return new_library


def compile_hastily(monkeypatch, folder):
    """Lets every Builder, in this process and in those that it starts, compile hastily. folder: their XDG_CACHE_HOME,
    where nothing else is kept."""
    from mest_compile.kernels.cache import Builder

    monkeypatch.setattr(Builder, "_new_library", hastily(Builder._new_library))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "processes"), prepend=os.pathsep)

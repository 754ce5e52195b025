"""Kernels for tests that run each of them once: what compiling them takes is nearly all of such a test's time, and four
fifths of that are LLVM's optimisations."""

import os
import sys
from dataclasses import fields, replace
from functools import cache
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


def remember_own_nets(monkeypatch, folder):
    """Graphs of nets that test files define are kept as those of packages are, in this process and in that folder:
    torch takes longer to read such a net than all else that a test of it does. What a class of a test file does is
    known by that file."""
    from mest_compile.frontend import remembered

    told, code, known = remembered._told, remembered._code(), remembered.KNOWN

    def told_of_files(module):
        of_files = {type(part) for part in module.modules() if not type(part).__module__.startswith(known)}
        if not all(map(_is_by_its_name, of_files)):  # a function may make one each time
            raise remembered._Unknown(type(module))
        return told(module)

    monkeypatch.setattr(remembered, "KNOWN", (*known, "nets", "test_"))
    monkeypatch.setattr(remembered, "_folder", lambda: folder)
    monkeypatch.setattr(remembered, "_told", told_of_files)
    monkeypatch.setattr(remembered, "_code", lambda: code + _tests())


def _is_by_its_name(kind):
    found = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


@cache
def _tests():
    from mest_compile.hardware.folders import digest

    return digest(b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))))

"""Kernels for tests that run each of them once: what compiling them takes is nearly all of such a test's time, and four
fifths of that are LLVM's optimisations."""

from dataclasses import dataclass, fields, replace

from mest_compile.hardware.target import Target
from mest_compile.kernels.cache import Builder


class Unoptimised(Target):
    """A target by another order to LLVM, which the key of a kernel does not show."""

    __slots__ = ()

    def to_tvm(self):
        import tvm

        super().to_tvm()  # which knows whether there is such a CPU
        return tvm.target.Target({**self.tvm_fields, "opt-level": 0})


@dataclass(slots=True)
class HastyBuilder(Builder):
    """Of code that LLVM does not optimise, so its folder must be no other builder's."""

    def _new_library(self, source):
        target = Unoptimised(**{field.name: getattr(source.target, field.name) for field in fields(Target)})
        return Builder._new_library(self, replace(source, target=target))

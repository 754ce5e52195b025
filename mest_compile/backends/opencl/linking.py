"""Kernels for an OpenCL device and the step that calls them to one shared library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from mest_compile import __version__
from mest_compile.backends.opencl.code import compile_opencl_library
from mest_compile.hardware.target import Target
from mest_compile.ir.program import Program, Stage
from mest_compile.kernels.linkers import scratch_folder
from mest_compile.kernels.linking import _executable, _packed, link


def link_opencl_step(
    functions: Mapping[str, tuple[Program, tuple[Stage, ...]]],
    symbol: Callable[[Program, str], str],
    texts: Mapping[str, str],
    target: Target,
    keep: Callable[[str, Callable[[], bytes]], bytes],
) -> bytes:
    """The same for an OpenCL device whose TVM runtime has OpenCL: the library holds the code that launches, for the
    device's CPU, and the kernels' OpenCL C, which its driver compiles.

    texts  symbol -> TVMScript of the kernel; a symbol is the digest of what decides its code
    keep   (digest of all that decides the library, what makes it) -> the library, made or kept from before
    Raises BuildError, NotInstalled.
    """
    processor = target.processor
    executable = _executable(functions, symbol, processor)

    def make() -> bytes:
        kernels = compile_opencl_library(texts, target)
        executable.import_module(kernels)
        return _link_opencl(kernels, executable, processor)

    with scratch_folder() as folder:
        path = folder / "executable"
        executable.write_to_file(str(path))
        facts = json.dumps([__version__, sorted(texts), processor.tvm_fields]).encode()
        return keep(hashlib.sha256(facts + path.read_bytes()).hexdigest(), make)


def _link_opencl(kernels: Any, root: Any, processor: Target) -> bytes:
    """kernels: what launches, with OpenCL C; root: what loading the library gives, these themselves or an executable
    that imports them."""
    with scratch_folder() as scratch:
        kernels.write_to_file(str(scratch / "kernels.o"))
        return link([scratch / "kernels.o", _packed(root, processor, scratch)], processor, scratch)

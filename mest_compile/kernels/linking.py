"""Kernels and the step that calls them to one shared library, for this machine or another.

Compiled kernels need next to nothing of a C library, so that a bare linker is enough: no headers, no sysroot, no NDK.
What they do need (`expf`, `memset`) is looked up at load time in the device's own libraries, whose names are put in by
linking against empty stand-ins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mest_compile.base.errors import BuildError
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target, triple_of
from mest_compile.ir.program import Program, Stage, functions_of
from mest_compile.kernels import choosing
from mest_compile.kernels.cache import Builder, attempt
from mest_compile.kernels.elf import read_library
from mest_compile.kernels.linkers import find_linker, run_linker, scratch_folder
from mest_compile.kernels.source import KernelSource
from mest_compile.lowering.emitting import emit
from mest_compile.planning.facts import Facts

# What LLVM calls for exp, log, power and tanh of float32, fills and copies; everything else a kernel has within itself.
MATH = frozenset(
    {"expf", "exp2f", "logf", "log2f", "powf", "tanhf", "erff", "fmaxf", "fminf", "fmodf", "floorf", "ceilf", "roundf"}
)
MEMORY = frozenset({"memset", "memcpy", "memmove"})
# The rest is offered by libtvm_ffi and libtvm_runtime, which are there before a kernel library is loaded.
RUNTIME = ("TVMFFI", "TVMBackend")
# What the C compiler for 32-bit ARM has every function's unwinding table refer to; a Linux whose programs are in C++
# has it.
UNWIND = frozenset({"__aeabi_unwind_cpp_pr0"})
_LIBRARIES = {
    "gnu": {"libm.so.6": MATH, "libc.so.6": MEMORY, "libgcc_s.so.1": UNWIND},
    "android": {"libm.so": MATH, "libc.so": MEMORY},
}
PAGE_BYTES = 16384  # Android 15 has pages of 16 KiB; smaller ones do as well with it


def link_step(
    functions: Mapping[str, tuple[Program, tuple[Stage, ...]]],
    symbol: Callable[[Program, str], str],
    objects: Mapping[str, bytes],
    target: Target,
) -> bytes:
    """A shared library with all kernels and the virtual machine's executable that calls them.

    symbol   (program, call name) -> the kernel's symbol
    objects  symbol -> object code
    Kernels are found inside the library: loading it registers nothing in the process. Raises BuildError, NotInstalled.
    """
    import tvm

    with scratch_folder() as scratch:
        paths = {}
        for name, content in objects.items():
            paths[name] = scratch / f"{name}.o"
            paths[name].write_bytes(content)
        executable = _executable(functions, symbol, target)
        # One object stands for all: that there is one tells TVM that the library's own functions belong to the
        # executable.
        first = next(iter(paths))
        executable.import_module(tvm.runtime.load_static_library(str(paths[first]), [first]))
        return link([*paths.values(), _packed(executable, target, scratch)], target, scratch)


def _executable(
    functions: Mapping[str, tuple[Program, tuple[Stage, ...]]], symbol: Callable[[Program, str], str], target: Target
) -> Any:
    """The virtual machine's executable, which calls kernels by name and has none."""
    import tvm

    executable = tvm.compile(emit(functions, symbol), target=target.to_tvm()).mod
    executable.clear_imports()
    return executable


def _packed(executable: Any, target: Target, scratch: Path) -> Path:
    """An object with the bytes of what is no machine code, the executable and OpenCL C, which the library's loader
    reads."""
    from tvm.runtime import _ffi_api

    path = scratch / "executable.o"
    packed = _ffi_api.ModulePackImportsToLLVM(executable, False, json.dumps(target.tvm_fields), "")
    packed.write_to_file(str(path), "o")
    return path


def link_kernel(source: KernelSource, path: Path, system_calls: Collection[str] = ()) -> None:
    """Compiles a kernel, for this machine's device or another's, to a shared library of that name. Raises BuildError,
    NotInstalled."""
    attempt(
        source,
        lambda: backend_of(source.target).link_kernel(
            source.symbol, source.text, source.target, source.checked, path, system_calls
        ),
    )


def link(objects: Sequence[Path], target: Target, scratch: Path, system_calls: Collection[str] = ()) -> bytes:
    """The shared library of these objects. system_calls: functions of libc that they may call beside `MEMORY`.

    Raises BuildError when they need what no device's libraries have, NotInstalled.
    """
    _, system = triple_of(target)
    linker, made = find_linker(target), scratch / "linked.so"
    run_linker(linker, ["-shared", *map(str, objects), "-o", str(made)])
    lacking = {name for name in read_library(made.read_bytes()).undefined if not name.startswith(RUNTIME)}
    if unknown := sorted(lacking.difference(system_calls, *_LIBRARIES[system].values())):
        raise BuildError(
            f"kernels for {target.name} call {', '.join(unknown)}, which a device without a compiler need not have; "
            "please report which model that was"
        )
    beside = []
    for name, offered in _LIBRARIES[system].items():
        if wanted := sorted(lacking & (offered.union(system_calls) if offered is MEMORY else offered)):
            beside.append(str(scratch / name))
            stand_in = [
                "-shared",
                "-soname",
                name,
                *(f"--defsym={symbol}=0" for symbol in wanted),
                str(objects[0]),
                "-o",
                beside[-1],
            ]
            run_linker(linker, stand_in)
    run_linker(
        linker,
        ["-shared", "--strip-all", "-z", f"max-page-size={PAGE_BYTES}", *map(str, objects), *beside, "-o", str(made)],
    )
    return made.read_bytes()


def link_steps(
    functions: Mapping[str, tuple[Program, tuple[Stage, ...]]],
    sources: Mapping[str, Mapping[str, KernelSource]],
    coming: Sequence[tuple[Facts, Mapping[str, Any]]],
    target: Target,
    builder: Builder,
) -> bytes:
    """The library of a step, and of those that it will become. sources: program -> call -> kernel of the first."""
    every, by_program = dict(functions), {id(program): sources for program, _ in functions.values()}
    for number, (facts, knobs) in enumerate(coming, 1):
        programs = facts.lower()
        theirs = choosing.sources(programs, target, choosing.remembered(programs, knobs))
        by_program |= {id(program): theirs for program in programs}
        every |= functions_of(*programs, number)

    def symbol(program: Program, call: str) -> str:
        return by_program[id(program)][program.name][call].symbol

    kernels = [source for program, _ in every.values() for source in by_program[id(program)][program.name].values()]
    return backend_of(target).link_step(every, symbol, kernels, target, builder)

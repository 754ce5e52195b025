"""Which program links objects for a machine, and a kernel's library for this one. A bare linker is enough: no headers,
no C compiler."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mest_compile.base.errors import BuildError, NotInstalled
from mest_compile.base.programs import run_program
from mest_compile.hardware.cpu import host_machine
from mest_compile.hardware.target import Target, triple_of

_PACKAGES = {"aarch64": "gcc-aarch64-linux-gnu", "arm": "gcc-arm-linux-gnueabihf", "x86_64": "gcc"}
_PREFIXES = {"aarch64": "aarch64-linux-gnu-", "arm": "arm-linux-gnueabihf-", "x86_64": "x86_64-linux-gnu-"}
_EMULATIONS = {"aarch64": "aarch64linux", "arm": "armelf_linux_eabi", "x86_64": "elf_x86_64"}  # as lld and ld call them


@dataclass(frozen=True, slots=True)
class Linker:
    """A command that links objects for one architecture; arguments follow it."""

    name: str
    command: tuple[str, ...]


def linkers(architecture: str) -> list[Linker]:
    """Every linker for the architecture that this machine has, the preferred one first."""
    found = [
        shutil.which(_PREFIXES.get(architecture, "") + "ld"),
        shutil.which("ld") if architecture == host_machine() else None,
    ]
    options = [Linker(Path(path).name, (path,)) for path in found if path]
    mode = ("-m", _EMULATIONS[architecture]) if architecture in _EMULATIONS else ()
    if path := shutil.which("ld.lld"):
        options.append(Linker("ld.lld", (path, *mode)))
    if importlib.util.find_spec("ziglang"):
        options.append(Linker("zig ld.lld", (sys.executable, "-m", "ziglang", "ld.lld", *mode)))
    return options


def find_linker(target: Target) -> Linker:
    """Raises NotInstalled with what to install."""
    architecture, _ = triple_of(target)
    for linker in linkers(architecture):
        return linker
    raise NotInstalled(
        f"no linker for {architecture}, which target {target.name!r} needs; run: "
        f"apt install {_PACKAGES.get(architecture, 'gcc')}, or without root: pip install ziglang"
    )


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder that goes with the block. Raises BuildError where no file can be written or read in the
    block."""
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except OSError as problem:
        raise BuildError(
            f"the temporary folder cannot be used ({problem}); make room there, or set TMPDIR to another"
        ) from problem


def link_here(code: bytes, target: Target) -> bytes:
    """A shared library of an object, for processes that have loaded TVM, and with it all that a kernel may need.

    Raises BuildError, NotInstalled.
    """
    with scratch_folder() as scratch:
        part, made = scratch / "kernel.o", scratch / "kernel.so"
        part.write_bytes(code)
        run_linker(find_linker(target), ["-shared", "--strip-all", str(part), "-o", str(made)])
        return made.read_bytes()


def run_linker(linker: Linker, arguments: list[str]) -> None:
    """Raises BuildError with what it said."""
    try:
        done = run_program([*linker.command, *arguments])
    except OSError as problem:
        raise BuildError(f"{linker.name} cannot be started: {problem}") from problem
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise BuildError(f"{linker.name} cannot link: {said[-1] if said else f'exit code {done.returncode}'}")

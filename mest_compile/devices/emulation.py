"""An ARM machine under qemu's user emulation, for compiled kernels: what they answer, and which instructions they
execute.

Nothing here measures time. Executed blocks are the same on every run; `cycles.py` gives them modelled cycles.
The two helper programs are built from the C files of `native/` when they are first needed, and kept in the user's cache
folder.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from mest_compile.backends.cpu.code import compile_cpu
from mest_compile.base.errors import BuildError, DeviceError, NotInstalled, TargetError
from mest_compile.base.programs import run_program
from mest_compile.hardware.folders import cache_folder, kept_file
from mest_compile.hardware.target import Target
from mest_compile.kernels.source import KernelSource

LIMIT_SECONDS = 300  # of one kernel; one that needs longer has too large a problem for emulation
_CODES = {"i": 0, "f": 2}  # DLPack's


class EmulationTimeout(DeviceError):
    """A kernel that did not end in time on the emulated machine."""


@dataclass(frozen=True, slots=True)
class Machine:
    """How programs for one architecture are built and run here. packages: Debian's names of what has these programs."""

    emulator: str
    compiler: str
    root: str
    packages: tuple[str, ...]


MACHINES = {
    "aarch64": Machine(
        "qemu-aarch64",
        "aarch64-linux-gnu-gcc",
        "/usr/aarch64-linux-gnu",
        ("qemu-user", "gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"),
    ),
    "armv7": Machine(
        "qemu-arm",
        "arm-linux-gnueabihf-gcc",
        "/usr/arm-linux-gnueabihf",
        ("qemu-user", "gcc-arm-linux-gnueabihf", "libc6-dev-armhf-cross"),
    ),
}


@dataclass(frozen=True, slots=True)
class Block:
    """Instructions that run one after the other, and how often they did. words: each instruction's encoding."""

    executions: int
    words: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Execution:
    """One call of a kernel. arrays: all arguments as they are afterwards, flat."""

    arrays: tuple[np.ndarray, ...]
    blocks: tuple[Block, ...]

    @property
    def instructions(self) -> int:
        """Executed instructions of the whole call."""
        return sum(block.executions * len(block.words) for block in self.blocks)


def machine_of(target: Target) -> Machine:
    """Raises TargetError for a target that is no ARM Linux or Android CPU."""
    triple = target.tvm_fields.get("mtriple", "")
    for start, machine in MACHINES.items():
        if triple.startswith(start):
            return machine
    raise TargetError(
        f"target {target.name!r} is not an ARM CPU that can be emulated; its triple is "
        f"{triple or 'that of this machine'!r}, "
        f"wanted one of {', '.join(MACHINES)}"
    )


def missing_tools(machine: Machine) -> list[str]:
    """Programs of `machine` that this machine lacks, the compiler of the plugin among them."""
    needed = [machine.emulator, machine.compiler, "cc"]
    return [tool for tool in needed if shutil.which(tool) is None]


def check_tools(machine: Machine) -> None:
    """Raises NotInstalled with what to install."""
    missing = missing_tools(machine)
    if missing:
        raise NotInstalled(
            f"emulating this target needs {', '.join(missing)}; on Debian or Ubuntu run: apt install "
            f"--no-install-recommends gcc libc6-dev {' '.join(machine.packages)}"
        )


def build(source: KernelSource, path: Path) -> None:
    """Compiles a kernel for an ARM target to a shared library of that name. Raises BuildError, NotInstalled,
    TargetError."""
    from tvm.support.cc import cross_compiler

    machine = machine_of(source.target)
    check_tools(machine)
    try:
        compiled = compile_cpu(source.text, source.symbol, source.target, source.checked)
        compiled.export_library(str(path), fcompile=cross_compiler(machine.compiler))
    except TargetError:
        raise
    except Exception as problem:  # of TVM's many types
        raise BuildError(
            f"kernel {source.kernel} does not compile for {source.target.name}: {str(problem).strip()[-300:]}"
        ) from problem


def emulate(source: KernelSource, arrays: Sequence[np.ndarray]) -> Execution:
    """One call of a kernel, compiled for its target. Raises BuildError, DeviceError, NotInstalled."""
    with tempfile.TemporaryDirectory(prefix="mest-emulation-") as folder:
        library = Path(folder) / "kernel.so"
        build(source, library)
        return execute(library, source.symbol, arrays, source.target)


def execute(
    library: Path, symbol: str, arrays: Sequence[np.ndarray], target: Target, limit_seconds: float = LIMIT_SECONDS
) -> Execution:
    """Calls a kernel of a library for `target` once. arrays: its arguments, int32 or float32.

    Raises DeviceError (the kernel failed), EmulationTimeout, NotInstalled.
    """
    machine = machine_of(target)
    check_tools(machine)
    runner, plugin = _helpers(machine)
    with tempfile.TemporaryDirectory(prefix="mest-emulation-") as folder:
        arguments, results, blocks = (Path(folder) / name for name in ("arguments", "results", "blocks"))
        flat = [np.ascontiguousarray(array).ravel() for array in arrays]
        _write_arguments(arguments, flat)
        # Static emulators know no plugins and no shared libraries of the host: this one is dynamic.
        command = [
            machine.emulator,
            "-L",
            machine.root,
            "-plugin",
            f"{plugin},out={blocks}",
            runner,
            library.absolute(),
            symbol,
            arguments,
            results,
        ]
        if machine.emulator == "qemu-aarch64":
            command[1:1] = ["-cpu", "max,sve=off"]  # with vectors of 128 bits only, as the targets have
        try:
            done = subprocess.run(
                [str(word) for word in command], capture_output=True, text=True, timeout=limit_seconds
            )
        except subprocess.TimeoutExpired as problem:
            raise EmulationTimeout(
                f"kernel {symbol} was emulated for more than {limit_seconds:g} s; give it a smaller batch"
            ) from problem
        if done.returncode or not results.exists() or not blocks.exists():
            said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise DeviceError(f"kernel {symbol} failed on the emulated {target.name}: {said}")
        return Execution(_read_results(results, flat), _read_blocks(blocks))


def _write_arguments(path: Path, arrays: Sequence[np.ndarray]) -> None:
    with path.open("wb") as file:
        file.write(np.int32(len(arrays)).tobytes())
        for array in arrays:
            file.write(np.array([_CODES[array.dtype.kind], array.itemsize * 8], np.int32).tobytes())
            file.write(np.int64(array.size).tobytes())
            file.write(array.tobytes())


def _read_results(path: Path, before: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    content, start, arrays = path.read_bytes(), 0, []
    for array in before:
        arrays.append(np.frombuffer(content, array.dtype, array.size, start))
        start += array.nbytes
    return tuple(arrays)


def _read_blocks(path: Path) -> tuple[Block, ...]:
    """In a fixed order; qemu translates the same code several times, and then lists it several times."""
    counts: dict[tuple[int, tuple[int, ...]], int] = {}
    for line in path.read_text().splitlines():
        address, executions, _, *words = line.split()
        key = int(address, 16), tuple(int(word, 16) for word in words)
        counts[key] = counts.get(key, 0) + int(executions)
    return tuple(Block(count, words) for (_, words), count in sorted(counts.items()))


def _helpers(machine: Machine) -> tuple[Path, Path]:
    """(runner for the emulated machine, plugin for the emulator), built unless they are there. Raises BuildError."""
    sources = resources.files("mest_compile.devices.native")
    runner, plugin = sources.joinpath("runner.c").read_text(), sources.joinpath("blocks.c").read_text()
    # The runner exports what kernels call; its pages are no larger than any Linux wants them.
    return (
        _built(runner, "runner", [machine.compiler, "-O2", "-rdynamic"], ["-ldl", "-Wl,--no-as-needed", "-lm"]),
        _built(plugin, "blocks.so", ["cc", "-O2", "-shared", "-fPIC"], []),
    )


def _built(text: str, name: str, compiler: list[str], libraries: list[str]) -> Path:
    key = hashlib.sha256("\0".join([text, *compiler, *libraries]).encode()).hexdigest()[:16]

    def build(path: Path) -> None:
        source = path.with_name("source.c")
        source.write_text(text)
        done = run_program([*compiler, source, "-o", path, *libraries])
        if done.returncode:
            raise BuildError(f"{compiler[0]} cannot build {name}: {' '.join(done.stderr.split())}")

    return kept_file(cache_folder() / "native", key, name, build)

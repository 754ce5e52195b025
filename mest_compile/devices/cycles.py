"""Modelled cycles of a kernel: every block that an emulated call executed, times what LLVM's machine code analyser says
it takes.

A model, not a time: it has the core's pipeline and its decoder's width, no caches, no branch predictor, no memory, and
nobody has compared it with a device. What a block costs is what it costs in a steady state, run again and again: right
for loops, a guess for what runs once.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from mest_compile.base.errors import DeviceError, NotInstalled, TargetError
from mest_compile.base.programs import run_program
from mest_compile.devices.emulation import Execution
from mest_compile.hardware.target import Target

# of LLVM: older ones model Neoverse and newer Cortex cores by the pipeline of an A57; figures of versions differ
VERSION = 19
PACKAGE = "llvm-19"  # Debian's
ITERATIONS = 100  # of a block: its start and end weigh little
COVERED = 0.999  # share of the executed instructions whose blocks are modelled; the rest is scaled up
LANES = 4  # float32 of a NEON register
# Instructions that a core decodes in a cycle, where LLVM's model only has the micro-operations that it dispatches,
# which are more.
# N1 and its sibling A76: 4; V1 and its sibling X1: 8 from their macro-operation cache. AnandTech, "Arm's Cortex-A76 CPU
# Unveiled", "Arm's New Cortex-A78 and Cortex-X1".
DECODED = {"neoverse-n1": 4, "neoverse-v1": 8}
_BRANCH = re.compile(r"^(b\.\w+|b|bl|cbn?z \w+,|tbn?z \w+, #\d+,) *#-?\d+$")


@dataclass(frozen=True, slots=True)
class Modelled:
    """One call of a kernel in the model.

    instructions  executed, exactly
    cycles        of the core's pipeline
    floor_cycles  that the useful multiply-adds alone would take
    """

    instructions: int
    cycles: float
    floor_cycles: float

    @property
    def share_of_floor(self) -> float:
        """1: nothing but multiply-adds, at the core's full rate."""
        return self.floor_cycles / self.cycles


def model(execution: Execution, target: Target, multiply_adds: int) -> Modelled:
    """multiply_adds: useful ones of the call, one a float32. Raises NotInstalled, TargetError (no pipeline for the
    target)."""
    core = core_of(target)
    blocks = sorted(execution.blocks, key=lambda block: -block.executions * len(block.words))
    instructions, seen, chosen = execution.instructions, 0, []
    for block in blocks:
        if seen >= COVERED * instructions:
            break
        chosen.append(block)
        seen += block.executions * len(block.words)
    cycles = sum(
        block.executions * each for block, each in zip(chosen, block_cycles([block.words for block in chosen], core))
    )
    return Modelled(
        instructions, cycles * instructions / max(seen, 1), multiply_adds / LANES / multiply_adds_per_cycle(core)
    )


def core_of(target: Target) -> str:
    """LLVM's name of the core whose pipeline stands for the target. Raises TargetError."""
    if target.cycle_model is None:
        raise TargetError(
            f"target {target.name!r} names no cycle_model: there are no modelled cycles for it; cortex-a76 has them"
        )
    return target.cycle_model


def missing_tools() -> list[str]:
    """Programs of LLVM that this machine lacks."""
    return [tool for tool in (f"llvm-mca-{VERSION}", f"llvm-mc-{VERSION}") if shutil.which(tool) is None]


def check_tools() -> None:
    """Raises NotInstalled with what to install."""
    missing = missing_tools()
    if missing:
        raise NotInstalled(
            f"modelled cycles need {' and '.join(missing)}; on Debian or Ubuntu run: apt install {PACKAGE}. "
            "Another version "
            "of LLVM gives other figures"
        )


_known: dict[tuple[str, tuple[int, ...]], float] = {}


def block_cycles(blocks: Sequence[tuple[int, ...]], core: str) -> list[float]:
    """Modelled cycles of one execution of each block, given by its instructions' words."""
    unknown = [words for words in dict.fromkeys(blocks) if (core, words) not in _known]
    if unknown:
        lines = iter(disassemble(tuple(word for words in unknown for word in words)))
        texts = [list(islice(lines, len(words))) for words in unknown]
        for words, cycles in zip(unknown, analyse(texts, core), strict=True):
            _known[core, words] = cycles
    return [_known[core, words] for words in blocks]


def disassemble(words: tuple[int, ...]) -> list[str]:
    """Assembly text of each instruction; where a branch leads is left out, and calls are branches: LLVM would add 100
    cycles for each."""
    check_tools()
    content = " ".join(f"0x{byte:02x}" for word in words for byte in word.to_bytes(4, "little"))
    done = run_program([f"llvm-mc-{VERSION}", "--disassemble", "--triple=aarch64", "-mattr=+all"], content)
    lines = [
        " ".join(line.split()) for line in done.stdout.splitlines() if line.strip() and not line.strip().startswith(".")
    ]
    if done.returncode or len(lines) != len(words):
        raise DeviceError(
            f"llvm-mc-{VERSION} reads {len(lines)} of {len(words)} instructions: {' '.join(done.stderr.split())[:200]}"
        )
    return [re.sub(r"^bl(r?) ", r"b\1 ", _BRANCH.sub(r"\1 .Lthere", line)) for line in lines]


def analyse(blocks: Sequence[list[str]], core: str) -> list[float]:
    """Cycles of one execution of each block of assembly on LLVM's model of `core`.

    Atomic operations, which the C library has around its allocations, are not in every model and cost nothing where
    they are not.
    """
    check_tools()
    text = "".join(
        f"# LLVM-MCA-BEGIN block{number}\n" + "\n".join(lines) + f"\n# LLVM-MCA-END block{number}\n"
        for number, lines in enumerate(blocks)
    )
    done = run_program(
        [
            f"llvm-mca-{VERSION}",
            "-mtriple=aarch64-linux-gnu",
            f"-mcpu={core}",
            "-mattr=+all",
            f"-iterations={ITERATIONS}",
            "-all-views=false",
            "-summary-view",
            "-skip-unsupported-instructions=lack-sched",
        ],
        text,
    )
    found = [int(cycles) / ITERATIONS for cycles in re.findall(r"^Total Cycles:\s+(\d+)", done.stdout, re.MULTILINE)]
    if done.returncode or len(found) != len(blocks):
        said = " ".join(done.stderr.split())[:200]
        raise DeviceError(f"llvm-mca-{VERSION} models {len(found)} of {len(blocks)} blocks on {core}: {said}")
    return [max(cycles, len(lines) / DECODED.get(core, len(lines) or 1)) for cycles, lines in zip(found, blocks)]


@functools.cache
def multiply_adds_per_cycle(core: str) -> float:
    """NEON multiply-adds (of four floats) that the model of `core` starts in a cycle when nothing holds them up."""
    independent = [f"fmla v{register}.4s, v30.4s, v31.4s" for register in range(24)]
    (cycles,) = analyse([independent], core)
    return round(len(independent) / cycles, 1)

"""What this machine's processor is: its architecture, features, caches and name."""

from __future__ import annotations

import platform
import re
from collections.abc import Collection
from functools import cache

from mest_compile.base.errors import TargetError
from mest_compile.hardware import host

# LLVM's own host detection names a CPU by family and then uses features that a hypervisor masks; feature flags decide
# instead.
# AVX-512 code on 8 floats where the multipliers are 8 wide (Zen 4: with 16 a step of the wide ResNet-32 takes 264 ms
# instead of 207, block, and 262 instead of 232, unstructured; with all 32 registers 231 and 263). On 16 floats where
# they are 16 wide (Zen 5: 114 ms instead of 149, and 127 instead of 168; a Xeon with AMX: 293 instead of 310, block,
# 241 instead of 313, filter); flags that no CPU with narrower multipliers has, or has together, tell.
NARROW = ("x86-64-v2",)  # knows no float16
_AVX2 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe"}
_AVX512 = _AVX2 | {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"}
_CPU_BY_FLAGS = (
    (_AVX512 | {"avx512_vp2intersect", "avx_vnni"}, "x86-64-v4", 16),
    (_AVX512 | {"amx_tile"}, "x86-64-v4", 16),
    (_AVX512, "x86-64-v4", 8),
    (_AVX2, "x86-64-v3", 8),
    ({"sse4_2"}, "x86-64-v2", 4),
    ({"asimd"}, "generic", 4),
)
_ALIASES = {"arm64": "aarch64", "amd64": "x86_64", "armv7l": "arm", "armv8l": "arm"}
# What Linux calls what LLVM calls otherwise; of ARM what matters here.
LINUX_NAMES = {"bmi": ("bmi1",), "lzcnt": ("abm",), "sse3": ("pni",), "egpr": ("apx",)}
LINUX_NAMES_OF_ARM: dict[str, dict[str, tuple[str, ...]]] = {
    "aarch64": {
        "neon": ("asimd",),
        "lse": ("atomics",),
        "fullfp16": ("fphp", "asimdhp"),
        "dotprod": ("asimddp",),
        "sve": ("sve",),
    },
    "arm": {"neon": ("neon",), "vfp4": ("vfpv4",)},
}
# Bits of AT_HWCAP (Linux, arch/arm64/include/uapi/asm/hwcap.h).
_HWCAP = {"asimd": 1 << 1, "atomics": 1 << 8, "fphp": 1 << 9, "asimdhp": 1 << 10, "asimddp": 1 << 20, "sve": 1 << 22}


def host_machine() -> str:
    """This machine's architecture, as targets' triples begin: "x86_64", "aarch64", "arm"."""
    machine = platform.machine().lower()
    return _ALIASES.get(machine, machine)


def lacking_features(needed: Collection[str]) -> list[str]:
    """Those of `needed_features` that this machine, of the target's architecture, does not have."""
    if host_machine() == "aarch64" and (has := host.hardware_bits()) is not None:
        # Not what the kernel lists of its processor: under emulation that is another machine's.
        return [name for name in sorted(needed) if name in _HWCAP and not has & _HWCAP[name]]
    return lacking_in(needed, _cpu_flags())


def lacking_in(needed: Collection[str], features: Collection[str]) -> list[str]:
    """Those of `needed_features` that are not among a machine's, as its kernel lists them."""
    return sorted(set(needed) - {joined(name) for name in features})


def joined(name: str) -> str:
    """ "avx512_bf16", as the kernel has it, and "avx512bf16", as LLVM has it, are one; "sse4_1" and "sse4.1" too."""
    return re.sub(r"[._-]", "", name)


def host_cpu() -> tuple[str, int]:
    """(LLVM's CPU name, floats of a vector register) that every instruction of this machine's flags allows."""
    flags = _cpu_flags()
    for needed, cpu, vector in _CPU_BY_FLAGS:
        if needed <= flags:
            return cpu, vector
    raise TargetError(
        f"this CPU has none of AVX2, SSE4.2 or NEON (flags: {len(flags)} found); write a TOML target and pass its path"
    )


def has_bfloat16() -> bool:
    """Whether this machine has AVX512-BF16, which no CPU has without the instructions of x86-64-v4."""
    return _AVX512 | {"avx512_bf16"} <= _cpu_flags()


def _cpu_flags() -> set[str]:
    """The features that the kernel lists of this machine's first processor."""
    return cpu_features(host.told(host.CPUINFO))


def cpu_features(cpuinfo: str) -> set[str]:
    """The same out of a machine's cpuinfo."""
    for line in cpuinfo.splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def cache_bytes(level: int) -> int | None:
    """Data cache of one core in bytes, as the kernel tells it; None where it does not."""
    for index in sorted(host.CACHES.glob("index*")):
        if (index / "level").read_text().strip() == str(level) and (
            index / "type"
        ).read_text().strip() != "Instruction":
            return int((index / "size").read_text().strip().removesuffix("K")) * 1024
    return None


@cache
def host_model() -> str:
    """This machine."""
    return machine_model(host.told(host.CPUINFO), host.told(host.BOARD))


def machine_model(cpuinfo: str, board: str = "") -> str:
    """The CPU that a machine's cpuinfo tells of: "AMD EPYC, family 26, model 2". Names alone are shared by
    generations, and cores by boards whose caches and memory differ, so that the board's name, where the machine tells
    it, belongs to it. "": nothing is told.
    """
    names = {
        "model name": "",
        "cpu family": "family ",
        "model": "model ",
        "CPU implementer": "implementer ",
        "CPU part": "part ",
        "Hardware": "",
        "Model": "",
    }
    found: dict[str, list[str]] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if value.strip() not in found.setdefault(name.strip(), []):
            found[name.strip()].append(value.strip())
    told = [
        said + " and ".join(found[name] if name == "CPU part" else found[name][:1])
        for name, said in names.items()
        if name in found
    ]
    if (name := board.strip("\0 \n")) and name not in told:
        told.append(name)
    return ", ".join(told)

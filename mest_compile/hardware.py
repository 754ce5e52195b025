"""Devices: one TOML file each in targets/, read into a Target; "local" is completed from the machine at hand."""

from __future__ import annotations

import ctypes
import platform
import re
import tomllib
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from mest_compile import checks
from mest_compile.errors import TargetError, UnknownName
from mest_compile.host import cores

# LLVM's own host detection names a CPU by family and then uses features that a hypervisor masks; feature flags decide instead.
# AVX-512 code on 8 floats where the multipliers are 8 wide (Zen 4: with 16 a step of the wide ResNet-32 takes 264 ms instead of 207, block,
# and 262 instead of 232, unstructured; with all 32 registers 231 and 263). On 16 floats where they are 16 wide (Zen 5: 114 ms instead of
# 149, and 127 instead of 168; a Xeon with AMX: 293 instead of 310, block, 241 instead of 313, filter); flags that no CPU with narrower
# multipliers has, or has together, tell.
CPUINFO = Path("/proc/cpuinfo")
_NARROW = ("x86-64-v2",)  # knows no float16
_AVX2 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe"}
_AVX512 = _AVX2 | {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"}
_CPU_BY_FLAGS = ((_AVX512 | {"avx512_vp2intersect", "avx_vnni"}, "x86-64-v4", 16), (_AVX512 | {"amx_tile"}, "x86-64-v4", 16),
                 (_AVX512, "x86-64-v4", 8),
                 (_AVX2, "x86-64-v3", 8), ({"sse4_2"}, "x86-64-v2", 4), ({"asimd"}, "generic", 4))


@dataclass(frozen=True, slots=True)
class Gpu:
    """What an OpenCL device allows and what it is capable of; for the generic targets the least of a family.

    wave            threads that run in step
    threads         of a work-group, as kernels prefer them: a power of two
    most_threads    that a work-group may have
    local_bytes     local memory of a work-group
    most_buffer_bytes  of one buffer
    most_image_side  pixels of a side of a 2D image; no kernel here reads images. The default is the least that OpenCL 1.2 allows
    name            that the device's or its platform's name holds, in capitals or not; None: the first GPU, else the first device
    gflops, gigabytes_per_second  float32 peak and memory bandwidth: the two lines of the roofline
    """

    wave: int
    threads: int
    most_threads: int
    local_bytes: int
    most_buffer_bytes: int
    gflops: float
    gigabytes_per_second: float
    most_image_side: int = 8192
    name: str | None = None

    def __post_init__(self):
        if self.name is not None and (not isinstance(self.name, str) or not self.name.strip()):
            raise TargetError(f"gpu.name is {self.name!r}; wanted a part of the device's name, or none for any device")
        if self.threads < 1 or self.threads & (self.threads - 1) or self.threads > self.most_threads:
            raise TargetError(f"gpu.threads is {self.threads}; wanted a power of two of at most most_threads, {self.most_threads}")


@dataclass(frozen=True, slots=True)
class Target:
    """A device that kernels are compiled for.

    name    of its TOML file
    device  kind of device, which picks the schedules: "cpu" or "opencl"
    llvm    TVM target fields (kind, mcpu, mtriple, ...), as sorted pairs; lists (mattr) as tuples
    vector  float32 elements of a vector register
    registers  vector registers
    l1_bytes, l2_bytes  data cache of one core
    cores   processor cores
    gpu     limits of an OpenCL device; None on a CPU
    memory_bytes  of the smallest device of that kind; None: not known
    cycle_model   LLVM's name of the core whose pipeline gives modelled cycles; None: there are none for it
    host_triple   LLVM triple of the CPU that launches an OpenCL device's kernels; None: this machine's
    float16  whether it turns vectors of float16 into float32 and back in an instruction, so that activations may be stored so
    """

    name: str
    device: str
    llvm: tuple[tuple[str, str | tuple[str, ...]], ...]
    vector: int
    registers: int
    l1_bytes: int
    l2_bytes: int
    cores: int
    gpu: Gpu | None = None
    memory_bytes: int | None = None
    cycle_model: str | None = None
    host_triple: str | None = None
    float16: bool = False

    def __post_init__(self):
        if self.vector < 1 or self.vector & (self.vector - 1):
            raise TargetError(f"target {self.name!r}: vector is {self.vector} floats; wanted a power of two")
        if (self.device == "opencl") != (self.gpu is not None):
            raise TargetError(f"target {self.name!r}: device is {self.device!r}; a table [gpu] belongs to \"opencl\" and only to it")

    @property
    def vectors(self) -> tuple[int, ...]:
        """Widths that may be the fastest for a step: where registers hold 16 floats multipliers may hold 8, and 8 suit some steps."""
        return tuple(sorted({self.vector, 8, 16})) if self.tvm_fields.get("mcpu") == "x86-64-v4" else (self.vector,)

    @property
    def limits(self) -> Gpu:
        """`gpu`, where there must be one. Raises TargetError on a CPU."""
        if self.gpu is None:
            raise TargetError(f"target {self.name!r} is no OpenCL device")
        return self.gpu

    @property
    def processor(self) -> Target:
        """The CPU that launches this device's kernels; a CPU launches its own."""
        if self.gpu is None:
            return self
        triple = (("mtriple", self.host_triple),) if self.host_triple else ()
        return replace(self, device="cpu", gpu=None, llvm=(("kind", "llvm"), *triple))

    def for_batch(self, batch: int) -> Target:
        """This device with the vector that steps of `batch` examples use: of one wider than 8 floats half, where more would stay empty."""
        wasteful = self.vector > 8 and 0 < batch % self.vector <= self.vector // 2
        return replace(self, vector=self.vector // 2).for_batch(batch) if wasteful else self

    @property
    def tvm_fields(self) -> dict[str, Any]:
        """What tvm.target.Target takes."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.llvm}

    def to_tvm(self) -> Any:
        """TVM's target. Raises TargetError when LLVM does not know the CPU: it would print a line and compile for any CPU of its kind."""
        import tvm
        from tvm.target.codegen import llvm_get_cpu_archlist, llvm_get_system_triple, llvm_is_valid_cpu

        fields = self.tvm_fields
        if fields["kind"] == "llvm" and "mcpu" in fields:
            triple = fields.get("mtriple") or str(llvm_get_system_triple())
            if not llvm_is_valid_cpu(fields["mcpu"], triple):
                known = ", ".join(sorted(map(str, llvm_get_cpu_archlist(tvm.target.Target({"kind": "llvm", "mtriple": triple})))))
                raise TargetError(f"target {self.name!r}: LLVM has no CPU {fields['mcpu']!r} for {triple}; it has: {known}")
        return tvm.target.Target(fields)


_ALIASES = {"arm64": "aarch64", "amd64": "x86_64", "armv7l": "arm", "armv8l": "arm"}
# Families of x86 instructions that LLVM puts into loops by itself; what a program has to ask for (AES, SHA, AMX), or what only an operating
# system uses, does not matter.
_IN_LOOPS = re.compile(r"s?sse|avx(?!10)|fma|xop|f16c|bmi|tbm|lzcnt|popcnt|movbe|cmov|gfni|egpr")
# What Linux calls what LLVM calls otherwise; of ARM what matters here.
_LINUX_NAMES = {"bmi": ("bmi1",), "lzcnt": ("abm",), "sse3": ("pni",), "egpr": ("apx",)}
_LINUX_NAMES_OF_ARM: dict[str, dict[str, tuple[str, ...]]] = {
    "aarch64": {"neon": ("asimd",), "lse": ("atomics",), "fullfp16": ("fphp", "asimdhp"), "dotprod": ("asimddp",), "sve": ("sve",)},
    "arm": {"neon": ("neon",), "vfp4": ("vfpv4",)}}
# Bits of AT_HWCAP (Linux, arch/arm64/include/uapi/asm/hwcap.h).
_HWCAP = {"asimd": 1 << 1, "atomics": 1 << 8, "fphp": 1 << 9, "asimdhp": 1 << 10, "asimddp": 1 << 20, "sve": 1 << 22}
_AT_HWCAP = 16


def host_machine() -> str:
    """This machine's architecture, as targets' triples begin: "x86_64", "aarch64", "arm"."""
    machine = platform.machine().lower()
    return _ALIASES.get(machine, machine)


def lacking_features(needed: Collection[str]) -> list[str]:
    """Those of `needed_features` that this machine, of the target's architecture, does not have."""
    if host_machine() == "aarch64":
        tell = ctypes.CDLL(None).getauxval  # not /proc/cpuinfo: under emulation that is another machine's
        tell.restype = ctypes.c_ulong
        has = tell(ctypes.c_ulong(_AT_HWCAP))
        return [name for name in sorted(needed) if name in _HWCAP and not has & _HWCAP[name]]
    return lacking_in(needed, _cpu_flags())


def lacking_in(needed: Collection[str], features: Collection[str]) -> list[str]:
    """Those of `needed_features` that are not among a machine's, as its kernel lists them."""
    return sorted(set(needed) - {_joined(name) for name in features})


def needed_features(target: Target) -> frozenset[str]:
    """CPU features, by the kernel's names without dots and dashes, that LLVM may use in code for the target.

    Raises TargetError when LLVM does not know the CPU.
    """
    return _needed(target.processor) if "mcpu" in target.tvm_fields or "mattr" in target.tvm_fields else frozenset()


@cache
def _needed(target: Target) -> frozenset[str]:
    from tvm.target.codegen import llvm_get_cpu_features

    found = set(map(str, llvm_get_cpu_features(target.to_tvm())))
    machine = target.tvm_fields.get("mtriple", host_machine()).partition("-")[0]
    for start, names in _LINUX_NAMES_OF_ARM.items():
        if machine.startswith(start):
            return frozenset(name for feature in found & names.keys() for name in names[feature])
    used = filter(_IN_LOOPS.match, found)
    return frozenset(_joined(name) for feature in used for name in _LINUX_NAMES.get(feature, (feature,)))


def _joined(name: str) -> str:
    """"avx512_bf16", as the kernel has it, and "avx512bf16", as LLVM has it, are one; "sse4_1" and "sse4.1" too."""
    return re.sub(r"[._-]", "", name)


def target_names() -> list[str]:
    """Names of the targets that are shipped."""
    return sorted(entry.name.removesuffix(".toml") for entry in resources.files("mest_compile.targets").iterdir()
                  if entry.name.endswith(".toml"))


def find_target(target: str | Path | Target) -> Target:
    """A Target from its name, a TOML file's path, or itself. Raises UnknownName, TargetError."""
    if isinstance(target, Target):
        return target
    if not isinstance(target, str | Path):
        raise TargetError(f"target is {checks.shown(target)}; wanted a name, the path of a TOML file, or a mest.Target")
    path = Path(target)
    if path.suffix == ".toml":
        if not path.is_file():
            raise TargetError(f"no target file {path}; give a TOML file or one of: {', '.join(target_names())}")
        return _read(path.stem, path.read_text())
    if str(target) not in target_names():
        raise UnknownName(f"no target {str(target)!r}; there are: {', '.join(target_names())}, or a path to a TOML file")
    return _read(str(target), (resources.files("mest_compile.targets") / f"{target}.toml").read_text())


def _read(name: str, text: str) -> Target:
    try:
        fields = tomllib.loads(text)
        llvm = {key: tuple(value) if isinstance(value, list) else value for key, value in fields["llvm"].items()}
        found = Target(name=name, device=fields["device"], llvm=tuple(sorted(llvm.items())), vector=fields["vector"],
                       registers=fields["registers"], l1_bytes=fields["l1_bytes"], l2_bytes=fields["l2_bytes"], cores=fields["cores"],
                       gpu=Gpu(**fields["gpu"]) if "gpu" in fields else None, memory_bytes=fields.get("memory_bytes"),
                       cycle_model=fields.get("cycle_model"), host_triple=fields.get("host_triple"),
                       float16=fields.get("float16", False))
    except (tomllib.TOMLDecodeError, KeyError, AttributeError, TypeError) as problem:
        raise TargetError(f"target file {name}.toml is not a target: {problem!r}; compare it with targets/local.toml") from problem
    return _complete_from_host(found) if fields.get("detect", False) else found


def _complete_from_host(target: Target) -> Target:
    """`target` with the CPU, vector width, caches and cores of this machine."""
    cpu, vector = host_cpu()
    llvm = dict(target.llvm) | {"mcpu": cpu}
    return replace(target, llvm=tuple(sorted(llvm.items())), vector=vector, registers=32 if cpu == "generic" else 16,  # "generic": NEON
                   l1_bytes=_cache_bytes(1) or target.l1_bytes, l2_bytes=_cache_bytes(2) or target.l2_bytes,
                   cores=cores(), float16=cpu not in _NARROW)


def host_cpu() -> tuple[str, int]:
    """(LLVM's CPU name, floats of a vector register) that every instruction of this machine's flags allows."""
    flags = _cpu_flags()
    for needed, cpu, vector in _CPU_BY_FLAGS:
        if needed <= flags:
            return cpu, vector
    raise TargetError(f"this CPU has none of AVX2, SSE4.2 or NEON (flags: {len(flags)} found); write a TOML target and pass its path")


def _cpu_flags() -> set[str]:
    """The features that the kernel lists of this machine's first processor."""
    return cpu_features(CPUINFO.read_text())


def cpu_features(cpuinfo: str) -> set[str]:
    """The same out of a machine's /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def _cache_bytes(level: int) -> int | None:
    """Data cache of one core in bytes, as the kernel tells it; None where it does not."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "level").read_text().strip() == str(level) and (index / "type").read_text().strip() != "Instruction":
            return int((index / "size").read_text().strip().removesuffix("K")) * 1024
    return None

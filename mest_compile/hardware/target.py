"""Devices: one TOML file each in targets/, read into a Target; "local" is completed from the machine at hand."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from mest_compile.base import checks, plugins
from mest_compile.base.errors import TargetError, UnknownName
from mest_compile.base.names import meant
from mest_compile.hardware.cpu import (
    LINUX_NAMES,
    LINUX_NAMES_OF_ARM,
    NARROW,
    cache_bytes,
    has_bfloat16,
    host_cpu,
    host_machine,
    joined,
    lacking_features,
)
from mest_compile.hardware.folders import Kept, cache_folder, digest
from mest_compile.hardware.host import cores
from mest_compile.hardware.tvmruntime import runtime
from mest_compile.ir.layouts.batch import abreast

BFLOAT16 = "+avx512bf16"  # LLVM's name of the instructions
BFLOAT16_LANES = 32  # in 512 bits
LLVM_LEVEL = 2  # of its optimisations: those of level 3 make no kernel faster, and compiling takes 1.6 times as long


@dataclass(frozen=True, slots=True)
class Gpu:
    """What an OpenCL device allows and what it is capable of; for the generic targets the least of a family.

    threads         of a work-group, as kernels prefer them: a power of two
    most_threads    that a work-group may have
    local_bytes     local memory of a work-group
    most_buffer_bytes  of one buffer
    name            that the device's or its platform's name holds, in capitals or not; None: the first GPU, else the
                    first device
    gflops, gigabytes_per_second  float32 peak and memory bandwidth: the two lines of the roofline
    """

    threads: int
    most_threads: int
    local_bytes: int
    most_buffer_bytes: int
    gflops: float
    gigabytes_per_second: float
    name: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and (not isinstance(self.name, str) or not self.name.strip()):
            raise TargetError(f"gpu.name is {self.name!r}; wanted a part of the device's name, or none for any device")
        if self.threads < 1 or self.threads & (self.threads - 1) or self.threads > self.most_threads:
            raise TargetError(
                f"gpu.threads is {self.threads}; wanted a power of two of at most most_threads, {self.most_threads}"
            )


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
    float16  whether it turns vectors of float16 into float32 and back in an instruction, so that activations may be
             stored so
    examples  of a slice of an image, a power of two; None: as many as a vector holds. Of fewer a vector covers
             neighbouring pixels of a row
    bfloat16  whether it has AVX512-BF16: sums of products of pairs of bfloat16, which steps use that store activations
             so
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
    bfloat16: bool = False
    examples: int | None = None

    def __post_init__(self) -> None:
        if self.vector < 1 or self.vector & (self.vector - 1):
            raise TargetError(f"target {self.name!r}: vector is {self.vector} floats; wanted a power of two")
        if self.bfloat16 and not (triple := self.tvm_fields.get("mtriple") or host_machine()).startswith("x86"):
            raise TargetError(
                f"target {self.name!r}: bfloat16 says that its CPU has AVX512-BF16, which x86 CPUs may have, and it is "
                f"for {triple}; leave the line out"
            )

    @property
    def vectors(self) -> tuple[int, ...]:
        """Widths that may be the fastest for a step: where registers hold 16 floats multipliers may hold 8, and 8 suit
        some steps."""
        return tuple(sorted({self.vector, 8, 16})) if self.tvm_fields.get("mcpu") == "x86-64-v4" else (self.vector,)

    @property
    def slice_examples(self) -> int:
        """Examples of a slice of an image."""
        return self.examples or self.vector

    def abreast(self, width: int) -> int:
        """`Image.abreast` of rows of `width` pixels."""
        return abreast(width, self.slice_examples, self.vector)

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
        """This device with the vector that steps of `batch` examples use: of one wider than 8 floats half, where more
        would stay empty. A register that is filled by 16 of two bytes is so from 9 on. What is no processor takes fewer
        examples than a vector holds by the largest power of two that divides them: it has as many threads then, each
        with less to do, and no lane is empty."""
        if self.gpu is not None:
            return replace(self, vector=batch & -batch) if batch < self.vector else self
        least = 16 if self.pairs and batch > 8 else 8
        wasteful = self.vector > least and 0 < batch % self.vector <= self.vector // 2
        return replace(self, vector=self.vector // 2).for_batch(batch) if wasteful else self

    def storing(self, activations: str) -> Target:
        """This device as steps use it that store activations so: of two bytes a register holds twice as many, and code
        may have the instructions that only they want. As it is where it has none."""
        used = self.tvm_fields.get("mattr", [])
        if activations != "bfloat16" or not self.bfloat16 or BFLOAT16 in used:
            return self
        llvm = {**dict(self.llvm), "mattr": (*used, BFLOAT16)}
        return replace(self, vector=BFLOAT16_LANES, llvm=tuple(sorted(llvm.items())))

    @property
    def pairs(self) -> bool:
        """Whether its code has instructions for sums of products of pairs of bfloat16."""
        return BFLOAT16 in self.tvm_fields.get("mattr", [])

    @property
    def tvm_fields(self) -> dict[str, Any]:
        """What tvm.target.Target takes."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.llvm}

    def to_tvm(self) -> Any:
        """TVM's target. Raises TargetError when LLVM does not know the CPU: it would print a line and compile for any
        CPU of its kind."""
        import tvm
        from tvm.target.codegen import llvm_get_cpu_archlist, llvm_get_system_triple, llvm_is_valid_cpu

        fields = self.tvm_fields
        if fields["kind"] == "llvm" and "mcpu" in fields:
            triple = fields.get("mtriple") or str(llvm_get_system_triple())
            if not llvm_is_valid_cpu(fields["mcpu"], triple):
                known = ", ".join(
                    sorted(map(str, llvm_get_cpu_archlist(tvm.target.Target({"kind": "llvm", "mtriple": triple}))))
                )
                raise TargetError(
                    f"target {self.name!r}: LLVM has no CPU {fields['mcpu']!r} for {triple}; it has: {known}"
                )
        return tvm.target.Target({"opt-level": LLVM_LEVEL, **fields} if fields["kind"] == "llvm" else fields)


# Families of x86 instructions that LLVM puts into loops by itself; what a program has to ask for (AES, SHA, AMX), or
# what only an operating system uses, does not matter.
_IN_LOOPS = re.compile(r"s?sse|avx(?!10)|fma|xop|f16c|bmi|tbm|lzcnt|popcnt|movbe|cmov|gfni|egpr")


_FEATURE_BYTES = 2**20  # of what LLVM told of targets, some 2 KB each, kept as asking it takes a second


def needed_features(target: Target) -> frozenset[str]:
    """CPU features, by the kernel's names without dots and dashes, that LLVM may use in code for the target.

    Raises TargetError when LLVM does not know the CPU.
    """
    return _needed(target.processor) if "mcpu" in target.tvm_fields or "mattr" in target.tvm_fields else frozenset()


@cache
def _needed(target: Target) -> frozenset[str]:
    key = digest(json.dumps([host_machine(), metadata.version("apache-tvm"), target.tvm_fields]).encode())
    kept = Kept(cache_folder() / "features", _FEATURE_BYTES).made(
        key, lambda: json.dumps(_told_by_llvm(target)).encode()
    )
    found = set(json.loads(kept))
    machine = target.tvm_fields.get("mtriple", host_machine()).partition("-")[0]
    for start, names in LINUX_NAMES_OF_ARM.items():
        if machine.startswith(start):
            return frozenset(name for feature in found & names.keys() for name in names[feature])
    used = filter(_IN_LOOPS.match, found)
    return frozenset(joined(name) for feature in used for name in LINUX_NAMES.get(feature, (feature,)))


def _told_by_llvm(target: Target) -> list[str]:
    runtime()
    from tvm.target.codegen import llvm_get_cpu_features

    return sorted(map(str, llvm_get_cpu_features(target.to_tvm())))


def target_names() -> list[str]:
    """Names of the targets that are shipped or plugged in."""
    shipped = resources.files("mest_compile.targets").iterdir()
    found = {entry.name.removesuffix(".toml") for entry in shipped if entry.name.endswith(".toml")}
    return sorted(found | _plugged().keys())


def _plugged() -> dict[str, Path]:
    plugins.take_given()
    return plugins.targets()


def _text_of(name: str) -> str:
    """Of its file, a plugged one first."""
    path = _plugged().get(name)
    return (resources.files("mest_compile.targets") / f"{name}.toml").read_text() if path is None else path.read_text()


def boards_of_targets() -> dict[str, str]:
    """{name of a board or chip, in small letters without spaces, "-" and "_": the target that it has}."""
    return {_plain(board): name for name in target_names() for board in boards_of(name)}


def boards_of(name: str) -> list[str]:
    """Names of the boards and chips that a target of `target_names` is for; of a file with an error, which says itself
    when it is asked for, none."""
    try:
        return list(tomllib.loads(_text_of(name)).get("boards", []))
    except tomllib.TOMLDecodeError:
        return []


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]", "", name.lower())


def find_target(target: str | Path | Target) -> Target:
    """A Target from its name, a board's, a TOML file's path, or itself. Raises UnknownName, TargetError."""
    if isinstance(target, Target):
        return target
    if not isinstance(target, str | Path):
        raise TargetError(f"target is {checks.shown(target)}; wanted a name, the path of a TOML file, or a mest.Target")
    path = Path(target)
    if path.suffix == ".toml":
        if not path.is_file():
            raise TargetError(f"no target file {path}; give a TOML file or one of: {', '.join(target_names())}")
        return _read(path.stem, path.read_text())
    names = target_names()
    boards = {} if str(target) in names else boards_of_targets()
    target = boards.get(_plain(str(target)), target)
    if str(target) not in names:
        near = meant(str(target), [*names, *boards])
        raise UnknownName(
            f"no target {str(target)!r}; there are: {', '.join(names)}, boards as `mest-compile targets` lists them, "
            f"or a path to a TOML file{near}"
        )
    return _read(str(target), _text_of(str(target)))


FILE_KEYS = {field.name for field in fields_of(Target)} - {"name"} | {"boards", "detect"}


def _read(name: str, text: str) -> Target:
    try:
        fields = tomllib.loads(text)
        if unknown := sorted(fields.keys() - FILE_KEYS):
            raise TargetError(f"target file {name}.toml has no key {unknown[0]!r}{meant(unknown[0], FILE_KEYS)}")
        llvm = {key: tuple(value) if isinstance(value, list) else value for key, value in fields["llvm"].items()}
        memory = fields.get("memory_bytes")
        found = Target(
            name=name,
            device=fields["device"],
            llvm=tuple(sorted(llvm.items())),
            vector=fields["vector"],
            registers=fields["registers"],
            l1_bytes=checks.size("l1_bytes", fields["l1_bytes"], error=TargetError),
            l2_bytes=checks.size("l2_bytes", fields["l2_bytes"], error=TargetError),
            cores=fields["cores"],
            gpu=Gpu(**fields["gpu"]) if "gpu" in fields else None,
            memory_bytes=None if memory is None else checks.size("memory_bytes", memory, error=TargetError),
            cycle_model=fields.get("cycle_model"),
            host_triple=fields.get("host_triple"),
            float16=fields.get("float16", False),
            bfloat16=fields.get("bfloat16", False),
        )
    except TargetError as problem:
        raise TargetError(problem if name in str(problem) else f"target file {name}.toml: {problem}") from problem
    except KeyError as problem:
        raise TargetError(f"target file {name}.toml lacks {problem}; compare it with targets/local.toml") from problem
    except (tomllib.TOMLDecodeError, AttributeError, TypeError) as problem:
        raise TargetError(
            f"target file {name}.toml is not a target: {problem}; compare it with targets/local.toml"
        ) from problem
    return _complete_from_host(found) if fields.get("detect", False) else found


def _complete_from_host(target: Target) -> Target:
    """`target` with the CPU, vector width, caches and cores of this machine."""
    cpu, vector = host_cpu()
    llvm = dict(target.llvm) | {"mcpu": cpu}
    return replace(
        target,
        llvm=tuple(sorted(llvm.items())),
        vector=vector,
        registers=32 if cpu == "generic" else 16,  # "generic": NEON
        l1_bytes=cache_bytes(1) or target.l1_bytes,
        l2_bytes=cache_bytes(2) or target.l2_bytes,
        cores=cores(),
        float16=cpu not in NARROW,
        bfloat16=has_bfloat16(),
    )


def triple_of(target: Target) -> tuple[str, str]:
    """(architecture as in `elf.MACHINES`, "gnu" or "android") of a target's CPU."""
    triple = target.tvm_fields.get("mtriple", "")
    if not triple:
        return host_machine(), "gnu"
    architecture = triple.partition("-")[0]
    return "arm" if architecture.startswith("arm") else architecture, "android" if "android" in triple else "gnu"


def is_native(target: Target) -> bool:
    """Whether the target's CPU is of this machine's architecture and system."""
    return triple_of(target) == (host_machine(), "gnu")


def is_foreign(target: Target) -> bool:
    """Whether this machine cannot run what is compiled for the target."""
    return bool(obstacle(target))


def obstacle(target: Target) -> str:
    """Why this machine cannot run what is compiled for the target; "": it can. An OpenCL device is one that it may
    have.

    Raises TargetError when LLVM does not know the CPU.
    """
    if not is_native(target):
        return f"that is for {' and '.join(triple_of(target))}, this machine is {host_machine()} and gnu"
    lacking = lacking_features(needed_features(target))
    return f"this machine's CPU lacks {', '.join(lacking)}" if lacking else ""

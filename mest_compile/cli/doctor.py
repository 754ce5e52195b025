"""`mest-compile doctor`: is everything here that compiling and training need?"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import typer

from mest_compile.base.errors import MestError
from mest_compile.cli.output import Json, print_json, print_table

LEAST_CACHE_BYTES = 100 * 2**20  # some thousands of kernels


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; status is "ok", "warn" (works, but slower or less) or "fail"."""

    name: str
    status: str
    detail: str


def doctor(as_json: Json = False) -> None:
    """Check this machine: packages, compiler, linker, target, threads, cache. Exit code 1 when something needed is
    missing."""
    checks = list(_checks())
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        print_table(["check", "status", "detail"], [[check.name, check.status, check.detail] for check in checks])
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


def _checks() -> Iterator[Check]:
    yield Check("python", "ok", platform.python_version())
    yield from _packages()
    yield _tvm_runs()
    yield _torch_build()
    yield _kernel()
    yield _arm_linker()
    yield _arm_model()
    yield _opencl()
    yield _host_target()
    yield _timed()
    yield _threads()
    yield _huge_pages()
    yield _cache_folder()


def _packages() -> Iterator[Check]:
    """Every requirement of the installed distribution; those that are satisfied and not central share a line."""
    from packaging.requirements import Requirement

    central = {"apache-tvm", "apache-tvm-ffi", "torch"}
    fine = []
    for requirement in map(Requirement, metadata.requires("mest-compile") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Check(requirement.name, "fail", f"not installed; run: pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield Check(requirement.name, "fail", f"{version} is installed; run: pip install '{requirement}'")
        elif requirement.name in central:
            yield Check(requirement.name, "ok", version)
        else:
            fine.append(requirement.name)
    yield Check("other packages", "ok", ", ".join(fine))


def _tvm_runs() -> Check:
    try:
        import tvm
    except (ImportError, OSError) as problem:
        return Check("tvm", "fail", f"cannot be imported: {problem}")
    if not tvm.runtime.enabled("llvm"):
        return Check("tvm", "fail", "this build has no LLVM; install the apache-tvm wheel")
    return Check("tvm", "ok", "imports, has LLVM")


def _torch_build() -> Check:
    try:
        import torch
    except (ImportError, OSError) as problem:
        return Check("torch build", "fail", f"cannot be imported: {problem}")
    if torch.version.cuda:
        return Check(
            "torch build", "warn", f"CUDA {torch.version.cuda}; only the CPU is used, the CPU build is smaller"
        )
    return Check("torch build", "ok", "CPU")


def _kernel() -> Check:
    """One small kernel all the way: compiled, linked, loaded."""
    from mest_compile.hardware.target import find_target
    from mest_compile.ir.layouts.batch import Image
    from mest_compile.kernels.cache import Builder
    from mest_compile.kernels.linkers import find_linker
    from mest_compile.kernels.source import kernel_source
    from mest_compile.operators.conversion import ImageImport

    try:
        target = find_target("local")
        linker = find_linker(target)
        with tempfile.TemporaryDirectory() as folder:
            Builder(Path(folder)).function(kernel_source("image.import", ImageImport(Image(2, 3, 3, 8)), target))
    except MestError as problem:
        return Check("kernel", "fail", str(problem))
    except OSError as problem:
        return Check("kernel", "fail", f"no temporary folder can be written ({problem}); set TMPDIR to one that can")
    return Check("kernel", "ok", f"compiled, linked by {linker.name}, loaded")


def _arm_linker() -> Check:
    from mest_compile.hardware.target import find_target
    from mest_compile.kernels.linkers import find_linker, linkers

    try:
        find_linker(find_target("arm_cpu"))
    except MestError as problem:
        return Check("linker for ARM", "warn", str(problem))
    return Check("linker for ARM", "ok", ", ".join(linker.name for linker in linkers("aarch64")))


def _arm_model() -> Check:
    from mest_compile.devices import cycles, emulation

    machine = emulation.MACHINES["aarch64"]
    missing = emulation.missing_tools(machine) + cycles.missing_tools()
    if missing:
        return Check(
            "modelled cycles",
            "warn",
            f"no {', '.join(missing)}, which only `analyze` and `tune --measure model` need: "
            f"apt install --no-install-recommends {' '.join(machine.packages)} {cycles.PACKAGE}",
        )
    return Check("modelled cycles", "ok", f"{shutil.which(machine.emulator)}, llvm-mca-{cycles.VERSION}")


def _opencl() -> Check:
    from mest_compile.backends.opencl.runner import describe_device

    try:
        return Check("OpenCL", "ok", describe_device())
    except MestError as problem:
        return Check("OpenCL", "warn", f"{problem}; only OpenCL targets need it")


def _host_target() -> Check:
    from mest_compile.hardware.target import find_target

    try:
        target = find_target("local")
    except MestError as problem:
        return Check("target local", "fail", str(problem))
    return Check(
        "target local",
        "ok",
        f"{target.tvm_fields.get('mcpu')}, {target.vector} floats a vector, "
        f"L1 {target.l1_bytes // 1024} KiB, L2 {target.l2_bytes // 1024} KiB",
    )


def _timed() -> Check:
    """What `--activations auto` found on this machine."""
    from mest_compile.deciding import known

    told = [
        f"{one.target}, {one.examples} examples: {one.chosen} of "
        + "; ".join(f"{way} {seconds * 1e3:.1f} ms" for way, seconds in one.seconds.items())
        for one in known()
    ]
    return Check("activations auto", "ok", " | ".join(told) or "not timed yet: the first step that asks for it does")


def _threads() -> Check:
    from mest_compile.hardware.host import cores, cpu_quota

    usable, quota = cores(), cpu_quota()
    limits = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "TVM_NUM_THREADS") if name in os.environ]
    limits += [] if quota is None else [f"a quota of {quota:g} cores"]
    return Check("threads", "ok", ", ".join([f"{usable} of {os.cpu_count()} cores usable", *limits]))


def _huge_pages() -> Check:
    from mest_compile.hardware.host import HUGE_PAGES, told

    if not (said := told(HUGE_PAGES)):
        return Check(
            "huge pages", "warn", "this kernel has no transparent huge pages: more TLB misses in large activations"
        )
    chosen = said.partition("[")[2].partition("]")[0]
    if chosen == "never":
        return Check(
            "huge pages", "warn", f"transparent huge pages are off: echo madvise > {HUGE_PAGES} avoids TLB misses"
        )
    return Check("huge pages", "ok", chosen)


def _cache_folder() -> Check:
    from mest_compile.hardware.folders import cache_folder, cache_folders
    from mest_compile.hardware.host import forbids_execution

    folder, spare = cache_folder(), list(cache_folders())[-1]
    remedy = "every start compiles again; set XDG_CACHE_HOME to a folder of yours"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))
            file.flush()
        free = shutil.disk_usage(folder).free
    except OSError as problem:
        return Check("cache folder", "warn", f"{folder} cannot be written ({problem.strerror}): {remedy}")
    if folder == spare:
        return Check(
            "cache folder",
            "warn",
            f"{folder}, as neither XDG_CACHE_HOME nor HOME leads to a folder that can be used; it may be "
            "gone with the machine's next start",
        )
    if free < LEAST_CACHE_BYTES:
        return Check("cache folder", "warn", f"{folder} has {free / 2**20:.0f} MiB left; when it is full {remedy}")
    if forbids_execution(folder):
        return Check(
            "cache folder", "warn", f"{folder} is mounted noexec: kernels are loaded from the temporary folder instead"
        )
    return Check("cache folder", "ok", f"{folder}, {free / 2**30:.1f} GiB free")

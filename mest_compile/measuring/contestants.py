"""Who can be timed against whom: each contestant builds the same training step from a `Case`, in its own way and its
own process.

A further rival is one more entry in `CONTESTANTS`. Rivals whose versions cannot live beside ours have an environment of
their own (`benchmarks/environments.sh`); nothing that they call here needs tvm.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mest_compile.base.errors import NotInstalled, UnknownName
from mest_compile.measuring.case import PROGRAM, STEP, Built, Case
from mest_compile.measuring.dense_torch import (
    build_best_torch,
    build_torch,
    build_torch_compile,
    build_torch_in_bfloat16,
    load_torch,
)
from mest_compile.measuring.rivals import build_onnxruntime, build_sparseprop, load_onnxruntime, load_sparseprop

ENVIRONMENTS = Path(__file__).resolve().parents[2] / "benchmarks" / "environments"


@dataclass(frozen=True, slots=True)
class Contestant:
    """load         imports all that is needed, `build` returns one training step
    miniature    builds what is run before memory is counted
    environment  folder of its own environment in benchmarks/environments, None: this one
    takes_files  whether its model may be an .onnx file, a run folder, a checkpoint or an artifact
    """

    load: Callable[[], None]
    build: Callable[[Case], Built]
    packages: tuple[str, ...]
    miniature: Callable[[Case], Built]
    environment: str | None = None
    takes_files: bool = False


def find_contestant(name: str) -> Contestant:
    """Raises UnknownName with the names there are."""
    if name not in CONTESTANTS:
        raise UnknownName(f"no rival {name!r} to measure against; there are: {', '.join(sorted(CONTESTANTS))}")
    return CONTESTANTS[name]


def find_interpreter(name: str, own: str, given: str | Path | None = None) -> str:
    """The Python that runs a contestant: `given`, its environment's, or `own`. Raises NotInstalled, UnknownName."""
    environment = find_contestant(name).environment
    if environment is None:
        return own
    path = Path(given) if given is not None else ENVIRONMENTS / environment / "bin" / "python"
    if not os.access(path, os.X_OK):
        raise NotInstalled(
            f"{name} needs an environment of its own and there is no {path}; run benchmarks/environments.sh "
            f"{environment} "
            "in a clone of mest-compile, or give the Python of such an environment with --rival-python"
        )
    return str(path)


# Ours.


def _load_mest() -> None:
    import torch.export  # noqa: F401
    import tvm  # noqa: F401

    import mest_compile

    mest_compile.compile  # noqa: B018


def _build_mest(case: Case, tuned: bool = True) -> Built:
    import mest_compile as mest
    from mest_compile.compiling import compile_step
    from mest_compile.hardware.target import find_target
    from mest_compile.kernels.cache import Builder
    from mest_compile.records.log import Records

    builder = Builder()
    if Path(case.model, PROGRAM).is_file():
        step = mest.load(Path(case.model, STEP), threads=case.threads, builder=builder)
    else:
        records = None if tuned else Records(find_target(case.options.target))
        step = compile_step(case.source(), case.input_shape, case.options, builder=builder, records=records)
    images, labels = replace(case, classes=step.classes).batch()  # a file has its own
    origins = ", ".join(f"{count} {origin}" for origin, count in sorted(step.describe()["kernels"].items()))
    return Built(
        lambda: step(images, labels).loss,
        step.memory()["total"],
        builder.compiled > 0,
        (f"kernels: {origins}",),
    )


def _build_mest_untuned(case: Case) -> Built:
    """Our step on the defaults of its schedules, whatever tuning has found."""
    return _build_mest(case, tuned=False)


def _build_mest_for_avx2(case: Case) -> Built:
    """Our step untuned, and compiled for any machine with AVX2, whatever this one has beyond that."""
    return _build_mest_untuned(case.but(target="avx2"))


def _build_mest_dense(case: Case) -> Built:
    """Our step with all weights alive."""
    return _build_mest(replace(case, options=case.options.dense()))


def _build_mest_in_float32(case: Case) -> Built:
    """Our step with activations in float32: what storing them in less gains."""
    return _build_mest(case.but(activations="float32"))


def _build_mest_on_one_thread(case: Case) -> Built:
    return _build_mest(case.but(threads=1))


OUR_PACKAGES = ("mest-compile", "apache-tvm", "apache-tvm-ffi", "numpy")


def _ours(build: Callable[[Case], Built]) -> Contestant:
    return Contestant(_load_mest, build, OUR_PACKAGES, build, takes_files=True)


CONTESTANTS = {
    "mest": _ours(_build_mest),
    "mest-untuned": _ours(_build_mest_untuned),
    "mest-avx2": _ours(_build_mest_for_avx2),
    "mest-dense": _ours(_build_mest_dense),
    "mest-float32": _ours(_build_mest_in_float32),
    "mest-one-thread": _ours(_build_mest_on_one_thread),
    "torch": Contestant(load_torch, build_torch, ("torch", "numpy"), build_torch),
    "torch-bf16": Contestant(load_torch, build_torch_in_bfloat16, ("torch", "numpy"), build_torch_in_bfloat16),
    "torch-best": Contestant(load_torch, build_best_torch, ("torch", "numpy"), build_best_torch),
    "torch-compile": Contestant(load_torch, build_torch_compile, ("torch", "numpy"), build_torch),
    "sparseprop": Contestant(
        load_sparseprop, build_sparseprop, ("sparseprop", "torch", "numpy"), build_sparseprop, "sparseprop"
    ),
    "onnxruntime-training": Contestant(
        load_onnxruntime,
        build_onnxruntime,
        ("onnxruntime-training", "onnx", "torch", "numpy"),
        build_onnxruntime,
        "onnxruntime-training",
    ),
}


def run_miniature(contestant: Contestant, threads: int) -> bool:
    """Builds and runs the contestant's miniature once, before memory is counted; True when something was compiled that
    is ready next time."""
    # Code which libraries load on first use counts as imported on every side.
    built = contestant.miniature(Case("vgg11", (8, 3, 8, 8), width=4).but(scheme="unstructured", threads=threads))
    built.step()
    return built.cold

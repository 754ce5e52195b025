"""Who can be timed against whom: each contestant builds the same training step from a `Case`, in its own way and its
own process.

A further rival is one more entry in `CONTESTANTS`. Rivals whose versions cannot live beside ours have an environment of
their own (`benchmarks/environments.sh`); nothing that they call here needs tvm.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base.errors import NotInstalled, UnknownName, UsageError
from mest_compile.measuring.case import Case
from mest_compile.operators.losses.cross_entropy import CrossEntropy
from mest_compile.operators.optimizers.sgd import SGD

if TYPE_CHECKING:
    import torch

ENVIRONMENTS = Path(__file__).resolve().parents[2] / "benchmarks" / "environments"
PROGRAM, STEP = "model.pt2", "step.safetensors"  # what a folder given as Case.model holds
SWAPPED_ABOVE = 0.8  # SparseProp leaves layers dense that are not sparser than this
SPARSEPROP_VECTOR = 8  # examples that its convolution takes at a time; those left over it leaves out


@dataclass(frozen=True, slots=True)
class Built:
    """A training step that returns its loss, and what its builder knows about it.

    planned_bytes  memory that the step says it needs, None where it does not say
    cold           whether something was compiled that a second process would find ready; the harness then starts a
                   second one, because a compiler leaves memory behind that is no part of training
    notes          what a reader must know to judge the comparison
    """

    step: Callable[[], float]
    planned_bytes: int | None = None
    cold: bool = False
    notes: tuple[str, ...] = ()


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


# Dense torch.


def _load_torch() -> None:
    import torch  # noqa: F401


def torch_model(case: Case) -> torch.nn.Module:
    """The case's model in training mode, with the weights that every contestant starts from."""
    import torch

    if Path(case.model, PROGRAM).is_file():
        return torch.export.load(Path(case.model, PROGRAM)).module()
    return case.network().train()


def _build_torch(case: Case) -> Built:
    return Built(_torch_step(torch_model(case), case, channels_last=True))


def _build_torch_in_bfloat16(case: Case) -> Built:
    """Under autocast: convolutions and linear layers compute in bfloat16."""
    return Built(_torch_step(torch_model(case), case, channels_last=True, autocast=True))


TORCHS = {
    "float32, channels_last": (True, False),
    "float32, contiguous": (False, False),
    "bfloat16 autocast, channels_last": (True, True),
    "bfloat16 autocast, contiguous": (False, True),
}
WARM_STEPS, TRIED_STEPS, TRYING_SECONDS = 2, 3, 12.0  # steps that take seconds are tried less often


def _build_best_torch(case: Case) -> Built:
    """The fastest of `TORCHS` here, in the time that the process itself took, which others on the machine matter
    little to."""

    def spent(step: Callable[[], float]) -> float:
        start = time.process_time()
        step()
        return time.process_time() - start

    seconds = {}
    for name, (channels_last, autocast) in TORCHS.items():
        step = _torch_step(torch_model(case), case, channels_last, autocast=autocast)
        tried: list[float] = []
        while len(tried) < WARM_STEPS + TRIED_STEPS and sum(tried) < TRYING_SECONDS:
            tried.append(spent(step))
        seconds[name] = min(tried[WARM_STEPS:] or tried[-1:])
    best = min(seconds, key=seconds.__getitem__)
    channels_last, autocast = TORCHS[best]
    step = _torch_step(torch_model(case), case, channels_last, autocast=autocast)
    return Built(step, notes=(f"the fastest of {len(TORCHS)} ways of torch here: {best}",))


def _build_torch_compile(case: Case) -> Built:
    import torch

    step = _torch_step(torch_model(case), case, channels_last=True, wrap=torch.compile)
    step()  # compiles: part of the set-up
    return Built(step)


def _torch_step(
    model: torch.nn.Module,
    case: Case,
    channels_last: bool,
    wrap: Callable[[Any], Any] = lambda model: model,
    autocast: bool = False,
) -> Callable[[], float]:
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(case.threads)
    numpy_images, numpy_labels = case.batch()
    images, labels = torch.from_numpy(numpy_images), torch.from_numpy(numpy_labels)
    if channels_last and images.dim() == 4:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    rule = _usual_rule(case)
    optimizer = torch.optim.SGD(
        model.parameters(), rule.lr, rule.momentum, weight_decay=rule.weight_decay, nesterov=rule.nesterov
    )
    forward = wrap(model)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _usual_rule(case: Case) -> SGD:
    """The case's optimizer. Raises UsageError where it, or the loss, is none that the others have."""
    rule, loss = case.options.optimizer, case.options.loss
    if not isinstance(rule, SGD) or loss != CrossEntropy():
        raise UsageError(
            f"rivals are built with mest.SGD and cross-entropy, the case has {rule} and {loss}; leave them out"
        )
    return rule


# SparseProp.


def _load_sparseprop() -> None:
    import sparseprop.utils  # noqa: F401


def _build_sparseprop(case: Case) -> Built:
    """Unstructured whatever the case's scheme is. SparseProp times each layer and keeps it dense where its own kernel
    is slower."""
    sparsity = case.options.one_sparsity
    if sparsity is None or sparsity <= SWAPPED_ABOVE:
        raise UsageError(
            f"SparseProp leaves layers dense that are not more than {SWAPPED_ABOVE:.0%} sparse; the case has "
            f"{case.options.sparsity}"
        )
    if left := case.input_shape[0] % SPARSEPROP_VECTOR:
        raise UsageError(
            f"SparseProp's convolution takes {SPARSEPROP_VECTOR} examples at a time and would leave out the last "
            f"{left} of "
            f"{case.input_shape[0]}, without a word; give a batch that is a multiple of {SPARSEPROP_VECTOR}"
        )
    import torch
    from sparseprop.utils import swap_modules_with_sparse

    torch.set_num_threads(case.threads)
    model = torch_model(case)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, keep in unstructured_masks(model, case).items():
            parameters[name].mul_(torch.from_numpy(keep))
    # Per layer it measures its kernels against the dense one, on inputs of the case's size.
    swapped = swap_modules_with_sparse(model, case.input_shape)
    layers = [part for part in swapped.modules() if type(part).__module__.startswith("sparseprop")]
    return Built(
        _torch_step(swapped, case, channels_last=False), notes=(f"{len(layers)} layers run SparseProp's kernels",)
    )


def unstructured_masks(model: torch.nn.Module, case: Case) -> dict[str, np.ndarray]:
    """{weight name: bool array}: the masks that our step of the case starts with when its scheme is unstructured."""
    from mest_compile.frontend import from_torch
    from mest_compile.hardware.target import find_target
    from mest_compile.planning.layers import plan_layers
    from mest_compile.sparsity.room import masked_layers

    options = case.but(scheme="unstructured").options
    graph, weights = from_torch(model, case.input_shape)
    masks, rng = {}, np.random.default_rng(options.seed)
    for name, layer in masked_layers(plan_layers(graph, options, find_target(options.target))).items():
        spec, scheme, weight = layer.spec, layer.scheme, weights[name]
        energy = scheme.energy(spec, weight.reshape(spec.weight_shape))
        keep = scheme.start(spec, energy, scheme.live_units(spec, layer.sparsity), rng)
        masks[name] = scheme.expand(spec, keep).reshape(weight.shape)
    return masks


# onnxruntime-training.


def _load_onnxruntime() -> None:
    import onnxruntime.training.artifacts  # noqa: F401
    import torch  # noqa: F401


def _build_onnxruntime(case: Case) -> Built:
    """Dense. Its SGD has neither momentum nor weight decay, so its step does less than the others'."""
    import onnx
    import onnxruntime
    import torch
    from onnxruntime.training import artifacts
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    model = torch_model(case)
    images, labels = case.batch()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        torch.onnx.export(
            model,
            (torch.from_numpy(images),),
            str(path),
            dynamo=False,
            opset_version=14,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.TRAINING,
        )
        graph = onnx.load(path)
        graph.ir_version = 8  # the newest that this onnxruntime reads
        trained = {name for name, _ in model.named_parameters()}
        names = [tensor.name for tensor in graph.graph.initializer]
        artifacts.generate_artifacts(
            graph,
            requires_grad=[name for name in names if name in trained],
            frozen_params=[name for name in names if name not in trained],
            loss=artifacts.LossType.CrossEntropyLoss,
            optimizer=artifacts.OptimType.SGD,
            artifact_directory=folder,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
        state = CheckpointState.load_checkpoint(str(Path(folder, "checkpoint")))
        module = Module(str(Path(folder, "training_model.onnx")), state, None, session_options=options)
        optimizer = Optimizer(str(Path(folder, "optimizer_model.onnx")), module)
    optimizer.set_learning_rate(_usual_rule(case).lr)
    module.train()

    def step() -> float:
        loss = module(images, labels)
        optimizer.step()
        module.lazy_reset_grad()
        return float(loss)

    return Built(step, notes=("its SGD has neither momentum nor weight decay",))


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
    "torch": Contestant(_load_torch, _build_torch, ("torch", "numpy"), _build_torch),
    "torch-bf16": Contestant(_load_torch, _build_torch_in_bfloat16, ("torch", "numpy"), _build_torch_in_bfloat16),
    "torch-best": Contestant(_load_torch, _build_best_torch, ("torch", "numpy"), _build_best_torch),
    "torch-compile": Contestant(_load_torch, _build_torch_compile, ("torch", "numpy"), _build_torch),
    "sparseprop": Contestant(
        _load_sparseprop, _build_sparseprop, ("sparseprop", "torch", "numpy"), _build_sparseprop, "sparseprop"
    ),
    "onnxruntime-training": Contestant(
        _load_onnxruntime,
        _build_onnxruntime,
        ("onnxruntime-training", "onnx", "torch", "numpy"),
        _build_onnxruntime,
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

"""mest.compile: model, scheme and target in, a training step out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base import checks, exclusive
from mest_compile.base.errors import UsageError
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.host import cores
from mest_compile.hardware.target import Target, find_target, is_foreign, obstacle
from mest_compile.ir.layouts.layout import FLOAT_BYTES
from mest_compile.ir.program import FUNCTIONS, Program
from mest_compile.kernels import choosing
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.choosing import choose_knobs, remembered
from mest_compile.lowering.fusing import fuse
from mest_compile.operators.layers.family import FAMILIES
from mest_compile.operators.losses.cross_entropy import CrossEntropy
from mest_compile.operators.losses.loss import LOSSES, Loss
from mest_compile.operators.optimizers.optimizer import OPTIMIZERS, Optimizer
from mest_compile.operators.optimizers.sgd import USUAL
from mest_compile.planning.facts import Facts
from mest_compile.planning.layers import plan_layers, say_what_stays_dense
from mest_compile.planning.layout import choose_sections, choose_vector
from mest_compile.planning.memory import meet_budget, usually_recomputed, warn_beyond_memory
from mest_compile.planning.trainable import choose_trainable
from mest_compile.records.log import Records
from mest_compile.sparsity import parse_scheme
from mest_compile.sparsity.distributions import DIGITS
from mest_compile.sparsity.layer import Layer
from mest_compile.sparsity.room import overall_sparsity, with_room
from mest_compile.sparsity.scheme import Scheme
from mest_compile.sparsity.schemes.dense import Dense

if TYPE_CHECKING:
    from mest_compile.devices.session import Device
    from mest_compile.runtime.compiled import Compiled
    from mest_compile.runtime.runner import Runner
    from mest_compile.runtime.step import TrainStep

# With one thread TVM would pin the calling thread to a core, and every thread that it starts later, torch's too.
os.environ.setdefault("TVM_BIND_THREADS", "0")
# TVM makes half as many workers as there are processors, taking the others for second threads of a core; two real cores
# would give one.
os.environ.setdefault("TVM_NUM_THREADS", str(cores()))

Tuned = Records | Mapping[str, Mapping[str, Mapping[str, Any]]]


def compile(
    model: Any,
    input_shape: Sequence[int],
    scheme: str | Scheme = "block",
    sparsity: float | Mapping[str, float] = 0.9,
    distribution: str = "uniform",
    dense_layers: Sequence[str] | None = None,
    optimizer: Optimizer | None = None,
    target: str | Path | Target = "local",
    device: Device | None = None,
    threads: int | None = None,
    seed: int = 0,
    loss: str | Loss = "cross_entropy",
    label_smoothing: float = 0.0,
    memory_budget: int | None = None,
    lower_density: bool = False,
    grow_to: float | None = None,
    activations: str = "float32",
    builder: Builder | None = None,
    records: Records | None = None,
    trainable: str | Sequence[str] | None = None,
) -> TrainStep:
    """A training step that computes `model`'s convolutions and linear layers at the live weights only.

    model          torch.nn.Module (left unchanged), path of an .onnx file, or a built-in model's name
    input_shape    (N, C, H, W) or (N, features); N is the batch of every step
    scheme         name, "name:arguments" or a scheme object
    sparsity       share of zero weights in the sparse layers together, 0 <= s < 1, or {layer name: sparsity}, other
                   layers dense
    distribution   "uniform" or "erk"
    dense_layers   names that stay dense; None: the first convolution, the 1x1 convolutions of shortcuts (with
                   "pattern", which is for 3x3 kernels, all 1x1 ones) and the classifier. The log says when that is more
                   than half of the weights
    optimizer      mest.SGD(...) or mest.AdamW(...); None: mest.SGD()
    device         where to run: `mest.rpc(tracker, key)`; None: here. What is compiled for a machine unlike this one
                   can be saved and exported, but needs a device to run
    threads        None: all cores
    loss           "cross_entropy", or a loss object: mest.CrossEntropy(smoothing), mest.MSE()
    label_smoothing  share of every label that is spread evenly over all classes, 0 <= share < 1: short for
                     mest.CrossEntropy(smoothing)
    memory_budget  bytes that the whole step may need at its densest (`step.memory(at_capacity=True)["total"]`). To meet
                   it, activations are computed again in the backward pass instead of kept: first those that cost one
                   pass over memory, then those of sparse convolutions
    lower_density  when that is not enough: raise the sparsity until the budget is met, and say so in the log; else
                   BudgetError
    grow_to        lowest sparsity, of all sparse layers together, that mutations will grow to: the capacity that memory
                   is planned for. What would need more room is a CapacityError. None: `sparsity` with a memory_budget,
                   no bound without one
    activations    "float16": values between layers are stored in half the bytes, rounded to 11 bits, where the target
                   can; everything is computed in float32, and weights, gradients, optimizer state, statistics and
                   logits stay float32
    builder        where kernels are compiled and cached; None: the user's cache folder
    records        what tuning found, which decides the kernels' knobs and the vector width; None: the user's logs and
                   the shipped ones; Records(target) has none
    trainable      what trains; all else is frozen: it costs nothing in the backward pass but where a gradient passes
                   through it, and comes out as it went in. None: what torch would train, by `requires_grad`, the modes
                   of BatchNorms and where forward cuts the gradient; of a model all of whose parts are in one mode the
                   BatchNorms train. Or patterns, a list or with commas between them: "last:3" (blocks, see
                   `planning.trainable`), or shell patterns of torch's parameter names: "head.*", "*.bias",
                   "blocks.1[3-6].*". They decide in the place of `requires_grad`, and a BatchNorm of which nothing
                   trains is in evaluation mode. A frozen layer is sparse as the others are, unless `dense_layers` or
                   `sparsity` say otherwise, and keeps its mask
    Raises MestError: UnsupportedOperator, SpecError, SparsityError, UnknownName, UsageError, TargetError, BudgetError,
    BuildError, DeviceError.
    """
    from mest_compile.frontend import import_model

    exclusive.this_process()
    scheme, target, optimizer = parse_scheme(scheme), find_target(target), _check_optimizer(optimizer)
    input_shape, seed = checks.shape("input_shape", input_shape), checks.whole("seed", seed)
    loss = _check_loss(loss, checks.number("label_smoothing", label_smoothing, below=1))
    if memory_budget is not None:
        memory_budget = checks.whole("memory_budget", memory_budget, 1, ", in bytes, or None for no bound")
    elif checks.flag("lower_density", lower_density):
        raise UsageError(
            "lower_density raises the sparsity to meet a memory_budget; give one, or leave lower_density out"
        )
    grow_to = None if grow_to is None else checks.number("grow_to", grow_to, below=1, also=", or None")
    check_objects(builder, device, records)
    checks.memory(FLOAT_BYTES * prod(input_shape), "a batch of this input_shape")
    target = target.for_batch(input_shape[0])
    threads = check_threads(threads, target.cores)
    with exclusive.COMPILER:
        graph, state = import_model(model, input_shape)
    graph = choose_trainable(graph, trainable)
    records = of_machine(Records.of(target) if records is None else records.for_target(target), device)

    def planned(sparsity: float | Mapping[str, float], target: Target) -> dict[str, Layer]:
        return plan_layers(graph, scheme, sparsity, distribution, dense_layers, target, activations)

    layers = planned(sparsity, target)
    tuned = choose_vector(layers, target, records)
    if tuned != target:
        target, records = tuned, records.for_target(tuned)
        layers = planned(sparsity, target)
    layers = choose_sections(layers, target, records, activations)
    recomputed = usually_recomputed(fuse(graph), target)
    if grow_to is not None or memory_budget is not None:
        start = overall_sparsity(layers)
        layers = with_room(layers, start if grow_to is None else grow_to)
        excess = 0.0 if grow_to is None else start - grow_to
    if memory_budget is not None:
        recomputed, raised = meet_budget(
            fuse(graph), layers, target, memory_budget, lower_density, excess, activations, optimizer, loss
        )
        if raised is not None:
            layers = choose_sections(planned(raised, target), target, records, activations)
            layers = with_room(layers, max(0.0, round(overall_sparsity(layers) - excess, DIGITS)))
    if not isinstance(scheme, Dense):
        say_what_stays_dense(layers)
    facts = Facts(graph, layers, recomputed, optimizer, target, threads, seed, loss, activations)
    return make_step(facts, state, builder, device, records)


def of_machine(records: Records, device: Device | None) -> Records:
    """The records of the machine that the step will run on. It is only asked what it is where there are records that it
    decides between."""
    if device is None and backend_of(records.target).processor:
        return records
    records = records.on("")
    if not records.measured():
        return records
    if device is not None:
        from mest_compile.devices.probe import machine_of

        return records.on(machine_of(device, records.target))
    return records.on(backend_of(records.target).machine(records.target))


def make_step(
    facts: Facts, state: Mapping[str, np.ndarray], builder: Builder | None, device: Device | None, tuned: Tuned
) -> TrainStep:
    from mest_compile.runtime.step import TrainStep

    builder = builder or Builder()

    def dense() -> TrainStep:
        """The same step with all weights alive, which has the gradient of every weight. Untuned, so that it is the same
        after a load.
        A device has room for one step: it runs here, where float16 may be unknown.
        """
        where, threads, activations = facts.target, facts.threads, facts.activations
        if device is not None:
            where, activations = find_target("local"), "float32"
            threads = where.cores

        def alive(layer: Layer) -> Layer:
            forward, transposed = FAMILIES.find("gather").sections(layer.spec, Dense(), where, activations)
            return Layer(layer.spec, Dense(), 0.0, "gather", forward, transposed, frozen=layer.frozen)

        every = {name: alive(layer) for name, layer in facts.layers.items()}
        zeros = {name: np.zeros(shape, np.float32) for name, shape in facts.graph.state_shapes.items()}
        return make_step(
            replace(facts, layers=every, target=where, threads=threads, activations=activations),
            zeros,
            builder,
            None,
            {},
        )

    with exclusive.COMPILER:
        compiled = _compile(facts, builder, device, tuned)
    return TrainStep(compiled, state, dense)


def _compile(facts: Facts, builder: Builder, device: Device | None, tuned: Tuned) -> Compiled:
    """tuned: records to choose knobs by, or the knobs that a checkpoint noted."""
    from mest_compile.runtime.compiled import Compiled

    target, threads, programs = facts.target, facts.threads, facts.lower()
    train, predict = programs
    kind = backend_of(target)
    kind.check(programs, target)
    warn_beyond_memory(
        train, predict, facts.layers, target, here=device is None and kind.processor and not is_foreign(target)
    )
    choices = (
        choose_knobs(programs, facts.layers, target, tuned)
        if isinstance(tuned, Records)
        else remembered(programs, tuned)
    )
    sources = choosing.sources(programs, target, choices)
    every = [source for calls in sources.values() for source in calls.values()]
    functions = {
        name: ({"train": train, "predict": predict}[program], stages) for name, (program, stages) in FUNCTIONS.items()
    }

    def symbol(program: Program, call: str) -> str:
        return sources[program.name][call].symbol

    def library() -> bytes:
        with exclusive.COMPILER:
            return kind.link_step(functions, symbol, every, target, builder)

    def kernels() -> dict[str, dict[str, Any]]:
        built = builder.build(every)
        return {name: {call: built[source.key] for call, source in calls.items()} for name, calls in sources.items()}

    runner: Callable[[], Runner]
    if device is not None:
        from mest_compile.devices.runner import RemoteRunner

        runner = partial(RemoteRunner, device, library(), functions, threads, target)
    elif kind.processor and (why := obstacle(target)):
        from mest_compile.runtime.store import StoreRunner

        runner = partial(StoreRunner, target.name, why)
    else:
        kind.find_device(target)  # before anything is compiled for it
        runner = partial(kind.runner, kernels(), functions, target, threads)
    document = facts.to_json() | {"knobs": choosing.facts(choices)}
    described = {
        "target": target.name,
        "cpu": target.tvm_fields.get("mcpu"),
        "threads": threads,
        "seed": facts.seed,
        "vector": target.vector,
        "kernels": choosing.origins(choices),
        "input_shape": list(facts.graph.input_shape),
        "recomputed": document["recomputed"],
        "schemes": {name: str(layer.scheme) for name, layer in facts.layers.items()},
        "sparsity": {name: layer.sparsity for name, layer in facts.layers.items()},
        "trainable": facts.graph.trainable(),
        "frozen": dict(facts.graph.frozen),
        "optimizer": document["optimizer"],
        "loss": document["loss"],
        "label_smoothing": getattr(facts.loss, "smoothing", 0.0),
        "activations": facts.activations,
        "versions": {
            name: metadata.version(name) for name in ("mest-compile", "apache-tvm", "apache-tvm-ffi", "numpy")
        },
    }
    by_call = {(name, call): source for name, calls in sources.items() for call, source in calls.items()}
    return Compiled(
        facts, train, predict, document | {"describe": described}, runner, library, by_call, builder, choices["train"]
    )


def check_threads(threads: int | None, usual: int) -> int:
    return usual if threads is None else checks.whole("threads", threads, 1, ", or None for all cores")


def _check_optimizer(optimizer: Optimizer | None) -> Optimizer:
    if optimizer is None:
        return USUAL
    if not isinstance(optimizer, Optimizer):
        there = ", ".join(OPTIMIZERS.find(name).signature() for name in OPTIMIZERS.names())
        raise UsageError(f"optimizer is {checks.shown(optimizer)}; wanted one of {there}, or None for mest.SGD()")
    return optimizer


def _check_loss(loss: str | Loss, label_smoothing: float) -> Loss:
    if isinstance(loss, str):
        loss = LOSSES.find(loss)()
    if not isinstance(loss, Loss):
        there = ", ".join(LOSSES.find(name).signature() for name in LOSSES.names())
        raise UsageError(
            f"loss is {checks.shown(loss)}; wanted one of {there}, or {' or '.join(map(repr, LOSSES.names()))}"
        )
    if not label_smoothing:
        return loss
    if loss != CrossEntropy():
        raise UsageError(
            f"label_smoothing is short for loss=mest.CrossEntropy(smoothing=...), and the loss is {loss}; leave one out"
        )
    return CrossEntropy(label_smoothing)


def check_objects(builder: Builder | None, device: Device | None, records: Records | None) -> None:
    if builder is not None and not isinstance(builder, Builder):
        raise UsageError(
            f"builder is {checks.shown(builder)}; wanted a mest_compile.kernels.cache.Builder, or None for the "
            "user's cache "
            "folder"
        )
    if records is not None and not isinstance(records, Records):
        raise UsageError(
            f"records is {checks.shown(records)}; wanted a mest_compile.records.log.Records, or None for the "
            "user's and the "
            f"shipped ones"
        )
    if device is not None:
        from mest_compile.devices.session import Device

        if not isinstance(device, Device):
            raise UsageError(
                f"device is {checks.shown(device)}; wanted mest.rpc(tracker, key), or None for this process; "
                "what to compile "
                f"for is told by target"
            )

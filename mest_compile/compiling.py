"""mest.compile: model, scheme and target in, a training step out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.assembling import make_step
from mest_compile.base import checks, exclusive
from mest_compile.base.errors import UsageError
from mest_compile.base.foreign import is_optimizer
from mest_compile.budgeting import Batches, Choice, choose, runs_here, sampled
from mest_compile.deciding import decided
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.host import cores, give_memory_back
from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.layout import FLOAT_BYTES
from mest_compile.kernels.cache import Builder
from mest_compile.operators.optimizers.from_torch import check_trains
from mest_compile.options import AUTO, StepOptions, find_loss, find_optimizer, read_budget
from mest_compile.planning.given import first_masks
from mest_compile.planning.layers import say_what_stays_dense, why_dense
from mest_compile.planning.plan import Plan, plan_step
from mest_compile.planning.units import with_trainable
from mest_compile.records.log import Records
from mest_compile.sparsity import parse_schemes
from mest_compile.sparsity.room import sparse_layers
from mest_compile.sparsity.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from mest_compile.devices.session import Device
    from mest_compile.operators.losses.loss import Loss
    from mest_compile.operators.optimizers.optimizer import Optimizer
    from mest_compile.runtime.step import TrainStep

# With one thread TVM would pin the calling thread to a core, and every thread that it starts later, torch's too.
os.environ.setdefault("TVM_BIND_THREADS", "0")
# TVM makes half as many workers as there are processors, taking the others for second threads of a core; two real cores
# would give one.
os.environ.setdefault("TVM_NUM_THREADS", str(cores()))


Planned = tuple[Plan, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]  # with the model's state, and first masks


def compile(
    model: Any,
    input_shape: Sequence[int],
    scheme: str | Scheme | Mapping[str, str | Scheme] = "block",
    sparsity: float | str | Mapping[str, float] | None = None,
    distribution: str = "uniform",
    dense_layers: Sequence[str] | None = None,
    optimizer: str | Mapping[str, Any] | Optimizer | torch.optim.Optimizer | None = None,
    target: str | Path | Target = "local",
    device: Device | None = None,
    threads: int | None = None,
    seed: int = 0,
    loss: str | Mapping[str, Any] | Loss = "cross_entropy",
    label_smoothing: float = 0.0,
    memory_budget: int | str | None = None,
    lower_density: bool = False,
    grow_to: float | None = None,
    activations: str = "float32",
    builder: Builder | None = None,
    records: Records | None = None,
    trainable: str | Sequence[str] | None = None,
    dense_start: bool = False,
    update_budget: float | int | str | None = None,
    output: str | int | None = None,
    data: Any = None,
    microbatch: int | str | None = None,
) -> TrainStep:
    """A training step that computes `model`'s convolutions and linear layers at the live weights only.

    model          torch.nn.Module (left unchanged), or a name: built-in, timm:NAME, torchvision:NAME, file.py:FACTORY,
                   path of an .onnx file, or of a run folder, checkpoint or artifact, whose weights it then begins with
    input_shape    (N, C, H, W), (N, C, L) or (N, features); N is the batch of every step. Of a torch module of several
                   inputs one such shape for each, ((4, 3, 32, 32), (4, 10)): a step then takes a tuple of them
    scheme         name, "name:arguments" or a scheme object; or {layer name or shell pattern: one of these}. A layer's
                   own name beats patterns, and of these the first that matches counts; "dense" leaves layers dense
    sparsity       share of zero weights in the sparse layers together, 0 <= s < 1; None: 0.9, or the only one that the
                   scheme can have, as 0.5 of "2:4" and 0 of "dense". Or {layer name or shell pattern: sparsity}, as
                   `scheme` has them, other layers dense; patterns leave those dense that `dense_layers` does. Or
                   "as-given": the zeros of the model's weights are the masks, layer by layer, whoever pruned it, and
                   layers without zeros are dense. Masks of torch.nn.utils.prune, and of torch.ao.pruning as
                   parametrizations, may still be attached. A mask that `scheme` cannot have is refused
    distribution   "uniform" or "erk"
    dense_layers   names that stay dense; None: the first convolution, the 1x1 convolutions of shortcuts, depthwise
                   layers, the classifier, and layers that the scheme has no units for ("block" wants multiples of 4
                   output channels, "pattern" 3x3 kernels). The log says when that is more than half of the weights
    optimizer      mest.SGD(...), Adam, AdamW, RMSprop; its name and options as a text, "adamw:weight_decay=0.05"; an
                   optimizer of torch, of the model's parameters; None: mest.SGD()
    device         where to run: `mest.rpc(tracker, key)`; None: here. What is compiled for a machine unlike this one
                   can be saved and exported, but needs a device to run
    threads        None: all cores
    loss           a name, with options as in "cross_entropy:smoothing=0.1", or a loss object: mest.CrossEntropy,
                   SoftCrossEntropy, Distill, BCE, MSE, SmoothL1, Huber
    label_smoothing  share of every label that is spread evenly over all classes, 0 <= share < 1: short for
                     mest.CrossEntropy(smoothing)
    memory_budget  bytes, or "64MiB", that the whole step may need at its densest
                   (`step.memory(at_capacity=True)["total"]`). To meet it, activations are computed again in the
                   backward pass instead of kept: first those that cost one pass over memory, then those of sparse
                   convolutions
    lower_density  when that is not enough: raise the sparsity until the budget is met, and say so in the log; else
                   BudgetError
    grow_to        lowest sparsity, of all sparse layers together, that mutations will grow to: the capacity that memory
                   is planned for. What would need more room is a CapacityError. None: `sparsity` with a memory_budget,
                   no bound without one
    activations    "float16": values between layers are stored in half the bytes, rounded to 11 bits, where the target
                   can; everything is computed in float32, and weights, gradients, optimizer state, statistics and
                   logits stay float32. "bfloat16": these values and their gradients are, rounded to 8 bits, and so are
                   weights where they are multiplied; CPUs with AVX512-BF16 multiply pairs of them at once. "auto":
                   what is fastest, as steps of a small net were timed once on this machine, the vector width too; what
                   runs elsewhere by the target's features. The step has what was chosen, wherever it is loaded again
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
    dense_start    all weights of the sparse layers that train live at first, as those of a pretrained model that is
                   pruned to `sparsity` while it trains: method "gradual", or `step.prune`
    update_budget  what a step may cost: a share of the full step's time, 0 < share <= 1, or bytes of the whole step's
                   planned memory, "24MiB". What of the full step, in which all trains that `trainable` lets, then
                   trains is chosen as by `choose_trainable`; the step tells why in `describe()["update_budget"]`
    output         of a torch module that gives several values, the name or number of the one that is the logits; what
                   others are made of beside it, auxiliary heads, comes out as it went in. None: it gives one
    data           what the choice is made by, and nothing else: as `choose_trainable` takes it
    microbatch     examples of a pass, of which `input_shape` has a multiple: a step makes as many passes as that, whose
                   gradients add up, then one update, in the memory of one pass. Loss and gradients are the whole
                   batch's; batch statistics are each pass's own, and running statistics move with every pass (ghost
                   batch normalisation, arXiv:1705.08741). "auto": the largest that fits into memory_budget, whose
                   passes compute again what they must
    Raises MestError: UnsupportedOperator, SpecError, SparsityError, UnknownName, UsageError, TargetError, BudgetError,
    BuildError, DeviceError.
    """
    options = StepOptions(
        scheme=parse_schemes(scheme),
        sparsity=sparsity,
        distribution=distribution,
        dense_layers=dense_layers,
        optimizer=find_optimizer(optimizer, model),
        target=target,
        threads=threads,
        seed=seed,
        loss=find_loss(loss, label_smoothing),
        memory_budget=memory_budget,
        lower_density=lower_density,
        grow_to=grow_to,
        activations=activations,
        trainable=trainable,
        dense_start=dense_start,
        update_budget=update_budget,
        output=output,
        microbatch=microbatch,
    )
    theirs = optimizer if is_optimizer(optimizer) else None
    batches = None if data is None else sampled(data, input_shape, options)
    return compile_step(model, input_shape, options, device, builder, records, theirs, batches)


def compile_step(
    model: Any,
    input_shape: Sequence[int],
    options: StepOptions,
    device: Device | None = None,
    builder: Builder | None = None,
    records: Records | None = None,
    theirs: torch.optim.Optimizer | None = None,
    batches: Batches | None = None,
) -> TrainStep:
    """`compile` with options that are said already. theirs: what their optimizer was read from, which must have all
    that trains. batches: what an update budget chooses by."""
    from mest_compile.frontend import trained_parameters

    if (options.update_budget is None) != (batches is None):
        raise UsageError(
            "update_budget chooses by gradients on your data: give data=(images, labels) with it"
            if batches is None
            else "data is what an update_budget chooses by, and there is none; leave data out"
        )
    plan, state, masks = planned = planned_step(model, input_shape, options, device, builder, records)
    if batches is not None:
        choice = chosen_step(planned, options, batches, device, builder)
        plan = replace(with_trainable(plan, choice.trainable), chosen=choice.to_dict())
    if theirs is not None:
        check_trains(theirs, trained_parameters(model), plan.facts.graph.trainable())
    if options.sparse:
        say_what_stays_dense(plan.layers, why_dense(plan.facts.graph, options, plan.layers))
    step = make_step(plan, state, builder, device, None, _at_first(plan, masks, options))
    del planned, plan, state, masks  # the model's weights, all of them alive, are the step's by now
    give_memory_back()  # 28 of 110 MiB of MobileNetV3-small at 96x96, 75 of 932 of ResNet-50 at 32x32
    return step


def planned_step(
    model: Any,
    input_shape: Sequence[int],
    options: StepOptions,
    device: Device | None,
    builder: Builder | None,
    records: Records | None,
) -> Planned:
    """Of the full step, whatever its update budget."""
    from mest_compile.runtime.trained import read_any

    exclusive.this_process()
    shape, _ = checks.shapes("input_shape", input_shape)
    check_objects(builder, device, records)
    checks.memory(FLOAT_BYTES * prod(shape), "a batch of this input_shape")
    options = decided(options, _examples(shape[0], options), device, builder)
    with exclusive.COMPILER:
        graph, state = read_any(model, input_shape, output=options.output)

    def known(target: Target) -> Records:
        return of_machine(Records.of(target) if records is None else records.for_target(target), device)

    options, masks = first_masks(model, graph, state, options)
    plan = plan_step(graph, options, known)
    return plan, state, masks


def _examples(batch: int, options: StepOptions) -> int:
    """Of a pass, as far as that is said."""
    return batch if options.microbatch in (None, AUTO) else int(options.microbatch)


def _at_first(plan: Plan, masks: Mapping[str, np.ndarray], options: StepOptions) -> Mapping[str, np.ndarray]:
    """The masks that a step of the plan begins with."""
    if not options.dense_start:
        return masks
    return {name: np.ones(layer.spec.weight_shape, bool) for name, layer in sparse_layers(plan.layers).items()}


def chosen_step(
    planned: Planned,
    options: StepOptions,
    batches: Batches,
    device: Device | None,
    builder: Builder | None,
    importance: str = "fisher",
) -> Choice:
    """What of a full step trains within the budget."""
    plan, state, masks = planned

    def make(plan: Plan) -> TrainStep:
        return make_step(plan, state, builder, None, None, _at_first(plan, masks, options))

    budget = read_budget(options.update_budget)
    return choose(plan, batches, budget, make, device is None and runs_here(plan.target), importance)


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


def check_objects(builder: Builder | None, device: Device | None, records: Records | None) -> None:
    if builder is not None and not isinstance(builder, Builder):
        raise UsageError(
            f"builder is {checks.shown(builder)}; wanted a mest_compile.kernels.cache.Builder, or None for the "
            "user's cache folder"
        )
    if records is not None and not isinstance(records, Records):
        raise UsageError(
            f"records is {checks.shown(records)}; wanted a mest_compile.records.log.Records, or None for the "
            "user's and the shipped ones"
        )
    if device is not None:
        from mest_compile.devices.session import Device

        if not isinstance(device, Device):
            raise UsageError(
                f"device is {checks.shown(device)}; wanted mest.rpc(tracker, key), or None for this process; "
                "what to compile for is told by target"
            )

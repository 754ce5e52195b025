"""The programs of a step: training and prediction, of a fused graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target
from mest_compile.ir.arena import plan_memory, plan_memory_like
from mest_compile.ir.graph import ForwardGraph, Node
from mest_compile.ir.program import Activation, Buffer, Program
from mest_compile.lowering.lowering import Lowering
from mest_compile.lowering.updating import record_bound, record_updates, record_zero
from mest_compile.operators.adding import SHARE, Scale
from mest_compile.operators.conversion import ImageExport, ImageImport
from mest_compile.operators.losses.cross_entropy import USUAL as USUAL_LOSS
from mest_compile.operators.losses.loss import SCALES, Loss, shape_of
from mest_compile.operators.operator import OPERATORS
from mest_compile.operators.optimizers.optimizer import Optimizer
from mest_compile.operators.optimizers.sgd import USUAL
from mest_compile.sparsity.layer import Layer


def _start(low: Lowering) -> Activation:
    """Reads the batch (N, C, H, W) into the input's image; returns the logits' buffer after the whole forward pass."""
    graph = low.graph
    entry = Node("input", "input", (), graph.input_shape)
    images = low.hold("images", int(np.prod(graph.input_shape)), "batch")
    target = low.output(entry)
    assert target.image
    low.call("image.import", ImageImport(target.image), images, target)
    for node in graph.nodes:
        OPERATORS.find(node.op).forward(node, low)
    return low.value(graph.nodes[-1].name)


def lower_training(
    graph: ForwardGraph,
    layers: Mapping[str, Layer],
    target: Target,
    held: dict[str, Buffer],
    recomputed: frozenset[str] = frozenset(),
    loss: Loss = USUAL_LOSS,
    activations: str = "float32",
    optimizer: Optimizer = USUAL,
    parts: Sequence[Collection[str]] = (),
    adds: bool = False,
    like: Program | None = None,
) -> Program:
    """The training step: forward, loss, backward, update. `recomputed` names nodes whose values are not kept for the
    backward pass, `parts` the parameters that have a learning rate of their own. `adds`: gradients of
    several passes add up, each counting as much as it is told that its loss does. `like`: that of the same step
    for more examples, in whose memory this one is to run."""
    loss.check(graph.nodes[-1].shape)
    low = Lowering(graph, layers, target, held, True, recomputed, activations, optimizer, parts, adds)
    output = _start(low)
    low.stage = "backward"
    loss.lower(low, graph.nodes[-1].name)
    if adds and SCALES not in loss.arrays(shape_of(output.image)):
        low.call("gradients.scale", Scale(), low.gradient(graph.nodes[-1]), low.hold(SHARE, 1, "batch"))
    for node in reversed(graph.nodes):
        if low.has_gradient(node):
            OPERATORS.find(node.op).backward(node, low)
            low.add_parts()
    record_updates(low)
    record_bound(low)
    if adds:
        record_zero(low)
    # Of some values kernels read a copy alone.
    kept = tuple(buffer for buffer in held.values() if buffer.kind == "values")
    if like is not None:
        program = Program(f"train_of_{graph.input_shape[0]}", low.calls, kept=kept)
        plan_memory_like(program, like, backend_of(target).whole_buffers)
        return program
    program = Program("train", low.calls, kept=kept)
    plan_memory(program, whole=backend_of(target).whole_buffers)
    return program


def lower_prediction(
    graph: ForwardGraph,
    layers: Mapping[str, Layer],
    target: Target,
    held: dict[str, Buffer],
    slots: Sequence[int],
    activations: str = "float32",
) -> Program:
    """The forward pass with running statistics, in the training program's memory."""
    low = Lowering(graph, layers, target, held, training=False, activations=activations)
    logits = _start(low)
    assert logits.image
    outputs = int(np.prod(graph.nodes[-1].shape))
    low.call("image.export", ImageExport(logits.image), logits, low.hold("logits", outputs, "batch"))
    program = Program("predict", low.calls)
    plan_memory(program, slots, backend_of(target).whole_buffers)
    return program


def lower(
    graph: ForwardGraph,
    layers: Mapping[str, Layer],
    target: Target,
    recomputed: frozenset[str] = frozenset(),
    loss: Loss = USUAL_LOSS,
    activations: str = "float32",
    optimizer: Optimizer = USUAL,
    parts: Sequence[Collection[str]] = (),
    adds: bool = False,
) -> tuple[Program, Program]:
    """(training step, prediction) of a fused graph; they share the buffers that the step holds, and the arena.

    activations  what values of nodes are stored as, the logits excepted
    parts        names of parameters that have a learning rate of their own
    adds         whether gradients of several passes add up
    """
    held: dict[str, Buffer] = {}
    train = lower_training(graph, layers, target, held, recomputed, loss, activations, optimizer, parts, adds)
    predict = lower_prediction(graph, layers, target, held, train.slots, activations)
    train.slots = predict.slots
    return train, predict

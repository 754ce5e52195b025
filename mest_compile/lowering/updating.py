"""What a training program does with the gradients of parameters: updates, their bound, where they begin."""

from __future__ import annotations

import numpy as np

from mest_compile.ir.program import Buffer
from mest_compile.lowering.lowering import Lowering
from mest_compile.operators.adding import Zero
from mest_compile.operators.layers.family import FAMILIES
from mest_compile.operators.optimizers.optimizer import Bound, Norm, Update, UpdatePart


def record_updates(low: Lowering) -> None:
    """Records the updates of dense parameters; layers have recorded theirs."""
    for values, gradients in low.updates.items():
        _update(low, values, gradients)


def record_zero(low: Lowering) -> None:
    """Records that all gradients become 0, for several passes to add theirs."""
    low.stage = "zero"
    for buffer in low.held.values():
        if buffer.kind == "gradients":
            low.call("gradients.zero", Zero(), buffer)


def _update(low: Lowering, values: Buffer, gradients: Buffer) -> None:
    """Updates dense parameters, those of one array that are of different groups one after another."""
    rule = low.optimizer.rule_name
    states = [low.hold(f"{values.name}:{state}", values.elems, "optimizer") for state in low.optimizer.state]
    arrays = values, gradients, *states
    settings = [low.settings.of(name) for name in values.parts]
    if len(set(settings)) == 1:
        hyper = low.hyper(values.parts[0])
        low.call_update("optimizer.update", Update(rule), *arrays, hyper, name=f"{values.name}.update")
        return
    assert values.elems is not None, "dense parameters have a size"
    start = 0
    for name in values.parts:
        elems = int(np.prod(low.graph.state_shapes[name]))
        part = UpdatePart(rule, start, elems, values.elems)
        low.call_update("optimizer.update_part", part, *arrays, low.hyper(name), name=f"{name}.update")
        start += elems


def record_bound(low: Lowering) -> None:
    """Scales all gradients together, so that their norm is at most a bound. A weight that is computed twice counts
    once."""
    low.stage = "clip"
    norm, bound = (low.hold(f"clip:{name}", 1, "batch") for name in ("norm", "bound"))
    nodes = {node.params["weight"]: node for node in low.graph.nodes if node.params.get("weight") in low.layers}
    gradients = [buffer for buffer in low.held.values() if buffer.kind == "gradients"]
    for number, buffer in enumerate(gradients):
        places = None
        if buffer.layer:
            layer, node = low.layers[buffer.layer], nodes[buffer.layer]
            places = FAMILIES.find(layer.kernels).once(layer, low.needs_gradient(node.inputs[0]), low)
        listed = [] if places is None else [places]
        low.call("optimizer.norm", Norm(number == 0, bool(listed)), buffer, *listed, norm)
    for buffer in gradients:
        low.call("optimizer.bound", Bound(), buffer, norm, bound)

"""LSTM, GRU and RNN nodes of ONNX files, whose weights become those that torch's layers have.

torch.onnx.export writes what an ONNX node takes as slices of torch's parameters, put together in another order of
gates, or does that itself. Both are moves of elements, so the same moves of the elements' places tell where each is
from: a whole parameter in torch's order is that parameter, and a part of another one becomes a weight of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.frontend.onnx_folding import evaluated

MOVES = ("Concat", "Constant", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
ORDERS = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2), "RNN": (0,)}  # of torch's gates in ONNX
ACTIVATIONS = {"GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"], "RNN": ["Tanh"]}
DIRECTIONS = {b"forward": ("forward",), b"reverse": ("reverse",), b"bidirectional": ("forward", "reverse")}
BIASES = ("input", "hidden")
KIND, REFUSED = "torch's", "refused"  # attributes that nodes get
AS_THEY_ARE = "takes gates as they are"  # what a weight is called that lets the gates through, in files of ours


@dataclass(frozen=True)
class Moved:
    """A weight that is a part of an initializer, or all of it in another order: which, and its elements' places."""

    source: str
    places: np.ndarray


class _Refused(Exception):
    pass


def plain_recurrent(model: Any) -> dict[str, Moved]:
    """Gives such nodes the inputs (values, then of every direction input weight, hidden weight and two biases or "" as
    torch has them) in place, and the model's initializers what these are; returns those that it had not.

    Nodes get an attribute KIND, as `recurrent_calls` has it, or REFUSED, which says what cannot be trained.
    """
    graph = model.graph
    nodes = [node for node in graph.node if node.op_type in ORDERS and node.domain in ("", "ai.onnx")]
    if not nodes:
        return {}
    parts, before = _Parts(model), _read(graph)
    taken = [node for node in nodes if _take(node, parts)]
    _leave_out_what_nothing_reads(graph)
    read = _read(graph)
    for node in taken:
        sources = {parts.moved[name].source for name in node.input if name in parts.moved}
        if shared := sorted(name for name in sources if read[name]):
            _refuse(node, f"the weight {shared[0]!r}, which something else takes as well")
    kept = [tensor for tensor in graph.initializer if read[tensor.name] or not before[tensor.name]]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return parts.moved


def _take(node: Any, parts: _Parts) -> bool:
    from onnx import helper

    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    _, weight, inner, bias, lengths, *states = [*node.input, *[""] * 8][:8]
    try:
        directions = DIRECTIONS[attributes.get("direction", b"forward")]
        kind = _kind(node.op_type, attributes, len(directions))
        if lengths:
            raise _Refused("a length for every series (sequence_lens), leave it out: all are as long as the value")
        if not all(map(parts.is_zero, filter(None, states[:2]))):
            raise _Refused("a state to begin with, leave it out: it is 0 then")
        if states[2]:
            raise _Refused("peepholes (its input P)")
        if len(node.output) > 2 and parts.is_read(node.output[2]):
            raise _Refused("its last cell state used as a value")
        inputs = []
        gates = weight.startswith(AS_THEY_ARE)
        for place, name in enumerate(directions):
            inputs.append("" if gates else parts.weight(node, weight, name, place))
            inputs.append(parts.weight(node, inner, name, place))
            for half in BIASES:
                given = bias and not (gates and half == "input")
                inputs.append(parts.weight(node, bias, f"{name}.{half}", place, half) if given else "")
    except _Refused as error:
        _refuse(node, str(error))
        return False
    node.input[1:] = inputs
    node.output[:] = node.output[:2]
    node.attribute.append(helper.make_attribute(KIND, f"{kind}.gates" if gates else kind))
    return True


def _kind(op: str, attributes: Mapping[str, Any], directions: int) -> str:
    """What torch's cell is called. Raises _Refused."""
    activations = [one.decode() for one in attributes.get("activations", [])] or ACTIVATIONS[op] * directions
    for name, usual in ("clip", 0.0), ("input_forget", 0), ("layout", 0):
        if attributes.get(name, usual) != usual:
            raise _Refused(f"{name}={attributes[name]:g}")
    if op == "GRU" and attributes.get("linear_before_reset", 0) != 1:
        raise _Refused("linear_before_reset=0; torch's GRU is the one with 1")
    if op == "RNN" and activations == ["Relu"] * directions:
        return "rnn_relu"
    if activations != ACTIVATIONS[op] * directions or attributes.keys() & {"activation_alpha", "activation_beta"}:
        raise _Refused(f"the activations {', '.join(activations)}")
    return "rnn_tanh" if op == "RNN" else op.lower()


def _refuse(node: Any, why: str) -> None:
    from onnx import helper

    node.attribute.append(helper.make_attribute(REFUSED, f"{node.op_type} with {why}"))


class _Parts:
    """What values are of a model's weights, as far as they are moves of their elements."""

    def __init__(self, model: Any):
        from onnx import numpy_helper

        self.model = model
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.held = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
        self.moved: dict[str, Moved] = {}
        weights = [name for name, array in self.held.items() if array.dtype.kind == "f"]
        ends = np.cumsum([0, *(self.held[name].size for name in weights)])
        self.begins = dict(zip(weights, ends.tolist()))
        self.places = {
            name: array if name not in self.begins else self.begins[name] + np.arange(array.size).reshape(array.shape)
            for name, array in self.held.items()
        }

    def is_read(self, name: str) -> bool:
        return name != "" and _read(self.model.graph)[name] > 0

    def is_zero(self, name: str) -> bool:
        found = self._value(name, dict(self.held), (*MOVES, "ConstantOfShape", "Expand"))
        return found is not None and not found.any()

    def weight(self, node: Any, name: str, part: str, place: int, half: str = "") -> str:
        """The initializer that is a direction's part of an input, in torch's order; one that is made for it. Raises
        _Refused."""
        places = self._value(name, dict(self.places), MOVES)
        if places is None:
            raise _Refused("computed weights")
        order = ORDERS[node.op_type]
        own = places[place]
        if half:
            own = np.split(own, 2)[BIASES.index(half)]
        gates = np.split(own, len(order))
        own = np.concatenate([gates[order.index(gate)] for gate in range(len(order))])
        source = max((one for one in self.begins if self.begins[one] <= own.min()), key=self.begins.__getitem__)
        own = own - self.begins[source]
        array = self.held[source]
        if own.max() >= array.size or len(np.unique(own)) != own.size:
            raise _Refused("weights that are made of several, or of one twice")
        if np.array_equal(own.ravel(), np.arange(array.size)) and own.shape == array.shape:
            return source
        return self._made(f"{name}.{part}", Moved(source, own))

    def _made(self, name: str, moved: Moved) -> str:
        from onnx import numpy_helper

        if name not in self.moved:
            taken = [one for one in self.moved.values() if one.source == moved.source]
            if name in self.held or any(np.isin(moved.places, one.places).any() for one in taken):
                raise _Refused(f"the weight {moved.source!r}, which something else takes as well")
            self.moved[name] = moved
            array = self.held[moved.source].ravel()[moved.places]
            self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        elif not np.array_equal(self.moved[name].places, moved.places):
            raise _Refused(f"the weight {moved.source!r}, which something else takes as well")
        return name

    def _value(self, name: str, known: dict[str, np.ndarray], operators: tuple[str, ...]) -> np.ndarray | None:
        """None where it is not made of initializers by these operators alone."""
        if name not in known:
            node = self.makers.get(name)
            if node is None or node.op_type not in operators:
                return None
            if any(self._value(one, known, operators) is None for one in node.input if one):
                return None
            known.update(zip(node.output, evaluated(self.model, node, known) or ()))
        return known.get(name)


def _read(graph: Any) -> Counter[str]:
    """How often each value is read."""
    return Counter([value.name for value in graph.output] + [name for node in graph.node for name in node.input])


def _leave_out_what_nothing_reads(graph: Any) -> None:
    read = _read(graph)
    for node in reversed(list(graph.node)):  # each stands behind what it reads
        if not any(read[name] for name in node.output if name):
            read.subtract(node.input)
            graph.node.remove(node)

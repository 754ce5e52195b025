"""Relax function -> ForwardGraph. Both importers end here, so a model means the same whichever way it came.

TVM's importers write some operators as several: a linear layer is permute_dims + matmul + add, a convolution's bias is
reshape + add, a max pool of torch carries an index output. The reader folds these back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from mest_compile.errors import SpecError, UnsupportedOperator
from mest_compile.frontend.naming import Draft, name_nodes
from mest_compile.spec import ForwardGraph

SUPPORTED = ("conv2d (groups=1, dilation=1)", "linear", "batch_norm", "relu", "add", "max_pool2d", "avg_pool2d",
             "global average pooling", "flatten", "dropout with p=0")


def unsupported(what: str, where: str = "") -> UnsupportedOperator:
    """The error for an operator that has no training form here; `where` names the layer, for instance "in layer 'act'"."""
    return UnsupportedOperator(f"{what}{' ' + where if where else ''} cannot be trained here; supported: {', '.join(SUPPORTED)}")


def dropout_error(p: float, where: str) -> UnsupportedOperator:
    return UnsupportedOperator(f"dropout with p={p} {where} trains differently from how it evaluates, which is not supported: "
                               "set p to 0 or remove it")


@dataclass(frozen=True)
class Parameter:
    """A parameter on its way to its operator. `form` is "" as stored, "transposed", or "channel": reshaped to (1, C, 1, 1)."""

    name: str
    form: str = ""


@dataclass(frozen=True)
class Fixed:
    """A constant of the graph: a number, a shape, an array without a name."""


@dataclass(frozen=True)
class Refused:
    """A value that no training operator gives; an error only when the logits depend on it."""

    error: UnsupportedOperator


@dataclass(frozen=True)
class Value:
    """An activation: the index of the draft that makes it, -1 for the graph's input."""

    draft: int
    shape: tuple[int, ...]


READERS: dict[str, Callable] = {}


def reads(*names: str):
    """Function decorator: the function (reader, call, arguments, shape) -> value reads these Relax operators."""

    def register(function):
        READERS.update(dict.fromkeys(names, function))
        return function

    return register


def read_main(function: Any, parameters: Mapping[str, str], state_shapes: Mapping[str, tuple[int, ...]],
              places: Mapping[str, str], may_transpose: bool = False) -> tuple[ForwardGraph, set[str]]:
    """The Relax function as a ForwardGraph, and the names of the linear weights that it holds as (in, out).

    parameters     Relax parameter -> torch name
    state_shapes   every parameter and buffer by torch name, in torch's order
    places         Relax variable -> where in the model it is made ("in layer 'act' (GELU)"), for error messages
    may_transpose  a linear weight may be stored as (in, out); `state_shapes` then still holds it that way, the graph does not
    Raises UnsupportedOperator, SpecError.
    """
    return Reader(parameters, state_shapes, places, may_transpose).read(function)


def check_finite(graph: ForwardGraph, state: Mapping[str, np.ndarray]) -> None:
    """Raises SpecError when a weight that the graph uses is NaN or infinite."""
    for node in graph.nodes:
        for name in node.params.values():
            if wrong := np.count_nonzero(~np.isfinite(state[name])):
                raise SpecError(f"{wrong} of {state[name].size} values of {name} are NaN or infinite: load a state from before it diverged")


class Reader:
    """Walks the bindings of one Relax function."""

    def __init__(self, parameters: Mapping[str, str], state_shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, str],
                 may_transpose: bool):
        self.parameters = parameters
        self.state_shapes = dict(state_shapes)
        self.places = places
        self.may_transpose = may_transpose
        self.transposed: set[str] = set()
        self.drafts: list[Draft] = []
        self.values: dict[Any, Any] = {}
        self.where = ""

    def read(self, function: Any) -> tuple[ForwardGraph, set[str]]:
        from tvm import relax

        count = int(function.attrs["num_input"])
        inputs, rest = list(function.params[:count]), list(function.params[count:])
        if len(inputs) != 1:
            raise SpecError(f"a model with one input is wanted, this one has {len(inputs)}: {', '.join(var.name for var in inputs)}")
        input_shape = _shape(inputs[0])
        self.values[inputs[0]] = Value(-1, input_shape)
        for var in rest:
            known = var.name in self.parameters
            self.values[var] = Parameter(self.parameters[var.name]) if known else Fixed()
        bindings = [binding for block in function.body.blocks for binding in block.bindings]
        for binding, where in zip(bindings, self._wheres(bindings), strict=True):
            self.where = where
            if isinstance(binding, relax.VarBinding):
                self.values[binding.var] = self._value(binding.value)
            else:
                self.values[binding.var] = Refused(self.error(type(binding).__name__))

        result = self._value(function.body.body)
        if isinstance(result, tuple) and len(result) == 1:
            result = result[0]
        if isinstance(result, tuple):
            raise SpecError(f"a model that returns the logits alone is wanted, this one returns {len(result)} values")
        logits = self.activation(result)
        if len(logits.shape) != 2 or logits.shape[0] != input_shape[0]:
            raise SpecError(f"logits of shape ({input_shape[0]}, classes) are wanted, the model gives {logits.shape}: "
                            "end it with flatten and a linear layer")
        if logits.shape[1] < 2:
            raise SpecError("the model gives one logit: softmax cross-entropy over one class is 0 for ever. Give it an output for each "
                            "class; 2 of them for yes and no are binary cross-entropy of their difference")
        return ForwardGraph(name_nodes(self.drafts, logits.draft), input_shape, self.state_shapes), self.transposed

    def _wheres(self, bindings: list) -> list[str]:
        """The place of each binding. An operator's helper bindings come before the one that its place is known for."""
        wheres, where = [], ""
        for binding in reversed(bindings):
            where = self.places.get(binding.var.name, where)
            wheres.append(where)
        return wheres[::-1]

    def _value(self, expr: Any) -> Any:
        from tvm import ir, relax

        if isinstance(expr, relax.Var):
            return self.values[expr]
        if isinstance(expr, relax.Tuple):
            return tuple(self._value(item) for item in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            whole = self._value(expr.tuple_value)
            return whole if isinstance(whole, Refused) else whole[expr.index]
        if not isinstance(expr, relax.Call):
            return Fixed()
        name = expr.op.name if isinstance(expr.op, ir.Op) else str(expr.op)
        arguments = [self._value(item) for item in expr.args]
        for item in arguments:
            if isinstance(item, Refused):
                return item
        if name not in READERS:
            return Refused(self.error(name.removeprefix("relax.").removeprefix("nn.")))
        try:
            return READERS[name](self, expr, arguments)
        except UnsupportedOperator as error:
            return Refused(error)

    def place(self) -> str:
        """Where in the model the walk is, as well as is known."""
        layers = [draft.params["weight"].removesuffix(".weight") for draft in self.drafts if "weight" in draft.params]
        return self.where or (f"after layer {layers[-1]!r}" if layers else "before the first layer")

    def error(self, what: str) -> UnsupportedOperator:
        return unsupported(what, self.place())

    def activation(self, value: Any) -> Value:
        """The value, which must be an activation. Raises UnsupportedOperator."""
        if isinstance(value, Refused):
            raise value.error
        if not isinstance(value, Value):
            kind = {Parameter: "a parameter", Fixed: "a constant"}.get(type(value), "a tuple")
            raise self.error(f"{kind} used as an activation")
        return value

    def add(self, op: str, inputs: tuple[Value, ...], shape: tuple[int, ...], params: dict[str, str] | None = None,
            attrs: dict[str, Any] | None = None) -> Value:
        self.drafts.append(Draft(op, tuple(value.draft for value in inputs), shape, params or {}, attrs or {}))
        return Value(len(self.drafts) - 1, shape)


def _shape(var: Any) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in var.ty.shape)
    except TypeError as error:
        raise SpecError(f"every size must be known when the model is compiled; {var.name} has shape {var.ty.shape}") from error


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second


def _padding(reader: Reader, attrs: Any) -> tuple[int, int]:
    """(y, x) of Relax's (top, left, bottom, right)."""
    top, left, bottom, right = (int(value) for value in attrs.padding)
    if (top, left) != (bottom, right):
        raise reader.error(f"asymmetric padding (top {top}, left {left}, bottom {bottom}, right {right})")
    return top, left


def _is_stored(*values: Any) -> bool:
    return all(isinstance(value, Parameter) and value.form == "" for value in values)


@reads("relax.nn.conv2d")
def read_conv2d(reader: Reader, call: Any, arguments: list) -> Any:
    attrs, weight = call.attrs, arguments[1]
    image = reader.activation(arguments[0])
    if not _is_stored(weight):
        raise reader.error("conv2d with a computed weight")
    if int(attrs.groups) != 1:
        raise reader.error(f"grouped or depthwise conv2d (groups={int(attrs.groups)}, weight {weight.name})")
    if _pair(attrs.dilation) != (1, 1):
        raise reader.error(f"dilated conv2d (dilation={_pair(attrs.dilation)}, weight {weight.name})")
    padding = _padding(reader, attrs)
    return reader.add("conv2d", (image,), _shape(call), {"weight": weight.name}, {"stride": _pair(attrs.strides), "padding": padding})


@reads("relax.matmul")
def read_matmul(reader: Reader, call: Any, arguments: list) -> Any:
    features, weight = reader.activation(arguments[0]), arguments[1]
    if not isinstance(weight, Parameter) or len(reader.state_shapes[weight.name]) != 2:
        raise reader.error("matmul of two activations")
    if len(features.shape) != 2:
        raise reader.error(f"linear on an input of shape {features.shape}, which is not (N, features),")
    if weight.form == "" and weight.name not in reader.transposed:
        if not reader.may_transpose:
            raise reader.error(f"matmul with {weight.name} stored as (in, out)")
        reader.transposed.add(weight.name)
        reader.state_shapes[weight.name] = reader.state_shapes[weight.name][::-1]
    return reader.add("linear", (features,), _shape(call), {"weight": weight.name})


@reads("relax.permute_dims")
def read_permute_dims(reader: Reader, call: Any, arguments: list) -> Any:
    value = arguments[0]
    if _is_stored(value) and len(reader.state_shapes[value.name]) == 2:
        return Parameter(value.name, "transposed")
    raise reader.error("permute_dims")


@reads("relax.add")
def read_add(reader: Reader, call: Any, arguments: list) -> Any:
    left, right = arguments
    if isinstance(left, Value) and isinstance(right, Value):
        if left.shape != right.shape:
            raise reader.error(f"add of different shapes, {left.shape} and {right.shape},")
        return reader.add("add", (left, right), left.shape)
    value, bias = (right, left) if isinstance(left, Parameter) else (left, right)
    if isinstance(value, Value) and isinstance(bias, Parameter) and value.draft >= 0:
        layer = reader.drafts[value.draft]
        held = (1, prod(reader.state_shapes[bias.name]), 1, 1) if bias.form == "channel" else reader.state_shapes[bias.name]
        # As broadcasting lines it up: a channel's number for images, a feature's otherwise.
        wanted = (1, value.shape[1], *[1] * (len(value.shape) - 2))
        fits = bias.form in ("", "channel") and held == wanted[len(wanted) - len(held):] and prod(held) == value.shape[1]
        if layer.op in ("conv2d", "linear") and fits and "bias" not in layer.params:
            # A second draft of the same layer: should its result without the bias be used as well, the shared weight is noticed.
            reader.drafts.append(replace(layer, params={**layer.params, "bias": bias.name}))
            return Value(len(reader.drafts) - 1, value.shape)
    raise reader.error(f"add of {'a constant' if Fixed() in arguments else 'a parameter that is no bias of a layer'}")


@reads("relax.nn.batch_norm")
def read_batch_norm(reader: Reader, call: Any, arguments: list) -> Any:
    attrs = call.attrs
    image = reader.activation(arguments[0])
    if int(attrs.axis) != 1 or not _is_stored(*arguments[1:]):
        raise reader.error("batch_norm without its own weight, bias and running statistics")
    roles = ("weight", "bias", "running_mean", "running_var")
    params = {role: parameter.name for role, parameter in zip(roles, arguments[1:], strict=True)}
    normalised = reader.add("batch_norm", (image,), image.shape, params,
                            {"eps": _single(attrs.epsilon), "momentum": _single(attrs.momentum)})
    statistics = Refused(reader.error("batch_norm's running statistics used as values"))
    return normalised, statistics, statistics


def _single(value: float) -> float:
    """The shortest decimal that is the same float32: ONNX stores 1e-5 as 9.99999975e-06, and both ways must agree."""
    return float(str(np.float32(value)))


@reads("relax.nn.relu")
def read_relu(reader: Reader, call: Any, arguments: list) -> Any:
    image = reader.activation(arguments[0])
    return reader.add("relu", (image,), image.shape)


@reads("relax.nn.max_pool2d", "relax.nn.avg_pool2d")
def read_pool(reader: Reader, call: Any, arguments: list) -> Any:
    attrs, op = call.attrs, call.op.name.removeprefix("relax.nn.")
    image, shape = reader.activation(arguments[0]), _shape(call)
    kernel, stride = _pair(attrs.pool_size), _pair(attrs.strides)
    if _pair(attrs.dilation) != (1, 1):
        raise reader.error(f"dilated {op} (dilation={_pair(attrs.dilation)})")
    padding = _padding(reader, attrs)
    whole = tuple((size + 2 * pad - width) // step + 1
                  for size, pad, width, step in zip(image.shape[2:], padding, kernel, stride, strict=True))
    if shape[2:] != whole:
        raise reader.error(f"{op} with ceil_mode=True, whose last window leaves the image,")
    pool: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding}
    if op == "avg_pool2d":
        pool["count_include_pad"] = bool(attrs.count_include_pad)
    return reader.add(op, (image,), shape, attrs=pool)


@reads("relax.nn.adaptive_avg_pool2d")
def read_adaptive_avg_pool2d(reader: Reader, call: Any, arguments: list) -> Any:
    image, shape = reader.activation(arguments[0]), _shape(call)
    if shape[2:] == (1, 1):
        return reader.add("global_avg_pool", (image,), shape)
    if any(size % out for size, out in zip(image.shape[2:], shape[2:], strict=True)):
        raise reader.error(f"adaptive_avg_pool2d from {image.shape[2:]} to {shape[2:]}, whose windows differ in size,")
    window = _pair(size // out for size, out in zip(image.shape[2:], shape[2:], strict=True))
    return reader.add("avg_pool2d", (image,), shape,
                      attrs={"kernel": window, "stride": window, "padding": (0, 0), "count_include_pad": True})


@reads("relax.mean")
def read_mean(reader: Reader, call: Any, arguments: list) -> Any:
    image = reader.activation(arguments[0])
    rank = len(image.shape)
    axes = range(rank) if call.attrs.axis is None else sorted(int(axis) % rank for axis in call.attrs.axis)
    if rank != 4 or list(axes) != [2, 3]:
        raise reader.error(f"mean over axes {tuple(axes)}, which are not height and width,")
    return reader.add("global_avg_pool", (image,), _shape(call))


@reads("relax.reshape", "relax.squeeze", "relax.flatten", "relax.nn.batch_flatten")
def read_reshape(reader: Reader, call: Any, arguments: list) -> Any:
    value, shape = arguments[0], _shape(call)
    if isinstance(value, Parameter):
        held = reader.state_shapes[value.name]
        if value.form == "" and len(held) == 1 and shape == (1, held[0], 1, 1):
            return Parameter(value.name, "channel")
        raise reader.error(f"reshape of {value.name}")
    image = reader.activation(value)
    if shape == image.shape:
        return image
    if shape == (image.shape[0], prod(image.shape[1:])):
        return reader.add("flatten", (image,), shape)
    raise reader.error(f"reshape from {image.shape} to {shape}, which is not a flatten,")


@reads("relax.nn.dropout")
def read_dropout(reader: Reader, call: Any, arguments: list) -> Any:
    if float(call.attrs.rate) > 0:
        raise dropout_error(_single(call.attrs.rate), reader.place())
    return reader.activation(arguments[0]), Refused(reader.error("dropout's mask used as a value"))

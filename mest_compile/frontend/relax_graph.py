"""Relax function -> ForwardGraph. Both importers end here, so a model means the same whichever way it came.

TVM's importers write some operators as several: a linear layer is permute_dims + matmul + add, a convolution's bias is
reshape + add, a max pool of torch carries an index output. The reader folds these back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, TypeVar

import numpy as np

from mest_compile.base.errors import SpecError, UnsupportedOperator
from mest_compile.base.registry import Registry
from mest_compile.frontend.arranging import Arranger
from mest_compile.frontend.naming import PREPARE, REFUSED, Draft, check_parameters, name_nodes, needed, split_prepared
from mest_compile.frontend.refusals import SUPPORTED, Origin, Refusals, unsupported
from mest_compile.frontend.values import Fixed, Formula, Parameter, Refused, Scores, Seen, Spread, Value, View, Whole
from mest_compile.ir.arrangement import Arrangement, as_image
from mest_compile.ir.expressions import Expression
from mest_compile.ir.graph import CUT, ForwardGraph, Preparation
from mest_compile.ir.wording import as_text

READERS = Registry("reader of a Relax operator", "mest_compile.operators")
POINTWISE: set[str] = set()  # Relax operators that do the same to every element, wherever it lies
SCORED: set[str] = set()  # those whose readers take an attention's scores; others get the activation that they are
R = TypeVar("R", bound=Callable[..., Any])


def reads(*names: str, gives: tuple[str, ...] = (), pointwise: bool = False, scores: bool = False) -> Callable[[R], R]:
    """Function decorator: the function (reader, call, arguments) -> value reads these Relax operators.

    gives      what people know them as, for the list of what is supported
    pointwise  the same of every element: the function gets call and arguments as values lie, whatever their axes are
    scores     it takes an attention's scores as they are
    """

    def register(function: R) -> R:
        POINTWISE.update(names if pointwise else ())
        SCORED.update(names if pointwise or scores else ())
        for registry, entries in (READERS, names), (SUPPORTED, gives):
            for name in entries:
                registry.add(name, function)
        return function

    return register


RANKS = (2, 3, 4)  # of values that readers know


def read_main(
    function: Any,
    parameters: Mapping[str, str],
    state_shapes: Mapping[str, tuple[int, ...]],
    origins: Mapping[str, Origin],
    refusals: Refusals,
    may_transpose: bool = False,
) -> tuple[ForwardGraph, set[str]]:
    """The Relax function as a ForwardGraph, and the names of the linear weights that it holds as (in, out).

    parameters     Relax parameter -> torch name
    state_shapes   every parameter and buffer by torch name, in torch's order
    origins        Relax variable -> where in the model it is from
    may_transpose  a linear weight may be stored as (in, out); `state_shapes` then still holds it that way, the graph
                   does not
    refusals       where what is refused goes; the graph then has nodes REFUSED in its places
    Raises UnsupportedOperator where there is no graph for what is refused, SpecError.
    """
    return Reader(parameters, state_shapes, origins, refusals, may_transpose).read(function)


class Reader(Arranger):
    """Walks the bindings of one Relax function."""

    def __init__(
        self,
        parameters: Mapping[str, str],
        state_shapes: Mapping[str, tuple[int, ...]],
        origins: Mapping[str, Origin],
        refusals: Refusals,
        may_transpose: bool,
    ):
        super().__init__()
        self.parameters = parameters
        self.state_shapes = dict(state_shapes)
        self.origins = origins
        self.may_transpose = may_transpose
        self.transposed: set[str] = set()
        self.drafts: list[Draft] = []
        self.values: dict[Any, Any] = {}
        self.refusals = refusals
        self.refused: set[tuple[str, str]] = set()  # operators made of several that are refused, and where
        self.lost: set[Value] = set()  # stand-ins that no reader knows what to do with
        self.detached: set[str] = set()  # parameters whose gradient forward cuts
        self.forms: dict[Value, Mapping[Value, np.ndarray]] = {}  # of activations that are functions of others
        self.trees: dict[Value, Mapping[Value, Expression]] = {}
        self.spelled: dict[tuple[Value, str], Value] = {}
        self.prepared: dict[tuple[Value, Preparation], Value] = {}
        self.products: dict[tuple[Any, ...], Any] = {}  # scores that became activations
        self.where = self.name = self.called = self.trouble = ""
        self.input_shape: tuple[int, ...] = ()

    def read(self, function: Any) -> tuple[ForwardGraph, set[str]]:
        from tvm import relax

        count = int(function.attrs["num_input"])
        inputs, rest = list(function.params[:count]), list(function.params[count:])
        if len(inputs) != 1:
            raise SpecError(
                f"a model with one input is wanted, this one has {len(inputs)}: {', '.join(var.name for var in inputs)}"
            )
        input_shape = _shape(inputs[0])
        self.input_shape = as_image(input_shape)
        self.values[inputs[0]] = self.viewed(Value(-1, self.input_shape), Arrangement.plain(input_shape))
        for var in rest:
            known = var.name in self.parameters
            self.values[var] = Parameter(self.parameters[var.name]) if known else Fixed()
        bindings = [binding for block in function.body.blocks for binding in block.bindings]
        for binding, origin in zip(bindings, self._origins(bindings), strict=True):
            self.where, self.called, self.trouble = origin.where, origin.operator, origin.trouble
            self.name = origin.operator if origin.several else ""
            if isinstance(binding, relax.VarBinding):
                self.values[binding.var] = self._value(binding.value)
            else:
                self.values[binding.var] = self._stand_in(binding.var, [], self.error(type(binding).__name__))

        result = self._value(function.body.body)
        for index in needed(self.drafts, [one.draft for one in _sources(_flat([result]))]):
            if (error := self.drafts[index].attrs.get("error")) is not None:
                self.refusals.add(error)
        try:
            return self._graph(result, input_shape)
        except UnsupportedOperator as error:
            self.refusals.add(error)
            self.refusals.check()
            raise
        except SpecError:
            self.refusals.check()  # which may be why
            raise

    def _graph(self, result: Any, input_shape: tuple[int, ...]) -> tuple[ForwardGraph, set[str]]:
        if isinstance(result, tuple) and len(result) == 1:
            result = result[0]
        if isinstance(result, tuple):
            raise SpecError(
                f"a model that returns the logits alone is wanted, this one returns {len(result)} values; say which "
                "they are by output=, a name or a number"
            )
        if isinstance(result, Seen) and len(result.shape) == 1:  # a number for each example
            result = self.reshaped(result, (*result.shape, 1))
        if isinstance(result, Seen) and len(result.shape) == 4 and result.shape[2:] == (1, 1):
            result = self.reshaped(result, result.shape[:2])
        shape = result.shape if isinstance(result, Seen) else ()
        if shape and (len(shape) not in (2, 4) or shape[0] != input_shape[0]):
            raise SpecError(
                f"logits of shape ({input_shape[0]}, classes) are wanted, or maps of them, the model gives "
                f"{shape}: end it with flatten and a linear layer"
            )
        logits = self.activation(result)
        with self.refusals.noted():
            check_parameters(self.drafts, logits.draft)
        prepared, nodes = split_prepared(name_nodes(self.drafts, logits.draft))
        graph = ForwardGraph(nodes, input_shape, self.state_shapes, prepared)
        cut = dict.fromkeys((name for name in graph.parameters() if name in self.detached), CUT)
        return replace(graph, frozen=cut), self.transposed

    def _origins(self, bindings: list) -> list[Origin]:
        """Of each binding. An operator's helper bindings come before the one whose origin is known; the model's output
        comes last."""
        known = [self.origins[binding.var.name] for binding in bindings if binding.var.name in self.origins]
        origins, origin = [], known[-1] if known else Origin()
        for binding in reversed(bindings):
            origin = self.origins.get(binding.var.name, origin)
            origins.append(origin)
        return origins[::-1]

    def _value(self, expr: Any) -> Any:
        from tvm import ir, relax

        if isinstance(expr, relax.Var):
            return self.values[expr]
        if isinstance(expr, relax.Tuple):
            return tuple(self._value(item) for item in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self._value(expr.tuple_value)[expr.index]
        if not isinstance(expr, relax.Call):
            return Fixed(_number(expr), _array(expr))
        name = expr.op.name if isinstance(expr.op, ir.Op) else str(expr.op)
        if name == "relax.call_pure_packed":  # what converters of our own leave whole
            name = str(expr.args[0].global_symbol)
        arguments = [self._value(item) for item in expr.args]
        operands = _flat(arguments)
        short = name.removeprefix("relax.").removeprefix("nn.")
        self.called = self.called or short
        try:
            if side := [item.error for item in operands if isinstance(item, Refused)]:
                raise side[0]
            if name not in READERS.load():
                raise self.error(f"{self.called} ({self.trouble})" if self.trouble else self.called)
            if not self.lost.isdisjoint(item for item in operands if isinstance(item, Value)):
                return self._stand_in(expr, operands)
            if name not in SCORED:
                arguments = [self.seen(one) if isinstance(one, Scores) else one for one in arguments]
            read = READERS[name]
            return self.pointwise(read, expr, arguments) if name in POINTWISE else read(self, expr, arguments)
        except UnsupportedOperator as error:
            return self._stand_in(expr, operands, error)

    def _stand_in(self, expr: Any, operands: list, error: UnsupportedOperator | None = None) -> Any:
        """In the place of a value that no operator gives, so that what comes after it is read as if one did. error: why
        none does; None: what was refused before is why."""
        if error is not None and self.name:
            error = None if (self.name, self.where) in self.refused else error
            self.refused.add((self.name, self.where))
        sources = _sources(operands)

        def made(kind: Any) -> Any:
            if hasattr(kind, "fields"):
                return tuple(made(field) for field in kind.fields)
            shape = tuple(int(size) for size in getattr(kind, "shape", None) or ())
            known = len(shape) in RANKS and sources and str(kind.dtype) == "float32"
            known = known and shape[0] == self.input_shape[0]
            lies = as_image(shape) if known else shape
            value = self.add(REFUSED, tuple(sources), lies, attrs={"error": error, "operator": self.called})
            if known:
                return self.viewed(value, Arrangement.plain(shape))
            self.lost.add(value)
            return value

        return made(expr.ty)

    def place(self) -> str:
        """Where in the model the walk is, as well as is known."""
        layers = [draft.params["weight"].removesuffix(".weight") for draft in self.drafts if "weight" in draft.params]
        return self.where or (f"after layer {layers[-1]!r}" if layers else "before the first layer")

    def error(self, what: str) -> UnsupportedOperator:
        """That this cannot be trained, by the name that the model's author wrote."""
        if self.name and self.name.lower() not in what.lower():
            what = f"{self.name} ({what.removesuffix(',')})"
        return unsupported(what, self.place(), self.name or self.called)

    def activation(self, value: Any) -> Value:
        """The value, which must be an activation. Raises UnsupportedOperator."""
        value = self.seen(value) if isinstance(value, Scores) else value
        if isinstance(value, Formula) and value.base:
            return self.prepare(value.base, *value.prepared)
        if isinstance(value, Formula) and value.trees and not value.compares:
            return self.formula(value)
        if isinstance(value, Spread):
            source = self.activation(value.value)
            if len(source.shape) != len(value.shape):
                raise self.error(f"broadcast from {source.shape} to {value.shape}")
            return self.add("combine", (source,), value.shape, attrs={"formula": "x0", "strides": ()})
        if isinstance(value, View):
            if len(value.shape) not in (2, 4):
                raise self.error(f"{self.called} of a value of shape {value.shape}")
            return self.plainly(value)
        if isinstance(value, Refused | Formula):
            raise value.error
        if isinstance(value, Fixed) and value.array is not None and len(value.array.shape) in (2, 4):
            return self.standing(value.array)
        if not isinstance(value, Value):
            kinds = {
                Parameter: "a parameter",
                Fixed: "a constant",
                Whole: "whole numbers",
            }
            kind = kinds.get(type(value), "a tuple")
            raise self.error(f"{kind} used as an activation")
        return value

    def seen(self, value: Any) -> Any:
        """The value, which must be an activation or a formula of one, whatever its axes. Raises UnsupportedOperator."""
        if isinstance(value, Scores):
            return READERS.find("mest.scores")(self, None, [value])
        return value if isinstance(value, View | Formula) else self.activation(value)

    def scaled(self, call: Any, arguments: list) -> Scores | None:
        return READERS.find("mest.scaled")(self, call, arguments)

    def standing(self, array: np.ndarray) -> Value:
        """Numbers that stand there for every example alike. Raises UnsupportedOperator."""
        first = array[:1]
        if len(array) not in (1, self.input_shape[0]) or not np.array_equal(np.broadcast_to(first, array.shape), array):
            raise self.error("a constant that is not the same for every example used as an activation")
        flat, shape = tuple(map(float, first.ravel())), (self.input_shape[0], *array.shape[1:])
        strides = tuple(prod(shape[place + 1 :]) if size > 1 else 0 for place, size in enumerate(shape) if place)
        attrs = {"formula": "x0", "strides": ((*strides, 0, 0)[:3],), "constants": (flat,)}
        return self.add("combine", (), shape, attrs=attrs)

    def formula(self, value: Formula) -> Value:
        """A formula that nothing was made of as an activation, made once: of the first activation that it is one of,
        so that it is one pass."""
        base = min(value.trees, key=lambda one: one.draft)
        key = base, as_text(value.trees[base])
        if key not in self.spelled:
            self.spelled[key] = self.add("formula", (base,), base.shape, attrs={"formula": key[1]})
            self.forms[self.spelled[key]], self.trees[self.spelled[key]] = value.forms, value.trees
        return self.spelled[key]

    def source(self, value: Value) -> Value:
        """What the operator of a value reads first."""
        place = self.drafts[value.draft].inputs[0]
        return Value(place, self.drafts[place].shape if place >= 0 else self.input_shape)

    def is_input(self, value: Any) -> bool:
        """Whether it is the model's input, prepared or not."""
        return isinstance(value, Value) and (value.draft < 0 or self.drafts[value.draft].op == PREPARE)

    def prepare(self, value: Value, *steps: Preparation) -> Value:
        """The model's input after these steps, made once."""
        for step in steps:
            if (value, step) not in self.prepared:
                self.prepared[value, step] = self.add(PREPARE, (value,), value.shape, attrs={"step": step})
            value = self.prepared[value, step]
        return value

    def shape_of(self, parameter: Parameter) -> tuple[int, ...]:
        """In the form that it has."""
        held = self.state_shapes[parameter.name]
        kinds = {"": held, "transposed": held[::-1], "channel": (1, *held, 1, 1)}
        return kinds.get(parameter.form, parameter.shape)

    def add(
        self,
        op: str,
        inputs: tuple[Value, ...],
        shape: tuple[int, ...],
        params: dict[str, str] | None = None,
        attrs: dict[str, Any] | None = None,
    ) -> Value:
        self.drafts.append(Draft(op, tuple(value.draft for value in inputs), shape, params or {}, attrs or {}))
        return Value(len(self.drafts) - 1, shape)


def _shape(var: Any) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in var.ty.shape)
    except TypeError as error:
        raise SpecError(
            f"every size must be known when the model is compiled; {var.name} has shape {var.ty.shape}"
        ) from error


def _flat(values: Iterable[Any]) -> list[Any]:
    """Those in tuples, too."""
    return [item for value in values for item in (_flat(value) if isinstance(value, tuple) else [value])]


def _sources(values: Iterable[Any]) -> list[Value]:
    """The activations among them, and those that formulas are of."""
    found: list[Value] = []
    for given in values:
        for value in (given.q, given.k) if isinstance(given, Scores) else (given,):
            value = value.value if isinstance(value, Spread | Whole) else value
            value = value.bare if isinstance(value, View) else value
            found += [value] if isinstance(value, Value) else value.forms if isinstance(value, Formula) else []
    return found


def _number(expr: Any) -> float | None:
    """Of a constant that is one: a bound of a clip, or a tensor without axes."""
    value: Any = getattr(expr, "value", None)
    if hasattr(value, "numpy"):
        return None if value.ndim else float(value.numpy())
    return float(value) if isinstance(value, int | float) else None


def _array(expr: Any) -> np.ndarray | None:
    """Of a constant with axes."""
    value: Any = getattr(expr, "value", None)
    return np.array(value.numpy()) if hasattr(value, "numpy") and value.ndim else None


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second


def padding_attrs(sides: Iterable[int]) -> dict[str, tuple[int, int]]:
    """(top, left, bottom, right) pixels, or (left, right), as nodes have them: `padding`, and `padding_end` where that
    is another."""
    pixels = [int(side) for side in sides]
    top, left, bottom, right = pixels if len(pixels) == 4 else (0, pixels[0], 0, pixels[1])
    end = {} if (top, left) == (bottom, right) else {"padding_end": (bottom, right)}
    return {"padding": (top, left), **end}


def _is_stored(*values: Any) -> bool:
    return all(isinstance(value, Parameter) and value.form == "" for value in values)


def _single(value: float) -> float:
    """The shortest decimal that is the same float32: ONNX stores 1e-5 as 9.99999975e-06, and both ways must agree."""
    return float(str(np.float32(value)))

"""Values of a model as they lie: an image, or the axes of a tensor that lies in one.

Reshaping and permuting make another view of the same image. An operator that wants it otherwise than it lies gets a
copy, made once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

from mest_compile.base.errors import UnsupportedOperator
from mest_compile.frontend.values import Fixed, Formula, Parameter, Picked, Scores, Seen, Spread, Value, View
from mest_compile.ir.arrangement import Arrangement, Axis, merged, size_of, together, whole


class Arranger(ABC):
    """What of a `Reader` is about where values lie."""

    called: str  # the operator that is being read
    state_shapes: dict[str, tuple[int, ...]]

    def __init__(self) -> None:
        self._copies: dict[tuple[Value, tuple[Axis, ...], bool], Value] = {}

    @abstractmethod
    def add(
        self,
        op: str,
        inputs: tuple[Value, ...],
        shape: tuple[int, ...],
        params: dict[str, str] | None = None,
        attrs: dict[str, Any] | None = None,
    ) -> Value:
        """Adds an operator to the graph."""

    @abstractmethod
    def error(self, what: str) -> UnsupportedOperator:
        """The error for what cannot be trained here."""

    @abstractmethod
    def activation(self, value: Any) -> Value:
        """The value, which must be an activation, as it is: (N, C, H, W) or (N, features). Raises
        UnsupportedOperator."""

    @abstractmethod
    def seen(self, value: Any) -> Any:
        """The value, which must be an activation or a formula of one, whatever its axes. Raises
        UnsupportedOperator."""

    @abstractmethod
    def scaled(self, call: Any, arguments: list) -> Scores | None:
        """An operation some of whose operands are scores, as far as scores are left; None: it takes activations."""

    @abstractmethod
    def shape_of(self, parameter: Parameter) -> tuple[int, ...]:
        """In the form that it has."""

    @staticmethod
    def arrangement(value: Any) -> Arrangement:
        """Of an activation or a formula."""
        return value.arrangement if isinstance(value, View) else Arrangement.plain(value.shape)

    @staticmethod
    def bare(value: Any) -> Any:
        """What a view is of."""
        return value.bare if isinstance(value, View) else value

    @staticmethod
    def viewed(bare: Any, arrangement: Arrangement) -> Any:
        """An activation or formula with those axes."""
        same = len(arrangement.axes) == len(bare.shape) and arrangement == Arrangement.plain(bare.shape)
        return bare if same else View(bare, arrangement)

    def reshaped(self, value: Any, shape: tuple[int, ...]) -> Any:
        """The activation or formula with another shape. Raises UnsupportedOperator."""
        before = self.arrangement(value)
        after = before.reshaped(shape)
        if after is None and before.axes[0] == whole(self.bare(value).shape)["N"]:
            parts = tuple(part for axis in before.axes[1:] for part in axis)
            value = self.lay(value, {"C": parts, "H": (), "W": ()}, True)
            after = self.arrangement(value).reshaped(shape)
        if after is None:
            raise self.error(f"reshape from {before.shape} to {shape}, which mixes examples,")
        return self.viewed(self.bare(value), after)

    def lay(self, value: Any, image: Mapping[str, Axis], features: bool = False) -> Value:
        """An activation that lies in an image whose dimensions are those parts of the one that it lies in now: a copy,
        unless it does.

        features  it has no rows and columns, not one of each
        """
        source = self.activation(self.bare(value))
        parts, dims = {dim: merged(image[dim]) for dim in "CHW"}, whole(source.shape)
        same = all(parts[dim] == dims[dim] for dim in parts)
        if same and features == (len(source.shape) == 2):
            return source
        key = source, tuple(parts.values()), features
        if key not in self._copies:
            sizes = [size_of(axis) for axis in parts.values()]
            shape = (source.shape[0], *(sizes[:1] if features else sizes))
            if features and parts["C"] == merged(dims["C"] + dims["H"] + dims["W"]):
                self._copies[key] = self.add("flatten", (source,), shape)
            elif same:
                self._copies[key] = self.add("unflatten", (source,), shape)
            else:
                attrs = dict(zip(("channels", "rows", "columns"), parts.values(), strict=True))
                self._copies[key] = self.add("rearrange", (source,), shape, attrs=attrs)
        return self._copies[key]

    def plainly(self, value: View) -> Value:
        """(N, F), (N, C, L) or (N, C, H, W) of a view, as an image of its own: that of a series has one row. Raises
        UnsupportedOperator."""
        examples, *axes = value.arrangement.axes
        if len(axes) not in (1, 2, 3) or examples != whole(value.bare.shape)["N"]:
            raise self.error(f"{self.called} of a value of shape {value.shape}")
        image = {"C": axes[0], "H": axes[1] if len(axes) == 3 else (), "W": axes[-1] if len(axes) > 1 else ()}
        return self.lay(value, image, features=len(axes) == 1)

    def image(self, value: Any) -> Value:
        """An activation (N, C, H, W), or of a series (N, C, L) the image (N, C, 1, L) that it is. Raises
        UnsupportedOperator."""
        return self.plainly(value) if isinstance(value, View) else self.activation(value)

    def channels_last(self, value: Any) -> tuple[Value, Arrangement]:
        """An activation whose last axis is the channels of the image that it lies in, and what its axes are. Raises
        UnsupportedOperator."""
        arrangement, dims = self.arrangement(value), whole(self.bare(value).shape)
        *others, last = arrangement.axes
        pixels = [tuple(part for part in axis if part.dim != "N") for axis in others]
        if last == dims["C"] and any(pixels):
            return self.activation(self.bare(value)), arrangement
        *outer, columns = [axis for axis in pixels if axis] or [()]
        image = {"C": last, "H": merged(part for axis in outer for part in axis), "W": columns}
        return self.lay(value, image, not any(pixels)), arrangement.moved({**image, "N": dims["N"]})

    def onto(self, wanted: Arrangement, bare: Any, value: Any) -> Any:
        """`value`, an activation or formula, as it lies beside one with these axes that lies in the image of `bare`: an
        axis of 1 is repeated. Raises UnsupportedOperator."""
        mine, dims = self.arrangement(value), whole(bare.shape)
        if mine == wanted and self.bare(value).shape == bare.shape:
            return self.bare(value)
        axes = ((),) * (len(wanted.axes) - len(mine.axes)) + mine.axes
        shared = [place for place, axis in enumerate(axes) if axis]
        fits = len(axes) == len(wanted.axes) and all(size_of(axes[k]) == size_of(wanted.axes[k]) for k in shared)
        pairs = together([wanted.axes[k] for k in shared], [axes[k] for k in shared]) if fits else None
        if pairs is None:
            raise self.error(f"{self.called} of values of shapes {wanted.shape} and {mine.shape}")
        found = {part: other for ours, others in zip(*pairs, strict=True) for part, other in zip(ours, others)}
        image: dict[str, Axis] = {}
        for dim in dims:
            parts = sorted((part for part in found if part.dim == dim), key=lambda part: -part.stride)
            image[dim] = tuple(found[part] for part in parts)
            if parts and prod(part.size for part in parts) != size_of(dims[dim]):
                raise self.error(f"{self.called} of values of shapes {wanted.shape} and {mine.shape}")
        if merged(image["N"]) != whole(self.bare(value).shape)["N"]:
            raise self.error(f"{self.called} of values of shapes {wanted.shape} and {mine.shape}")
        return self.lay(value, image, features=len(bare.shape) == 2)

    def pointwise(self, read: Callable[..., Any], call: Any, arguments: list) -> Any:
        """What `read` makes of call and arguments as they lie beside the largest, with the axes of that one."""
        if any(isinstance(one, Scores) for one in arguments):
            if (scores := self.scaled(call, arguments)) is not None:
                return scores
            arguments = [self.seen(one) if isinstance(one, Scores) else one for one in arguments]
        values = [one for item in arguments for one in (item if isinstance(item, tuple) else [item])]
        known = [one.value if isinstance(one, Spread) else one for one in values if isinstance(one, Seen | Spread)]
        if not known or not any(isinstance(one, View | Picked) for one in [*known, *values]):
            return read(self, call, arguments)
        largest = max(known, key=lambda one: (prod(one.shape), not isinstance(one, View)))
        wanted, bare = self.arrangement(largest), self.bare(largest)
        if hasattr(call.ty, "shape") and tuple(map(int, call.ty.shape)) != wanted.shape:
            raise self.error(f"{self.called} of values of shapes {' and '.join(str(one.shape) for one in known)}")

        def beside(one: Any) -> Any:
            if isinstance(one, tuple):
                return tuple(map(beside, one))
            one = one.value if isinstance(one, Spread) else one
            return self.onto(wanted, bare, one) if isinstance(one, Seen) else self._laid(wanted, bare.shape, one)

        def seen(one: Any) -> Any:  # of a tuple, what is no value of the operator's is refused
            return self.viewed(one, wanted) if isinstance(one, Value | Formula) else one

        lies = SimpleNamespace(op=call.op, attrs=call.attrs, args=call.args, ty=SimpleNamespace(shape=bare.shape))
        result = read(self, lies, [beside(one) for one in arguments])
        return tuple(map(seen, result)) if isinstance(result, tuple) else seen(result)

    def _laid(self, wanted: Arrangement, image: tuple[int, ...], one: Any) -> Any:
        """Numbers or a parameter beside an image whose axes are those wanted: with the axes of the image. Raises
        UnsupportedOperator."""
        if isinstance(one, Picked) and one.added is None:
            numbers = one.places
            for axis in range(numbers.ndim):
                first = numbers.take([0], axis)
                numbers = first if (first == numbers).all() else numbers
        elif isinstance(one, Parameter):
            numbers = np.arange(prod(self.shape_of(one))).reshape(self.shape_of(one))
        elif isinstance(one, Fixed) and one.array is not None:
            numbers = one.array
        else:
            return one
        laid = wanted.physical(numbers, image)
        if laid is None:
            raise self.error(f"{self.called} of values of shapes {wanted.shape} and {numbers.shape}")
        laid = laid.reshape(laid.shape[: len(image)])
        if isinstance(one, Fixed):
            return Fixed(array=laid)
        held, one = one, Parameter(one.name) if isinstance(one, Picked) else one
        if laid.flat[0] == 0 and (np.diff(laid.ravel()) == 1).all() and one.form != "transposed":
            channel = len(self.state_shapes[one.name]) == 1 and laid.shape[1:] == (numbers.size, 1, 1)
            return Parameter(one.name, "channel") if channel else Parameter(one.name, "shaped", laid.shape)
        strides = [
            int(np.diff(laid, axis=axis).ravel()[0]) if laid.shape[axis] > 1 else 0 for axis in range(1, laid.ndim)
        ]
        if one.form == "transposed" or not np.array_equal(np.tensordot([0, *strides], np.indices(laid.shape), 1), laid):
            if isinstance(held, Picked):
                return Picked(one.name, laid)
            raise self.error(f"{self.called} of values of shapes {wanted.shape} and {numbers.shape}")
        return Parameter(one.name, "laid", laid.shape, (*strides, 0, 0)[:3])

"""What the values of a model are while it is read: activations as they lie or seen otherwise, formulas of them,
parameters and constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mest_compile.base.errors import UnsupportedOperator
from mest_compile.ir.arrangement import Arrangement
from mest_compile.ir.expressions import Expression
from mest_compile.ir.graph import Preparation


@dataclass(frozen=True)
class Parameter:
    """A parameter on its way to its operator. `form` is "" as stored, "transposed", "channel": reshaped to
    (1, C, 1, 1), "shaped": to `shape`, or "laid": with the axes of an image, `shape`, along which its numbers are
    `strides` apart."""

    name: str
    form: str = ""
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Picked:
    """Numbers of a parameter, picked by constant places: a table of biases by distance, looked up for pairs of tokens.

    places  in the parameter as it is stored, flat
    added   a constant that is added, of as many axes; None: nothing
    """

    name: str
    places: np.ndarray
    added: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.places.shape

    def seen_as(self, change: Callable[[np.ndarray], np.ndarray]) -> Picked:
        """Reshaped or permuted."""
        added = None if self.added is None else change(np.broadcast_to(self.added, self.shape))
        return Picked(self.name, change(self.places), added)


@dataclass(frozen=True)
class Fixed:
    """A constant of the graph: a number, a shape, an array without a name. `number` of a single number, `array` of
    others."""

    number: float | None = None
    array: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Refused:
    """A side result that no training operator gives; an error only when it is used."""

    error: UnsupportedOperator


@dataclass(frozen=True)
class Value:
    """An activation: the index of the draft that makes it, -1 for the graph's input. shape: (N, C, H, W) or
    (N, features)."""

    draft: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Formula:
    """A function of one activation on its way to being one, element by element: the x + 3 of a hardswish.

    forms  the activation that it is a function of, or several where one is a function of the other -> its values at
           certain points
    names  of the operators that it is made of
    trees  the same activations, as far as the function is short enough to be written down -> what it computes of x
    error  why no training operator can take it as it is
    compares  whether it is true or false, not a number
    base, prepared  the model's input, as far as it is prepared by then, and what was done to it since; None where it is
           a function of something else
    """

    forms: Mapping[Value, np.ndarray]
    names: tuple[str, ...]
    error: UnsupportedOperator
    base: Value | None = None
    prepared: tuple[Preparation, ...] = ()
    trees: Mapping[Value, Expression] = field(default_factory=dict)
    compares: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return next(iter(self.forms)).shape


@dataclass(frozen=True)
class View:
    """An activation, or a formula of one, whose axes are not those that it lies with."""

    bare: Any
    arrangement: Arrangement

    @property
    def shape(self) -> tuple[int, ...]:
        return self.arrangement.shape


@dataclass(frozen=True)
class Spread:
    """An activation on its way to an operator that spreads it itself, over what it has one element along."""

    value: Value | View
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    """An activation rounded towards 0, on its way to an embedding."""

    value: Value


@dataclass(frozen=True)
class Scores:
    """Products of queries and keys on their way to an attention.

    q, k         (..., tokens, channels of a head)
    arrangement  as that of a value; keys are its part "K"
    shares       they went through a softmax
    biases       what is added to them once they are scaled, with the axes that they had then
    """

    q: Value | View
    k: Value | View
    scale: float
    arrangement: Arrangement
    shares: bool = False
    biases: tuple[tuple[Arrangement, Fixed | Picked], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.arrangement.shape


Seen = Value | Formula | View

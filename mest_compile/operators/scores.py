"""Products of activations as activations of their own: scores of queries and keys that do not end as an attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

from mest_compile.frontend.relax_graph import READERS, Reader, reads
from mest_compile.frontend.values import Fixed, Scores
from mest_compile.ir.arrangement import DIMS, Arrangement, Axis, Part, cut, inverse, merged, size_of, whole
from mest_compile.operators.attention_bias import HIDDEN


class Operand:
    """Of a product of matrices: what its axes before the last two, its tokens (rows) and the channels of a head
    (columns) are made of."""

    def __init__(self, reader: Reader, value: Any):
        *self.outer, self.tokens, self.channels = reader.arrangement(value).axes
        self.value = value


def cut_alike(given: Sequence[Operand]) -> list[tuple[Part, ...]] | None:
    """Pieces of the outer axes, of equal sizes in all operands; None where there are none."""
    sizes = {tuple(size_of(axis) for axis in one.outer) for one in given}
    if len(sizes) > 1:
        return None
    ends: set[int] = {1}
    for one in given:
        count = 1
        for part in reversed([part for axis in one.outer for part in axis]):
            count *= part.size
            ends.add(count)
    steps = sorted(ends)
    if any(high % low for low, high in pairwise(steps)):
        return None
    pieces = [high // low for low, high in pairwise(steps)][::-1]
    found = [cut([part for axis in one.outer for part in axis], pieces) for one in given]
    if any(axes is None or any(len(axis) != 1 for axis in axes) for axes in found):
        return None
    return list(zip(*([axis[0] for axis in axes] for axes in found if axes is not None), strict=True))


def turned(reader: Reader, value: Any) -> Any:
    """An activation, or scores, with the last two axes exchanged."""
    rank = len(value.shape)
    order = (*range(rank - 2), rank - 1, rank - 2)
    if isinstance(value, Scores):
        return replace(value, arrangement=value.arrangement.permuted(order))
    return reader.viewed(reader.bare(value), reader.arrangement(value).permuted(order))


def multiplied(reader: Reader, a: Any, b: Any) -> tuple[Any, dict[str, Axis]]:
    """(a b, the image that it lies in as parts of a's and "K", the columns of b) of activations (..., rows, columns)
    whose axes before these are alike. Raises UnsupportedOperator."""
    given = [Operand(reader, value) for value in (a, b)]
    pieces = cut_alike(given)
    examples = [[part for part in piece if part.dim == "N"] for piece in pieces or ()]
    within = any(part.dim == "N" for one in given for part in one.tokens + one.channels)
    if pieces is None or within or any(len(found) == 1 for found in examples):
        raise reader.error(f"matmul of {a.shape} and {b.shape}")
    outer = [tuple(piece[number] for piece in pieces if piece[number].dim != "N") for number in (0, 1)]
    images = [
        reader.lay(one.value, {"C": channels, "H": one.tokens, "W": one.channels})
        for one, channels in zip(given, outer, strict=True)
    ]
    shape = (*images[0].shape[:3], images[1].shape[3])
    made = reader.add("matmul", tuple(images), shape)
    columns = merged([Part("K", shape[3], 1)])
    image = {"N": whole(shape)["N"], "C": merged(outer[0]), "H": given[0].tokens, "W": columns}
    arrangement = Arrangement((*reader.arrangement(a).axes[:-1], columns)).moved(image)
    return reader.viewed(made, arrangement), image


def applied(reader: Reader, name: str, value: Any, other: Any) -> Any:
    """An operation of Relax on an activation and what is spread over it. Raises UnsupportedOperator."""
    lies = SimpleNamespace(shape=value.shape)
    call = SimpleNamespace(op=SimpleNamespace(name=f"relax.{name}"), attrs=None, args=(), ty=lies)
    return reader.pointwise(READERS.find(call.op.name), call, [value, other])


@reads("mest.scores")
def read_scores(reader: Reader, call: Any, arguments: list) -> Any:
    """Scores as an activation, with all that was done to them since. Raises UnsupportedOperator."""
    (scores,) = arguments
    bare, moves = _spelled(reader, scores)
    return reader.viewed(bare, _moved(scores.arrangement, moves))


def _moved(arrangement: Arrangement, moves: Sequence[Mapping[str, Axis]]) -> Arrangement:
    for image in moves:
        arrangement = arrangement.moved(image)
    return arrangement


def _spelled(reader: Reader, scores: Scores) -> tuple[Any, tuple[Mapping[str, Axis], ...]]:
    """(activation or formula, images by which the axes of scores are moved to its own); each step is made once."""
    key = id(scores.q), id(scores.k), scores.scale, scores.shares, *map(id, scores.biases)
    if key not in reader.products:
        if scores.shares:
            bare, moves = _spelled(reader, replace(scores, shares=False))
            over = SimpleNamespace(attrs=SimpleNamespace(axis=-1))
            found = READERS.find("relax.nn.softmax")(reader, over, [reader.bare(bare)])
            image = inverse(dict(zip(DIMS, reader.arrangement(found).axes, strict=True)))
            made = reader.bare(found), (*moves, image)
        elif scores.biases:
            arrangement, held = scores.biases[-1]
            bare, moves = _spelled(reader, replace(scores, biases=scores.biases[:-1]))
            if isinstance(held, Fixed) and held.array is not None:
                held = Fixed(array=np.maximum(held.array, HIDDEN))
            made = reader.bare(applied(reader, "add", reader.viewed(bare, _moved(arrangement, moves)), held)), moves
        elif scores.scale != 1:
            bare, moves = _spelled(reader, replace(scores, scale=1.0))
            made = applied(reader, "multiply", bare, Fixed(scores.scale)), moves
        else:
            value, image = multiplied(reader, scores.q, turned(reader, scores.k))
            made = reader.bare(value), (image,)
        reader.products[key] = scores, made
    return reader.products[key][1]

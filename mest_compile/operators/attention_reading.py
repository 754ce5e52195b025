"""How models say that tokens attend to tokens: at once, or as two products with a softmax between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

from mest_compile.frontend.relax_graph import READERS, Reader, _single, reads
from mest_compile.frontend.values import Fixed, Parameter, Picked, Scores
from mest_compile.ir.arrangement import Arrangement, Axis, Part, cut, merged, size_of, whole
from mest_compile.operators.attention_bias import spread
from mest_compile.operators.rearrange import picked


def attention(
    reader: Reader, q: Any, k: Any, v: Any, scale: float, causal: bool = False, biases: Sequence[Any] = ()
) -> Any:
    """The attention of activations (..., tokens, channels of a head), whose axes before these are examples, heads and
    groups. biases: as Scores has them. Raises UnsupportedOperator."""
    given = [_Laid(reader, value) for value in (q, k, v)]
    pieces = _cut_alike(given)
    if pieces is None or any(part.dim == "N" for one in given for part in one.tokens + one.channels):
        raise reader.error(f"attention of {q.shape}, {k.shape} and {v.shape}")
    # A part of the pixels of q tells groups apart, one of its channels heads.
    heads, groups = ([place for place, (part, *_) in enumerate(pieces) if part.dim in dims] for dims in ("C", "HW"))
    examples = [place for place, (part, *_) in enumerate(pieces) if part.dim == "N"]
    images, rows = [], []
    for number, one in enumerate(given):
        if [pieces[place][number].dim for place in examples] != ["N"] * len(examples):
            raise reader.error(f"attention of {q.shape}, {k.shape} and {v.shape}, which mixes examples,")
        # Tokens of one group may lie in several rows, as patches do; those of several are a row each.
        outer, columns = ((), one.tokens) if groups else (one.tokens[:-1], one.tokens[-1:])
        rows.append(size_of(outer))
        above = tuple(pieces[place][number] for place in groups) + outer
        channels = tuple(pieces[place][number] for place in heads) + one.channels
        images.append(reader.lay(one.value, {"C": channels, "H": above, "W": columns}))
    count, width = prod(pieces[place][0].size for place in heads), size_of(given[2].channels)
    attrs: dict[str, Any] = {"heads": count, "scale": _single(scale), "rows": (rows[0], rows[1])}
    if causal:
        attrs["causal"] = True
    params = {}
    if biases:
        parts = ([pieces[place][0] for place in places] for places in (heads, groups))
        params = spread(reader, biases, (*parts, given[0].tokens), q.shape[0], size_of(given[1].tokens), attrs)
    shape = images[0].shape[0], count * width, *images[0].shape[2:]
    made = reader.add("attention", tuple(images), shape, params, attrs)
    # Where the parts of q's axes are now.
    places: dict[int, Part] = {}
    for dim, order, apart in (("C", heads, width), ("H", groups, rows[0])):
        for place in reversed(order):
            places[place] = Part(dim, pieces[place][0].size, apart)
            apart *= pieces[place][0].size
    places |= {place: pieces[place][0] for place in examples}
    tokens = cut(_tokens(shape, rows[0], bool(groups)), [size_of(given[0].tokens)])
    assert tokens is not None
    before = cut([places[place] for place in range(len(pieces))], q.shape[:-2])
    assert before is not None
    return reader.viewed(made, Arrangement((*before, tokens[0], (Part("C", width, 1),) if width > 1 else ())))


def _tokens(shape: tuple[int, ...], rows: int, grouped: bool) -> Axis:
    dims = whole(shape)
    return dims["W"] if grouped else merged((*([Part("H", rows, 1)] if rows > 1 else []), *dims["W"]))


class _Laid:
    """An operand: what its axes before the last two, its tokens and the channels of a head are made of."""

    def __init__(self, reader: Reader, value: Any):
        *self.outer, self.tokens, self.channels = reader.arrangement(value).axes
        self.value = value


def _cut_alike(given: list[_Laid]) -> list[tuple[Part, ...]] | None:
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


@reads("relax.nn.attention", gives=("scaled_dot_product_attention",))
def read_attention(reader: Reader, call: Any, arguments: list) -> Any:
    """Its operands are (N, tokens, heads, channels), and so is what it gives."""
    q, k, v = (
        reader.viewed(reader.bare(one), reader.arrangement(one).permuted((0, 2, 1, 3)))
        for one in map(reader.seen, arguments[:3])
    )
    causal = str(call.attrs.causal_mask or "") == "TopLeft"
    found = attention(reader, q, k, v, float(call.attrs.scale), causal)
    return reader.viewed(reader.bare(found), reader.arrangement(found).permuted((0, 2, 1, 3)))


def product(reader: Reader, a: Any, b: Any) -> Any:
    """Of two values, neither a weight: scores of queries and keys, or an attention of shares and values."""
    if isinstance(a, Scores):
        return _attended(reader, a, reader.seen(b))
    if isinstance(b, Scores):  # a b is the transpose of (b's transpose) (a's transpose)
        shares = replace(b, arrangement=_turned(b.arrangement))
        found = _attended(reader, shares, _seen_turned(reader, reader.seen(a)))
        return _seen_turned(reader, found)
    q, k = reader.seen(a), reader.seen(b)
    if len(k.shape) < 3 or q.shape[:-2] != k.shape[:-2]:
        raise reader.error(f"matmul of {q.shape} and {k.shape}")
    keys = merged([Part("K", k.shape[-1], 1)])
    axes = Arrangement((*reader.arrangement(q).axes[:-1], keys))
    return Scores(q, _seen_turned(reader, k), 1.0, axes)


def _turned(arrangement: Arrangement) -> Arrangement:
    """The last two axes exchanged."""
    rank = len(arrangement.axes)
    return arrangement.permuted((*range(rank - 2), rank - 1, rank - 2))


def _seen_turned(reader: Reader, value: Any) -> Any:
    return reader.viewed(reader.bare(value), _turned(reader.arrangement(value)))


def _attended(reader: Reader, shares: Scores, v: Any) -> Any:
    q, k = shares.q, shares.k
    mine = [part for axis in shares.arrangement.axes for part in axis]
    straight = [part for axis in reader.arrangement(q).axes[:-1] for part in axis]
    ends = shares.arrangement.axes[-1] == merged([Part("K", k.shape[-2], 1)])
    if not shares.shares or not ends or merged(mine[: len(mine) - (k.shape[-2] > 1)]) != merged(straight):
        raise reader.error(f"matmul of {shares.shape} and {v.shape}, which is no attention,")
    outer = tuple(v.shape[:-2])
    bare = reader.bare(q)
    q, k = (reader.reshaped(one, (*outer, *one.shape[-2:])) for one in (q, k))
    if shares.biases and reader.bare(q) is not bare:
        raise reader.error(f"matmul of {shares.shape}, to which something was added, and {v.shape}")
    return attention(reader, q, k, v, shares.scale, biases=shares.biases)


def _warmed(reader: Reader, scores: Scores, held: Parameter | Picked) -> Scores:
    """Scores times numbers that are learned, the same for all keys: it is queries that are multiplied by them. Raises
    UnsupportedOperator."""
    places, sizes = picked(reader, held), scores.shape
    numbers = (1,) * (len(sizes) - len(places.shape)) + places.shape
    q = reader.reshaped(scores.q, (*sizes[:-1], scores.q.shape[-1]))
    alike = reader.arrangement(q).axes[:-1] == scores.arrangement.axes[:-1]
    if not alike or reader.bare(q) is not reader.bare(scores.q) or numbers[-1] != 1 or places.added is not None:
        raise reader.error(f"{reader.called} of attention's scores and {held.name}")
    # Where heads are channels of their own, numbers of heads are numbers of channels.
    *others, last = reader.arrangement(q).axes
    own, rest = (
        merged(
            part
            for axis, size in zip(others, numbers, strict=False)
            for part in axis
            if (size > 1) is varies and part.dim != "N"
        )
        for varies in (True, False)
    )
    image = {"N": whole(q.shape)["N"], "C": own, "H": rest, "W": last}
    q = reader.viewed(reader.lay(q, image), reader.arrangement(q).moved(image))
    name = "relax.multiply"
    lies = SimpleNamespace(op=SimpleNamespace(name=name), attrs=None, args=(), ty=SimpleNamespace(shape=q.shape))
    operands = [q, places.seen_as(lambda array: array.reshape(numbers))]
    q = reader.pointwise(READERS.find(name), lies, operands)
    axes = Arrangement((*reader.arrangement(q).axes[:-1], scores.arrangement.axes[-1]))
    return replace(scores, q=q, arrangement=axes)


def scaled(reader: Reader, name: str, a: Any, b: Any) -> Scores:
    """Scores times a number, or and a constant or numbers of a parameter. Raises UnsupportedOperator."""
    scores, other = (a, b) if isinstance(a, Scores) else (b, a)
    if name == "add" and not scores.shares:
        if isinstance(other, Fixed) and (other.number is not None or other.array is not None):
            array = np.array(other.number) if other.array is None else other.array
            return replace(scores, biases=(*scores.biases, (scores.arrangement, Fixed(array=array))))
        if isinstance(other, Parameter | Picked):
            return replace(scores, biases=(*scores.biases, (scores.arrangement, picked(reader, other))))
    if name == "multiply" and not (scores.shares or scores.biases) and isinstance(other, Parameter | Picked):
        return _warmed(reader, scores, other)
    number = other.number if isinstance(other, Fixed) else None
    if (
        number is None
        or scores.shares
        or scores.biases
        or name not in ("multiply", "divide")
        or (name == "divide" and scores is b)
    ):
        raise reader.error(f"{reader.name or name} of attention's scores and what is no number")
    return replace(scores, scale=scores.scale * number if name == "multiply" else scores.scale / number)


def shared(reader: Reader, call: Any, scores: Scores) -> Scores:
    """The softmax of scores, over the keys. Raises UnsupportedOperator."""
    if int(call.attrs.axis) not in (-1, len(scores.shape) - 1):
        raise reader.error(f"{reader.called} of attention's scores over queries")
    return replace(scores, shares=True)

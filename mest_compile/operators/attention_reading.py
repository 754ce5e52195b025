"""How models say that tokens attend to tokens: at once, or as two products with a softmax between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from mest_compile.frontend.relax_graph import Reader, _single, reads
from mest_compile.frontend.values import Fixed, Parameter, Picked, Scores
from mest_compile.ir.arrangement import Arrangement, Axis, Part, cut, merged, size_of, whole
from mest_compile.operators.attention_bias import spread
from mest_compile.operators.rearrange import picked
from mest_compile.operators.scores import Operand, applied, cut_alike, multiplied, turned

NOTHING = -1e4  # the exponential of what is so far below others is 0 beside theirs, as torch's masks have it


def attention(
    reader: Reader, q: Any, k: Any, v: Any, scale: float, causal: bool = False, biases: Sequence[Any] = ()
) -> Any:
    """The attention of activations (..., tokens, channels of a head), whose axes before these are examples, heads and
    groups. biases: as Scores has them. Raises UnsupportedOperator."""
    given = [Operand(reader, value) for value in (q, k, v)]
    pieces = cut_alike(given)
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
    """Of two values, neither a weight: scores of queries and keys, an attention of shares and values, or a product as
    good as any. Raises UnsupportedOperator."""
    if isinstance(a, Scores) and (found := _attended(reader, a, b)) is not None:
        return found
    if isinstance(b, Scores):  # a b is the transpose of (b's transpose) (a's transpose)
        found = _attended(reader, turned(reader, b), turned(reader, reader.seen(a)))
        if found is not None:
            return turned(reader, found)
    q, k = reader.seen(a), reader.seen(b)
    if len(k.shape) < 3 or q.shape[:-2] != k.shape[:-2]:
        raise reader.error(f"matmul of {q.shape} and {k.shape}")
    if isinstance(a, Scores) or isinstance(b, Scores):
        return multiplied(reader, q, k)[0]
    axes = Arrangement((*reader.arrangement(q).axes[:-1], _keys(k.shape[-1])))
    return Scores(q, turned(reader, k), 1.0, axes)


def _keys(count: int) -> Axis:
    return merged([Part("K", count, 1)])


def _attended(reader: Reader, shares: Scores, v: Any) -> Any:
    """None: they are no shares, or of other values. Raises UnsupportedOperator."""
    q, k, v = shares.q, shares.k, reader.seen(v)
    mine = [part for axis in shares.arrangement.axes for part in axis]
    straight = [part for axis in reader.arrangement(q).axes[:-1] for part in axis]
    ends = shares.arrangement.axes[-1] == _keys(k.shape[-2])
    if not shares.shares or not ends or merged(mine[: len(mine) - (k.shape[-2] > 1)]) != merged(straight):
        return None
    outer, bare = tuple(v.shape[:-2]), reader.bare(q)
    q, k = (reader.reshaped(one, (*outer, *one.shape[-2:])) for one in (q, k))
    if shares.biases and reader.bare(q) is not bare:
        return None
    return attention(reader, q, k, v, shares.scale, biases=shares.biases)


def _warmed(reader: Reader, scores: Scores, held: Parameter | Picked) -> Scores | None:
    """Scores times numbers that are learned, the same for all keys: it is queries that are multiplied by them. None:
    they are others."""
    places, sizes = picked(reader, held), scores.shape
    numbers = (1,) * (len(sizes) - len(places.shape)) + places.shape
    q = reader.reshaped(scores.q, (*sizes[:-1], scores.q.shape[-1]))
    alike = reader.arrangement(q).axes[:-1] == scores.arrangement.axes[:-1]
    if not alike or reader.bare(q) is not reader.bare(scores.q) or numbers[-1] != 1 or places.added is not None:
        return None
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
    q = applied(reader, "multiply", q, places.seen_as(lambda array: array.reshape(numbers)))
    axes = Arrangement((*reader.arrangement(q).axes[:-1], scores.arrangement.axes[-1]))
    return replace(scores, q=q, arrangement=axes)


@reads("mest.scaled")
def read_scaled(reader: Reader, call: Any, arguments: list) -> Scores | None:
    """An operation on scores of which scores are left: times a number, or plus a constant or numbers of a parameter, or
    some of them hidden. None: it is another."""
    name = call.op.name.removeprefix("relax.")
    if name == "where":
        return _hidden(*arguments)
    if name not in ("add", "multiply", "divide"):
        return None
    scores, other = arguments if isinstance(arguments[0], Scores) else arguments[::-1]
    if scores.shares:
        return None
    array = other.array if isinstance(other, Fixed) else None
    number = other.number if isinstance(other, Fixed) else None
    if name == "add":
        if isinstance(other, Parameter | Picked):
            return _biased(scores, picked(reader, other))
        array = np.array(number) if array is None and number is not None else array
        return None if array is None else _biased(scores, Fixed(array=array))
    if scores.biases or (name == "divide" and scores is not arguments[0]):
        return None
    if name == "multiply" and isinstance(other, Parameter | Picked):
        return _warmed(reader, scores, other)
    if number is None:
        return None
    return replace(scores, scale=scores.scale * number if name == "multiply" else scores.scale / number)


def _biased(scores: Scores, held: Fixed | Picked) -> Scores:
    return replace(scores, biases=(*scores.biases, (scores.arrangement, held)))


def _hidden(condition: Any, chosen: Any, other: Any) -> Scores | None:
    """Some replaced by a number that is as good as none, by a constant that says which."""
    scores, number, kept = (chosen, other, True) if isinstance(chosen, Scores) else (other, chosen, False)
    if not all(isinstance(one, Fixed) for one in (condition, number)) or condition.array is None or scores.shares:
        return None
    value = number.array.flat[0] if number.number is None and number.array is not None else number.number
    if value is None or value > NOTHING:
        return None
    shown = condition.array if kept else ~condition.array
    return _biased(scores, Fixed(array=np.where(shown, np.float32(0), np.float32(value))))


def shared(reader: Reader, call: Any, scores: Scores) -> Scores | None:
    """The softmax of scores, over the keys. None: it is over others."""
    keys = int(call.attrs.axis) in (-1, len(scores.shape) - 1) and not scores.shares
    if not keys or scores.arrangement.axes[-1] != _keys(scores.k.shape[-2]):
        return None
    return replace(scores, shares=True)

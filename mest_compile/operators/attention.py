"""Scaled dot product attention: softmax(q k^T scale) v, head by head.

Heads are parts of the channels, tokens are pixels, and the rows of an image may be groups of tokens (windows) that see
each other alone. Probabilities, one a query and key, are never kept: of each query the logarithm of the sum of its
exponentials is, and the backward pass computes them again. Source: Dao et al., "FlashAttention", arXiv:2205.14135.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from mest_compile.base.errors import SpecError
from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader, _single, reads
from mest_compile.frontend.values import Fixed, Scores
from mest_compile.ir.arrangement import Arrangement, Axis, Part, cut, merged, size_of, whole
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.problem import SIZE
from mest_compile.ir.program import Activation
from mest_compile.operators.conversion import ImageCopy
from mest_compile.operators.operator import Operator, Trace, operator


@dataclass(frozen=True, slots=True)
class Attention:
    """Who attends to whom: query token (r, w) of a group, `rows[0]` rows of q, to all tokens of the same group of k and
    v, `rows[1]` rows of each.

    Kernel "attention.forward": q (q.elems,), k (k.elems,), v (v.elems,), y (y.elems,), sums (heads * q's slices *
    height * width * vector,) float32: head by head of a slice, then as q's pixels lie without a halo, the logarithm of
    the sum of a query's exponentials.

    heads   the channels of each image fall into so many, one behind another
    causal  a query sees the tokens up to its own number alone
    """

    q: Image
    k: Image
    v: Image
    y: Image
    heads: int = field(metadata=SIZE)
    scale: float
    rows: tuple[int, int] = (1, 1)
    causal: bool = False

    def __post_init__(self) -> None:
        q, k, v, y = self.q, self.k, self.v, self.y
        fits = (
            q.channels == k.channels
            and v.channels == y.channels
            and (q.height, q.width) == (y.height, y.width)
            and (k.height, k.width) == (v.height, v.width)
            and q.channels % self.heads == v.channels % self.heads == 0
            and q.height % self.rows[0] == k.height % self.rows[1] == 0
            and q.height // self.rows[0] == k.height // self.rows[1]
        )
        if not fits:
            raise SpecError(f"attention of {self.heads} heads cannot be of q {q}, k {k} and v {v}, giving {y}")

    @property
    def groups(self) -> int:
        return self.q.height // self.rows[0]

    @property
    def depth(self) -> int:
        """Channels of a head in q and k."""
        return self.q.channels // self.heads

    @property
    def width(self) -> int:
        """Channels of a head in v and y."""
        return self.v.channels // self.heads

    @property
    def tokens(self) -> tuple[int, int]:
        """Of a group: (queries, keys)."""
        return self.rows[0] * self.q.width, self.rows[1] * self.k.width

    @property
    def sums_elems(self) -> int:
        return self.q.slices * self.heads * self.q.height * self.q.width * self.q.vector


@dataclass(frozen=True, slots=True)
class AttentionBackward:
    """Kernel "attention.backward": dy (dy.elems,), q, k, v, y, sums as the forward kernel has them, and dq (dq.elems,),
    dk (dk.elems,), dv (dv.elems,), each as far as it is.

    accumulate  (dq +=, dk +=, dv +=) instead
    """

    forward: Attention
    dy: Image
    dq: Image | None
    dk: Image | None
    dv: Image | None
    accumulate: tuple[bool, bool, bool] = (False, False, False)


def _grouped(array: np.ndarray, heads: int, rows: int) -> np.ndarray:
    """(heads, groups, tokens, channels of a head, N) in float64 of (C, H, W, N)."""
    channels, height, width, batch = array.shape
    cut = array.astype(np.float64).reshape(heads, channels // heads, height // rows, rows * width, batch)
    return cut.transpose(0, 2, 3, 1, 4)


def _image(array: np.ndarray, image: Image) -> np.ndarray:
    """(C, H, W, N) of (heads, groups, tokens, channels of a head, N)."""
    return array.transpose(0, 3, 1, 2, 4).reshape(image.channels, image.height, image.width, -1)


def _probabilities(problem: Attention, q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((heads, groups, queries, keys, N), sums (heads, groups, queries, N))."""
    scores = np.einsum("hgqcn,hgkcn->hgqkn", q, k) * problem.scale
    if problem.causal:
        queries, keys = problem.tokens
        scores[:, :, np.tri(queries, keys) == 0] = -np.inf
    with np.errstate(invalid="ignore"):
        most = scores.max(3, keepdims=True)
        sums = most + np.log(np.exp(scores - most).sum(3, keepdims=True))
        return np.exp(scores - sums), sums[:, :, :, 0]


def forward_reference(problem: Attention, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(y (C, H, W, N), sums (heads, H, W, N)) in float64."""
    (queries, keys), heads = problem.rows, problem.heads
    shares, sums = _probabilities(problem, _grouped(q, heads, queries), _grouped(k, heads, keys))
    y = np.einsum("hgqkn,hgkcn->hgqcn", shares, _grouped(v, heads, keys))
    return _image(y, problem.y), sums.reshape(heads, problem.q.height, problem.q.width, -1)


def backward_reference(
    problem: Attention, dy: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dq, dk, dv) (C, H, W, N) in float64."""
    (queries, keys), heads = problem.rows, problem.heads
    q, k, v, dy = (_grouped(array, heads, rows) for array, rows in ((q, queries), (k, keys), (v, keys), (dy, queries)))
    shares, _ = _probabilities(problem, q, k)
    dshares = np.einsum("hgqcn,hgkcn->hgqkn", dy, v)
    dscores = shares * (dshares - (shares * dshares).sum(3, keepdims=True)) * problem.scale
    return (
        _image(np.einsum("hgqkn,hgkcn->hgqcn", dscores, k), problem.q),
        _image(np.einsum("hgqkn,hgqcn->hgkcn", dscores, q), problem.k),
        _image(np.einsum("hgqkn,hgqcn->hgkcn", shares, dy), problem.v),
    )


@operator("attention")
class AttentionOperator(Operator):
    """Inputs: q, k and v. attrs: heads, scale, rows, causal (only if it is)."""

    def forward(self, node: Node, low: Trace) -> None:
        q, k, v = (low.value(name) for name in node.inputs)
        y = low.output(node)
        problem = Attention(q.image, k.image, v.image, y.image, **node.attrs)
        low.call("attention.forward", problem, q, k, v, y, low.temporary(f"{node.name}.sums", problem.sums_elems))

    def backward(self, node: Node, low: Trace) -> None:
        wanted = [low.needs_gradient(name) for name in node.inputs]
        if not any(wanted):
            return
        dy, y = low.gradient(node), low.value(node.name)
        q, k, v = (low.value(name) for name in node.inputs)
        results: list[Activation | None] = []
        accumulate: list[bool] = []
        later: list[tuple[Activation, Activation]] = []
        for name, role, needed in zip(node.inputs, ("dq", "dk", "dv"), wanted, strict=True):
            buffer, more = low.contribute(name) if needed else (None, False)
            if buffer in results and buffer is not None:  # one value in two places: its second part goes aside
                aside = low.scratch(f"{node.name}.{role}", buffer.image)
                later.append((aside, buffer))
                buffer, more = aside, False
            results.append(buffer)
            accumulate.append(more)
        dq, dk, dv = (one.image if one else None for one in results)
        forward = Attention(q.image, k.image, v.image, y.image, **node.attrs)
        problem = AttentionBackward(forward, dy.image, dq, dk, dv, tuple(accumulate))  # type: ignore[arg-type]
        sums = low.temporary(f"{node.name}.sums", forward.sums_elems)
        low.call("attention.backward", problem, dy, q, k, v, y, sums, *(one for one in results if one))
        for aside, buffer in later:
            low.call("image.copy", ImageCopy(aside.image, buffer.image, True), aside, buffer)

    def onnx(self, node: Node, writer: Writer) -> str:
        """Two products and a softmax between them, of (N, heads, groups, tokens, channels of a head)."""
        heads, rows = node.attrs["heads"], node.attrs["rows"]
        turned, shapes = [], []
        for value, count, order in zip(writer.inputs(node), (rows[0], rows[1], rows[1]), "qkv", strict=True):
            channels, height, width = (int(size) for size in writer.sizes[value][0][1:])
            sizes = node.shape[0], heads, channels // heads, height // count, count * width
            cut = writer.constant(np.array((-1, *sizes[1:])), "heads and groups")
            perm = (0, 1, 3, 2, 4) if order == "k" else (0, 1, 3, 4, 2)
            shapes.append(tuple(sizes[place] for place in perm))
            value = writer.call("Reshape", [value, cut], sizes)
            turned.append(writer.call("Transpose", [value], shapes[-1], perm=perm))
        scores, result = (*shapes[0][:4], shapes[1][4]), (*shapes[0][:4], shapes[2][4])
        value = writer.call("MatMul", turned[:2], scores)
        value = writer.call("Mul", [value, writer.number(node.attrs["scale"])], scores)
        if node.attrs.get("causal"):
            hidden = np.where(np.tri(scores[3], scores[4]) == 0, -np.inf, 0).astype(np.float32)
            value = writer.call("Add", [value, writer.constant(hidden, "causal")], scores)
        value = writer.call("Softmax", [value], scores, axis=-1)
        value = writer.call("MatMul", [value, turned[2]], result)
        turned_back = tuple(result[place] for place in (0, 1, 4, 2, 3))
        value = writer.call("Transpose", [value], turned_back, perm=(0, 1, 4, 2, 3))
        whole = writer.constant(np.array((-1, *node.shape[1:])), "image")
        return writer.call("Reshape", [value, whole], node.shape)


def attention(reader: Reader, q: Any, k: Any, v: Any, scale: float, causal: bool = False) -> Any:
    """The attention of activations (..., tokens, channels of a head), whose axes before these are examples, heads and
    groups. Raises UnsupportedOperator."""
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
    shape = images[0].shape[0], count * width, *images[0].shape[2:]
    made = reader.add("attention", tuple(images), shape, attrs=attrs)
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
    q, k = reader.seen(a), reader.seen(b)
    rank = len(k.shape)
    turned = reader.arrangement(k).permuted((*range(rank - 2), rank - 1, rank - 2))
    if rank < 3 or q.shape[:-2] != k.shape[:-2]:
        raise reader.error(f"matmul of {q.shape} and {k.shape}")
    keys = (Part("K", k.shape[-1], 1),)
    axes = Arrangement((*reader.arrangement(q).axes[:-1], keys))
    return Scores(q, reader.viewed(reader.bare(k), turned), 1.0, axes)


def _attended(reader: Reader, shares: Scores, v: Any) -> Any:
    q, k = shares.q, shares.k
    mine = [part for axis in shares.arrangement.axes for part in axis]
    straight = [part for axis in reader.arrangement(q).axes[:-1] for part in axis]
    ends = shares.arrangement.axes[-1] == (Part("K", k.shape[-2], 1),)
    if not shares.shares or not ends or merged(mine[:-1]) != merged(straight):
        raise reader.error(f"matmul of {shares.shape} and {v.shape}, which is no attention,")
    outer = tuple(v.shape[:-2])
    q, k = (reader.reshaped(one, (*outer, *one.shape[-2:])) for one in (q, k))
    return attention(reader, q, k, v, shares.scale)


def scaled(reader: Reader, name: str, a: Any, b: Any) -> Scores:
    """Scores times a number. Raises UnsupportedOperator."""
    scores, other = (a, b) if isinstance(a, Scores) else (b, a)
    number = other.number if isinstance(other, Fixed) else None
    if number is None or scores.shares or name not in ("multiply", "divide") or (name == "divide" and scores is b):
        raise reader.error(f"{reader.name or name} of attention's scores and what is no number")
    return replace(scores, scale=scores.scale * number if name == "multiply" else scores.scale / number)


@reads("relax.nn.softmax")
def read_softmax(reader: Reader, call: Any, arguments: list) -> Any:
    """Of attention's scores, over the keys."""
    scores = arguments[0]
    if not isinstance(scores, Scores) or int(call.attrs.axis) not in (-1, len(scores.shape) - 1):
        raise reader.error(reader.called)
    return replace(scores, shares=True)

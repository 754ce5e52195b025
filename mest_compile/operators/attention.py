"""Scaled dot product attention: softmax(q k^T scale) v, head by head.

Heads are parts of the channels, tokens are pixels, and the rows of an image may be groups of tokens (windows) that see
each other alone. Probabilities, one a query and key, are never kept: of each query the logarithm of the sum of its
exponentials is, and the backward pass computes them again. Source: Dao et al., "FlashAttention", arXiv:2205.14135.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np

from mest_compile.base.errors import SpecError
from mest_compile.frontend.onnx_writer import Writer
from mest_compile.ir.graph import Node
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.problem import SIZE
from mest_compile.ir.program import Activation
from mest_compile.operators.attention_bias import bias_buffers, bias_constants, table_gradient, write_bias
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
    bias    (heads or 1, groups or 1): kernels then have, before y, what is added to scores, `bias_elems` float32: a
            number for each of these and each query and key; one head or group stands for all
    """

    q: Image
    k: Image
    v: Image
    y: Image
    heads: int = field(metadata=SIZE)
    scale: float
    rows: tuple[int, int] = (1, 1)
    causal: bool = False
    bias: tuple[int, int] | None = None

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
    def bias_elems(self) -> int:
        return prod((*self.bias, *self.tokens)) if self.bias else 0

    @property
    def sums_elems(self) -> int:
        return self.q.slices * self.heads * self.q.height * self.q.width * self.q.vector


@dataclass(frozen=True, slots=True)
class AttentionBackward:
    """Kernel "attention.backward": dy (dy.elems,), q, k, v, y, sums as the forward kernel has them, and dq (dq.elems,),
    dk (dk.elems,), dv (dv.elems,), dscores (slices * heads * groups * queries * keys,) float32, each as far as it is.

    accumulate  (dq +=, dk +=, dv +=) instead
    biased      dscores is: the gradients of biased scores, summed over the examples of a slice
    """

    forward: Attention
    dy: Image
    dq: Image | None
    dk: Image | None
    dv: Image | None
    accumulate: tuple[bool, bool, bool] = (False, False, False)
    biased: bool = False

    @property
    def dscores_elems(self) -> int:
        forward = self.forward
        return prod((forward.q.slices, forward.heads, forward.groups, *forward.tokens))


def _grouped(array: np.ndarray, heads: int, rows: int) -> np.ndarray:
    """(heads, groups, tokens, channels of a head, N) in float64 of (C, H, W, N)."""
    channels, height, width, batch = array.shape
    cut = array.astype(np.float64).reshape(heads, channels // heads, height // rows, rows * width, batch)
    return cut.transpose(0, 2, 3, 1, 4)


def _image(array: np.ndarray, image: Image) -> np.ndarray:
    """(C, H, W, N) of (heads, groups, tokens, channels of a head, N)."""
    return array.transpose(0, 3, 1, 2, 4).reshape(image.channels, image.height, image.width, -1)


def _probabilities(
    problem: Attention, q: np.ndarray, k: np.ndarray, bias: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """((heads, groups, queries, keys, N), sums (heads, groups, queries, N))."""
    scores = np.einsum("hgqcn,hgkcn->hgqkn", q, k) * problem.scale
    if problem.bias and bias is not None:
        scores += bias.reshape(*problem.bias, *problem.tokens, 1)
    if problem.causal:
        queries, keys = problem.tokens
        scores[:, :, np.tri(queries, keys) == 0] = -np.inf
    with np.errstate(invalid="ignore"):
        most = scores.max(3, keepdims=True)
        sums = most + np.log(np.exp(scores - most).sum(3, keepdims=True))
        return np.exp(scores - sums), sums[:, :, :, 0]


def forward_reference(
    problem: Attention, q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(y (C, H, W, N), sums (heads, H, W, N)) in float64; bias flat."""
    (queries, keys), heads = problem.rows, problem.heads
    shares, sums = _probabilities(problem, _grouped(q, heads, queries), _grouped(k, heads, keys), bias)
    y = np.einsum("hgqkn,hgkcn->hgqcn", shares, _grouped(v, heads, keys))
    return _image(y, problem.y), sums.reshape(heads, problem.q.height, problem.q.width, -1)


def backward_reference(
    problem: Attention, dy: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(dq, dk, dv (C, H, W, N), dscores (heads, groups, queries, keys, N)) in float64."""
    (queries, keys), heads = problem.rows, problem.heads
    q, k, v, dy = (_grouped(array, heads, rows) for array, rows in ((q, queries), (k, keys), (v, keys), (dy, queries)))
    shares, _ = _probabilities(problem, q, k, bias)
    dshares = np.einsum("hgqcn,hgkcn->hgqkn", dy, v)
    dscores = shares * (dshares - (shares * dshares).sum(3, keepdims=True))
    return (
        _image(np.einsum("hgqkn,hgkcn->hgqcn", dscores * problem.scale, k), problem.q),
        _image(np.einsum("hgqkn,hgqcn->hgkcn", dscores * problem.scale, q), problem.k),
        _image(np.einsum("hgqkn,hgqcn->hgkcn", shares, dy), problem.v),
        dscores,
    )


@operator("attention")
class AttentionOperator(Operator):
    """Inputs: q, k and v; params: bias?, a table; attrs: heads, scale, rows, causal (only if it is), and what
    `attention_bias.Bias` has of a bias (only if there is one)."""

    def constants(self, node: Node) -> dict[str, np.ndarray]:
        return bias_constants(node)

    def forward(self, node: Node, low: Trace) -> None:
        q, k, v = (low.value(name) for name in node.inputs)
        y = low.output(node)
        problem = _problem(node, q.image, k.image, v.image, y.image)
        sums = low.temporary(f"{node.name}.sums", problem.sums_elems)
        low.call("attention.forward", problem, q, k, v, *bias_buffers(node, low, "forward"), y, sums)

    def backward(self, node: Node, low: Trace) -> None:
        wanted, trained = [low.needs_gradient(name) for name in node.inputs], low.trains(node, "bias")
        if not any(wanted) and not trained:
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
        forward = _problem(node, q.image, k.image, v.image, y.image)
        problem = AttentionBackward(forward, dy.image, dq, dk, dv, tuple(accumulate), trained)  # type: ignore[arg-type]
        sums = low.temporary(f"{node.name}.sums", forward.sums_elems)
        dscores = [low.temporary(f"{node.name}.dscores", problem.dscores_elems)] if trained else []
        buffers = (dy, q, k, v, *bias_buffers(node, low, "backward"), y, sums, *(one for one in results if one))
        low.call("attention.backward", problem, *buffers, *dscores)
        for aside, buffer in later:
            low.call("image.copy", ImageCopy(aside.image, buffer.image, True), aside, buffer)
        if trained:
            table_gradient(node, low, (forward.q.slices, forward.heads, forward.groups), dscores[0])

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
        if "bias" in node.attrs:
            value = writer.call("Add", [value, write_bias(node, writer)], scores)
        if node.attrs.get("causal"):
            hidden = np.where(np.tri(scores[3], scores[4]) == 0, -np.inf, 0).astype(np.float32)
            value = writer.call("Add", [value, writer.constant(hidden, "causal")], scores)
        value = writer.call("Softmax", [value], scores, axis=-1)
        value = writer.call("MatMul", [value, turned[2]], result)
        turned_back = tuple(result[place] for place in (0, 1, 4, 2, 3))
        value = writer.call("Transpose", [value], turned_back, perm=(0, 1, 4, 2, 3))
        whole = writer.constant(np.array((-1, *node.shape[1:])), "image")
        return writer.call("Reshape", [value, whole], node.shape)


def _problem(node: Node, q: Image, k: Image, v: Image, y: Image) -> Attention:
    sizes = node.attrs["bias"][:2] if "bias" in node.attrs else None
    how = {name: node.attrs[name] for name in ("heads", "scale", "rows", "causal") if name in node.attrs}
    return Attention(q, k, v, y, **how, bias=sizes)

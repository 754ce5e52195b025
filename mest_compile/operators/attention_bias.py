"""What is added to an attention's scores: constants, such as masks, and numbers picked from a table that is learned.

Kernels read it as a number for each head, group, query and key (or one for all heads, or all groups). Where there is a
table it is put together in every pass, and the table's gradient is a sum over all places that a number was picked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from mest_compile.frontend.onnx_writer import Writer
from mest_compile.frontend.relax_graph import Reader
from mest_compile.frontend.values import Picked
from mest_compile.ir.arrangement import Arrangement, Axis, Part, size_of
from mest_compile.ir.graph import Node
from mest_compile.ir.problem import SIZE
from mest_compile.ir.program import Buffer
from mest_compile.operators.operator import Trace

Sizes = tuple[int, int, int, int]  # heads, groups, queries, keys
HIDDEN = float(np.finfo(np.float32).min)  # in the place of -inf, which JSON does not have


@dataclass(frozen=True, slots=True)
class AttentionBias:
    """Kernel "attention.bias": table (table,), places (queries * keys,) int32, mask if `mask`, bias (heads, groups,
    queries, keys), all flat: that of a head, query and key is the table's number at its place, each head's `apart`
    behind the last one's, plus the mask's.

    mask  its (heads or 1, groups or 1), before queries and keys; None: there is none
    """

    table: int = field(metadata=SIZE)
    sizes: Sizes
    apart: int
    mask: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class AttentionTable:
    """Kernel "attention.table": dscores (slices, heads, groups, queries, keys), order (heads * pairs,) int32, firsts
    (table + 1,) int32, dtable (table,), all flat: the sum of dscores over slices, groups and those pairs of a query and
    a key, numbered head by head, that `order` has from one of an element's `firsts` to the next."""

    table: int = field(metadata=SIZE)
    slices: int = field(metadata=SIZE)
    heads: int = field(metadata=SIZE)
    groups: int = field(metadata=SIZE)
    pairs: int = field(metadata=SIZE)


def bias_reference(
    problem: AttentionBias, table: np.ndarray, places: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """(heads, groups, queries, keys) in float64."""
    heads, _, *pair = problem.sizes
    picked = table.astype(np.float64)[
        places.reshape(1, 1, *pair) + np.arange(heads).reshape(-1, 1, 1, 1) * problem.apart
    ]
    added = 0 if problem.mask is None or mask is None else mask.reshape(*problem.mask, *pair)
    return np.broadcast_to(picked + added, problem.sizes)


def table_reference(problem: AttentionTable, dscores: np.ndarray, order: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """(table,) in float64."""
    shape = problem.slices, problem.heads, problem.groups, problem.pairs
    each = dscores.astype(np.float64).reshape(shape).sum((0, 2)).ravel()
    return np.array([each[order[first:end]].sum() for first, end in pairwise(firsts)])


def spread(
    reader: Reader, biases: Sequence[Any], axes: tuple[Axis | list[Part], ...], batch: int, keys: int, attrs: dict
) -> dict[str, str]:
    """Sets `bias` and what else `attrs` has of what is added to scores; returns the parameters.

    biases  as Scores has them
    axes    parts of heads, of groups and of queries where q lies
    Raises UnsupportedOperator.

    attrs: bias (heads, groups, queries, keys); mask and mask_sizes, constants, only if there are some; places, of each
    query and key in the table, apart, how far a head's are from the last one's, and table, its size, only if there is
    one.
    """
    sizes = *(size_of(tuple(axis)) for axis in axes), keys
    mask, table, where = np.zeros((1, 1, *sizes[2:])), "", np.zeros((1, 1, *sizes[2:]), int)
    for arrangement, held in biases:
        if isinstance(held, Picked):
            if table:
                raise reader.error(f"scores to which both {table} and {held.name} are added,")
            table, where = held.name, _laid(reader, arrangement, held.places, axes, batch, keys)
            if held.added is not None:
                mask = mask + _laid(reader, arrangement, held.added, axes, batch, keys)
        else:
            mask = mask + _laid(reader, arrangement, held.array, axes, batch, keys)
    heads, groups = (max(one) for one in zip(mask.shape[:2], where.shape[:2], strict=True))
    attrs["bias"] = (heads, groups, *sizes[2:])
    if mask.any():
        floats = np.maximum(mask, HIDDEN).astype(np.float32)
        attrs |= {"mask": tuple(map(float, floats.ravel())), "mask_sizes": mask.shape[:2]}
    elif not table:
        attrs["mask"], attrs["mask_sizes"] = (0.0,) * mask.size, mask.shape[:2]
    if not table:
        return {}
    apart = int(where[1, 0, 0, 0] - where[0, 0, 0, 0]) if len(where) > 1 else 0
    first = where[:1]
    if where.shape[1] > 1 or not np.array_equal(first + np.arange(len(where)).reshape(-1, 1, 1, 1) * apart, where):
        raise reader.error(f"numbers of {table}, picked otherwise for each head or group,")
    elems = prod(reader.state_shapes[table])
    attrs |= {"places": tuple(map(int, first.ravel())), "apart": apart, "table": elems}
    return {"bias": table}


def _laid(
    reader: Reader,
    arrangement: Arrangement,
    array: np.ndarray,
    axes: tuple[Axis | list[Part], ...],
    batch: int,
    keys: int,
) -> np.ndarray:
    """(heads or 1, groups or 1, queries, keys) of numbers that are spread over those axes."""
    array = array.reshape((1,) * (len(arrangement.axes) - array.ndim) + array.shape)
    parts = [part for axis in axes for part in axis]
    places = dict(zip(parts, np.indices([part.size for part in parts], sparse=True), strict=True)) if parts else {}
    at: dict[str, Any] = dict.fromkeys("CHW", 0)
    for part, place in places.items():
        at[part.dim] = at[part.dim] + place * part.stride
    shape = tuple(size_of(tuple(axis)) for axis in axes)

    def of(example: int) -> np.ndarray:
        index: list[Any] = []
        for axis, size in zip(arrangement.axes[:-1], array.shape[:-1], strict=True):
            place: Any = np.zeros((), int)
            for part in axis if size > 1 else ():
                here = example if part.dim == "N" else at[part.dim]
                place = place * part.size + here // part.stride % part.size
            index.append(place)
        found = np.broadcast_arrays(*index, *places.values())[: len(index)] if index else []
        chosen = array[tuple(found)] if found else array
        return np.broadcast_to(chosen.reshape(*shape, -1), (*shape, keys))

    found = of(0)
    varies = any(
        size > 1 and any(part.dim == "N" for part in axis)
        for axis, size in zip(arrangement.axes, array.shape, strict=True)
    )
    if varies and not all(np.array_equal(of(example), found) for example in range(1, batch)):
        raise reader.error("scores to which something else is added for each example,")
    for axis in (0, 1):
        first = found.take([0], axis)
        found = first if (found == first).all() else found
    return found


def _held(node: Node, what: str) -> str:
    return f"{node.name}:{what}"


def bias_constants(node: Node) -> dict[str, np.ndarray]:
    """{held buffer: what it holds}."""
    found: dict[str, np.ndarray] = {}
    attrs = node.attrs
    if "mask" in attrs:
        found[_held(node, "mask")] = np.array(attrs["mask"], np.float32)
    if "places" in attrs:
        places = np.array(attrs["places"], np.int32)
        every = np.concatenate([places + head * attrs["apart"] for head in range(attrs["heads"])])
        found[_held(node, "places")] = places
        found[_held(node, "order")] = np.argsort(every, kind="stable").astype(np.int32)
        counts = np.bincount(every, minlength=attrs["table"])
        found[_held(node, "firsts")] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return found


def bias_buffers(node: Node, low: Trace, phase: str) -> list[Buffer]:
    """What kernels read as the bias: nothing where there is none."""
    attrs = node.attrs
    if "bias" not in attrs:
        return []
    held = [low.hold(_held(node, "mask"), len(attrs["mask"]), "batch")] if "mask" in attrs else []
    if "places" not in attrs:
        return held
    table, sizes = low.parameter(node, "bias"), attrs["bias"]
    made = low.temporary(f"{node.name}.{phase} bias", prod(sizes))
    places = low.hold(_held(node, "places"), len(attrs["places"]), "batch", "int32")
    problem = AttentionBias(attrs["table"], sizes, attrs["apart"], attrs.get("mask_sizes"))
    low.call("attention.bias", problem, table, places, *held, made)
    return [made]


def table_gradient(node: Node, low: Trace, sizes: tuple[int, int, int], dscores: Buffer) -> None:
    """sizes: slices, heads, groups."""
    gradient = low.parameter_gradient(node, "bias")
    pairs, elems = len(node.attrs["places"]), node.attrs["table"]
    order = low.hold(_held(node, "order"), sizes[1] * pairs, "batch", "int32")
    firsts = low.hold(_held(node, "firsts"), elems + 1, "batch", "int32")
    low.call("attention.table", AttentionTable(elems, *sizes, pairs), dscores, order, firsts, gradient)


def write_bias(node: Node, writer: Writer) -> str:
    """The name of what is added, (heads or 1, groups or 1, queries, keys), in an ONNX graph."""
    attrs, names = node.attrs, []
    pair = attrs["bias"][2:]
    if "mask" in attrs:
        mask = np.array(attrs["mask"], np.float32).reshape(*attrs["mask_sizes"], *pair)
        names.append(writer.constant(mask, "mask"))
    if "places" in attrs:
        heads = attrs["heads"] if attrs["apart"] else 1
        places = np.array(attrs["places"]).reshape(1, 1, *pair) + np.arange(heads).reshape(-1, 1, 1, 1) * attrs["apart"]
        flat = writer.shaped(node.params["bias"], (-1,))
        found = writer.call("Gather", [flat, writer.constant(places, "places")], (), axis=0)
        writer.sizes[found] = places.shape, "float"
        names.append(found)
    if len(names) == 1:
        return names[0]
    total = writer.call("Add", names, ())
    writer.sizes[total] = attrs["bias"], "float"
    return total

"""The pattern_groups family: a unit is a whole kernel, and the units of a row are sorted by the shape of their pattern."""

from __future__ import annotations

import numpy as np

from mest_compile.operators.family import problem_of
from mest_compile.operators.gather import GatherGrad
from mest_compile.operators.gather_layer import GatherFamily, forward_problem, gradient_problem
from mest_compile.operators.pattern_groups import GroupedConv, GroupedGrad, Shape, shape_of
from mest_compile.registry import family
from mest_compile.sparsity.packing import LayerIndex, by_place, forward_places, pointers_of, transposed_places
from mest_compile.sparsity.schemes.pattern import PATTERNS


def _shapes() -> tuple[tuple[Shape, ...], dict[bytes, int]]:
    """(the shapes of all patterns, {pattern's bytes: its shape's number}). Turned by half a circle, as the input gradient sees it, a
    pattern of two pairs has its own shape again.
    """
    of = {pattern.tobytes(): shape_of(np.argwhere(pattern)) for pattern in PATTERNS}
    assert all(shape_of(np.argwhere(pattern[::-1, ::-1])) == of[pattern.tobytes()] for pattern in PATTERNS)
    shapes = tuple(sorted(set(of.values())))
    return shapes, {pattern: shapes.index(shape) for pattern, shape in of.items()}


SHAPES, _NUMBER = _shapes()
TAPS = len(SHAPES[0])
_TURNS = np.array([_NUMBER[pattern.tobytes()] for pattern in PATTERNS])


@family("pattern_groups")
class PatternGroupsFamily(GatherFamily):
    """The gather with one offset for the taps of a whole kernel, whose places are constants of the code. Stride 1 only."""

    def convolve(self, layer, source, result, bias, statistics, low, name):
        problem = GroupedConv(forward_problem(layer, source.image, result.image, bool(bias), bool(statistics)), SHAPES)
        low.call("pattern_groups.conv", problem, *self._runs(layer, problem, low), self.hold(layer, low, "", "values"), *bias, source,
                 result, *statistics, name=name)

    def grad_weight(self, layer, source, delta, gradients, low, name):
        problem = GroupedGrad(GatherGrad(source.image, delta.image, 1, 1, layer.spec.stride, layer.section_channels), SHAPES)
        low.call("pattern_groups.grad", problem, *self._runs(layer, problem, low), source, delta, gradients, name=name)

    def grad_input(self, layer, delta, target, accumulate, low, name):
        problem = GroupedConv(gradient_problem(layer, delta.image, target.image, accumulate), SHAPES)
        low.call("pattern_groups.conv", problem, *self._runs(layer, problem, low, "transposed_"),
                 self.hold(layer, low, "transposed", "values"), delta, target, name=name)

    def index(self, layer, keep, program):
        forward = problem_of(program, layer, "pattern_groups.conv", "pointers")
        backward = problem_of(program, layer, "pattern_groups.conv", "transposed_pointers")
        assert forward is not None, f"{layer.spec.name} is not in program {program.name}"
        row, channel = np.nonzero(keep.any((2, 3)))
        taps = np.flatnonzero(keep).reshape(-1, TAPS)  # of each live kernel, in reading order
        first, last = (np.unravel_index(taps[:, which], keep.shape)[2:] for which in (0, -1))
        shape = _TURNS[(keep[row, channel][:, None] == PATTERNS).all((2, 3)).argmax(1)]
        cell, offsets = forward_places(layer.spec, forward.gather, row, channel, *first)
        run = cell * len(SHAPES) + shape
        sort = by_place(run, offsets)
        arrays = {"pointers": pointers_of(run, forward.runs), "offsets": offsets[sort].astype(np.int32)}
        order = taps[sort].ravel()
        if backward is None:
            return LayerIndex(order, arrays)

        row, channel, shape, last = row[sort], channel[sort], shape[sort], tuple(axis[sort] for axis in last)
        cell, offsets = transposed_places(layer.spec, backward.gather, channel, row, *last)
        run = cell * len(SHAPES) + shape
        sort = by_place(run, offsets)
        place = np.empty(len(sort), np.int32)
        place[sort] = np.arange(len(sort), dtype=np.int32)
        return LayerIndex(order, arrays | {
            "transposed_pointers": pointers_of(run, backward.runs), "transposed_offsets": offsets[sort].astype(np.int32),
            "permutation": (place[:, None] * TAPS + np.arange(TAPS)[::-1]).astype(np.int32).ravel()})

    def index_elems(self, layer, part, cells):
        return cells if part == "permutation" else cells // TAPS

    def _runs(self, layer, problem, low, prefix=""):
        return (self.hold(layer, low, f"{prefix}pointers", "indices", problem.runs + 1),
                self.hold(layer, low, f"{prefix}offsets", "indices"))

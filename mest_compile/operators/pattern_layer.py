"""The pattern family: units of two neighbouring taps in a row, which is what the scheme's patterns are made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mest_compile.operators.family import problem_of
from mest_compile.operators.gather import GatherGrad
from mest_compile.operators.gather_layer import GatherFamily, forward_problem, gradient_problem
from mest_compile.registry import family
from mest_compile.sparsity.packing import LayerIndex, by_place, forward_places, pointers_of, transposed_places

PAIR = 2


@family("pattern")
class PatternFamily(GatherFamily):
    """The gather with one offset for two taps: half the index, and pixels that both taps read are loaded once. Stride 1 only, where
    the input gradient's taps are neighbours as well, in reverse.
    """

    def convolve(self, layer, source, result, bias, statistics, low, name):
        problem = replace(forward_problem(layer, source.image, result.image, bool(bias), bool(statistics)), taps=PAIR)
        low.call("pattern.conv", problem, *self._index(layer, problem, low), self.hold(layer, low, "", "values"), *bias, source, result,
                 *statistics, name=name)

    def grad_weight(self, layer, source, delta, gradients, low, name):
        problem = GatherGrad(source.image, delta.image, 1, 1, layer.spec.stride, layer.section_channels, taps=PAIR)
        low.call("pattern.grad", problem, *self._index(layer, problem, low), source, delta, gradients, name=name)

    def grad_input(self, layer, delta, target, accumulate, low, name):
        problem = replace(gradient_problem(layer, delta.image, target.image, accumulate), taps=PAIR)
        low.call("pattern.conv", problem, *self._index(layer, problem, low, "transposed_"), self.hold(layer, low, "transposed", "values"),
                 delta, target, name=name)

    def index(self, layer, keep, program):
        forward = problem_of(program, layer, "pattern.conv", "pointers")
        backward = problem_of(program, layer, "pattern.conv", "transposed_pointers")
        assert forward is not None, f"{layer.spec.name} is not in program {program.name}"
        first = keep.copy()
        first[..., 1:] &= ~keep[..., :-1]  # the left tap of every pair
        unit = np.flatnonzero(first)
        row, channel, y, x = np.unravel_index(unit, keep.shape)
        cell, offsets = forward_places(layer.spec, forward, row, channel, y, x)
        sort = by_place(cell, offsets)
        unit, row, channel, y, x = (array[sort] for array in (unit, row, channel, y, x))
        order = (unit[:, None] + np.arange(PAIR)).ravel()
        arrays = {"pointers": pointers_of(cell, forward.cells), "offsets": offsets[sort].astype(np.int32)}
        if backward is None:
            return LayerIndex(order, arrays)

        cell, offsets = transposed_places(layer.spec, backward, channel, row, y, x + PAIR - 1)
        sort = by_place(cell, offsets)
        place = np.empty(len(sort), np.int32)
        place[sort] = np.arange(len(sort), dtype=np.int32)
        return LayerIndex(order, arrays | {
            "transposed_pointers": pointers_of(cell, backward.cells), "transposed_offsets": offsets[sort].astype(np.int32),
            "permutation": (place[:, None] * PAIR + np.arange(PAIR)[::-1]).astype(np.int32).ravel()})

    def index_elems(self, layer, part, cells):
        return cells if part == "permutation" else cells // PAIR

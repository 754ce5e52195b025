"""Kernels with a structure baked in against their float64 references, over random sizes. Pointers and numbers of live
groups that they are given say that there is nothing: whoever reads them is found out.
"""

import numpy as np
import pytest
from test_compact import SHAPES, check_gradient_of_live_rows, check_live_rows
from test_gather import Index, check_conv, check_grad, random_problem

from mest_compile.kernels.specializing import Structure, structure_of
from mest_compile.operators.layers.gather import GatherConv


def even_index(rng: np.random.Generator, full: Index, conv: GatherConv) -> Index:
    """Of all units some of every section, as many in each of its groups; the last section may have another number of
    them."""
    units = np.diff(full.pointers).reshape(conv.sections, conv.groups)
    counts = np.repeat(
        [rng.integers(1, units[:-1].min(initial=units.min()) + 1), rng.integers(1, units[-1].min() + 1)],
        [conv.sections - 1, 1],
    )
    offsets = [
        np.sort(rng.choice(run, counts[cell // conv.groups], replace=False))
        for cell, run in enumerate(np.split(full.offsets, full.pointers[1:-1]))
    ]
    return Index(
        np.concatenate([[0], np.repeat(counts, conv.groups).cumsum()]).astype(np.int32), np.concatenate(offsets)
    )


@pytest.mark.parametrize("seed", range(16))
def test_units_of_random_sizes(builder, seed):
    taps = (1, 1, 2, 3)[seed % 4]
    conv, grad, full = random_problem(seed, taps, live=1.0)
    rng = np.random.default_rng(seed)
    index = even_index(rng, full, conv)
    structure = structure_of(conv, index.pointers)
    print("seed", seed, conv, structure)
    assert isinstance(structure, Structure) and structure == structure_of(grad, index.pointers)
    check_conv(builder, conv, index, rng, structure=structure)
    check_grad(builder, grad, index, rng, structure=structure)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("step", [(1, 1), (2, 1)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_live_rows(builder, shape, step, accumulate):
    check_live_rows(builder, shape, step, accumulate, baked=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_gradient_of_live_rows(builder, shape):
    check_gradient_of_live_rows(builder, shape, baked=True)

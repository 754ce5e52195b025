"""Decisions about listed units and cells, told as masks."""

import numpy as np

from mest_compile.sparsity import mutation


def prune(keep, scores, live, rng):
    """keep (units,) bool, scores (units,): a copy of `keep` in which `live` units stay."""
    alive, kept = np.flatnonzero(keep), np.zeros_like(keep)
    kept[alive[mutation.prune(scores[alive], live, keep.size, rng)]] = True
    return kept


def grow(keep, live, rng, scores=None):
    """A copy of `keep` with `live` units alive."""
    grown = keep.copy()
    grown[mutation.grow(np.flatnonzero(keep), keep.size, live, rng, scores)] = True
    return grown


def prune_grid(scheme, layer, keep, energy, live, rng):
    """The same of a scheme's grid."""
    cells, kept = np.flatnonzero(keep), np.zeros(keep.shape, bool)
    kept.ravel()[cells[scheme.prune(layer, cells, energy.ravel()[cells], live, rng)[0]]] = True
    return kept


def grow_grid(scheme, layer, keep, live, rng, energy=None):
    grown = keep.copy()
    dead = np.flatnonzero(~keep.any((1, 2, 3)))
    grown.ravel()[scheme.grow(layer, np.flatnonzero(keep), live, rng, energy, dead)] = True
    return grown


def survivors(weights, masks, after, grown):
    """{weight name: bool}: which weights live before and after a mutation and were kept. {name: array} of weights and
    masks, before and after; no live weight was 0 before, so that those that died and were drawn again differ.
    """
    return {name: masks[name] & mask & (after[name] == weights[name]) for name, mask in grown.items()}


def assert_starts(weights, mask, stay):
    """New weights are 0, but for those in filters of which none stays: of these none is."""
    revived = mask & ~stay.any(tuple(range(1, mask.ndim)), keepdims=True)
    assert weights[revived].all() and not weights[mask & ~stay & ~revived].any()
    return revived

"""How much sparsity each layer gets, so that all sparse layers together have the sparsity asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mest_compile.base.errors import SparsityError, UnknownName
from mest_compile.ir.graph import LayerSpec

DIGITS = 6  # of a sparsity that was computed: 0.9 - 0.05 is to read 0.85
ROUNDING = 1e-9  # densities this close to 1 are 1: sums of so many terms are no more exact


def uniform(layers: Sequence[LayerSpec], sparsity: float) -> dict[str, float]:
    """The same sparsity in every layer. Source: MEST."""
    return {layer.name: sparsity for layer in layers}


def erk(layers: Sequence[LayerSpec], sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel: density in proportion to (out + in + kh + kw) / (out * in * kh * kw); layers that would pass
    1 stay dense.

    Source: Evci et al., RigL, arXiv:1911.11134, section 3.
    """
    raw = {layer.name: sum(layer.weight_shape) / layer.weight_elems for layer in layers}
    elems = {layer.name: layer.weight_elems for layer in layers}
    live = (1.0 - sparsity) * sum(elems.values())
    full: set[str] = set()
    while True:
        rest = [name for name in raw if name not in full]
        if not rest:
            return dict.fromkeys(raw, 0.0)
        scale = (live - sum(elems[name] for name in full)) / sum(raw[name] * elems[name] for name in rest)
        over = {name for name in rest if scale * raw[name] > 1.0 - ROUNDING}
        if not over:
            return {name: 0.0 if name in full else 1.0 - scale * raw[name] for name in raw}
        full |= over


_DISTRIBUTIONS = {"uniform": uniform, "erk": erk}


def together(share: Mapping[str, float], elems: Mapping[str, int]) -> float:
    """The sparsity of all layers together, of `share` ({layer: sparsity}) and `elems` ({layer: weights}); 0 when there
    are none."""
    zeros = sum(sparsity * elems[name] for name, sparsity in share.items())
    return round(zeros / max(1, sum(elems[name] for name in share)), DIGITS)


def rescaled(share: Mapping[str, float], elems: Mapping[str, int], overall: float) -> dict[str, float]:
    """`share` ({layer: sparsity}) with every density scaled alike, so that all layers together have the sparsity
    `overall`.

    elems  {layer: weights}. No layer becomes denser than dense; one that was asked to makes the whole sparser than
           `overall`.
    """
    live = sum((1.0 - sparsity) * elems[name] for name, sparsity in share.items())
    scale = (1.0 - overall) * sum(elems[name] for name in share) / live if live else 1.0
    return {name: max(0.0, 1.0 - (1.0 - sparsity) * scale) for name, sparsity in share.items()}


def distribute(name: str, layers: Sequence[LayerSpec], sparsity: float) -> dict[str, float]:
    """{weight name: sparsity}. Raises UnknownName, SparsityError (sparsity outside [0, 1))."""
    if not 0.0 <= sparsity < 1.0:
        raise SparsityError(f"sparsity is {sparsity}; wanted 0 <= sparsity < 1 (0.9 keeps one weight in ten)")
    check_distribution(name)
    return _DISTRIBUTIONS[name](layers, sparsity)


def check_distribution(name: str) -> None:
    """Raises UnknownName."""
    if not isinstance(name, str) or name not in _DISTRIBUTIONS:
        raise UnknownName(f"no distribution {name!r}; there are: {', '.join(sorted(_DISTRIBUTIONS))}")

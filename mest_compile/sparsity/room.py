"""How many units layers have and have room for, at a sparsity of all sparse layers together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mest_compile.base.errors import SparsityError, UsageError
from mest_compile.sparsity.distributions import DIGITS, rescaled, together
from mest_compile.sparsity.layer import Layer
from mest_compile.sparsity.schemes.dense import Dense

ROUNDING = 10.0**-DIGITS


def sparse_layers(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Those whose mask a mutation may change: what is frozen keeps its own."""
    return {name: layer for name, layer in masked_layers(layers).items() if not layer.frozen}


def masked_layers(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Those that have a mask, frozen ones too."""
    return {name: layer for name, layer in layers.items() if not isinstance(layer.scheme, Dense)}


def units_at(layers: Mapping[str, Layer], overall: float) -> dict[str, int]:
    """{weight name: live units} of the sparse layers that train when all sparse layers together have the sparsity
    `overall`, or would have it if the frozen ones followed. Raises SparsityError."""
    sparse = masked_layers(layers)
    share = rescaled({name: layer.sparsity for name, layer in sparse.items()}, _elems(sparse), overall)
    return {name: layer.scheme.live_units(layer.spec, share[name]) for name, layer in sparse_layers(layers).items()}


def units_towards(layers: Mapping[str, Layer], overall: float) -> dict[str, int]:
    """{weight name: live units} of the sparse layers that train on their way from all weights to the sparsity that they
    are to have: each has gone as far as all sparse layers together, which have `overall`. Raises UsageError where that
    is beyond the end."""
    end = overall_sparsity(layers)
    if overall > end + ROUNDING:
        raise UsageError(f"cannot prune to {overall}: the sparse layers are to have {end}, all together")
    done = 1.0 if overall >= end - ROUNDING else overall / end
    return {
        name: layer.scheme.live_units(layer.spec, layer.sparsity * done)
        for name, layer in sparse_layers(layers).items()
    }


def overall_sparsity(layers: Mapping[str, Layer]) -> float:
    """The sparsity that the sparse layers start with, all of them together; 0 when there are none."""
    sparse = masked_layers(layers)
    return together({name: layer.sparsity for name, layer in sparse.items()}, _elems(sparse))


def with_room(layers: Mapping[str, Layer], grow_to: float) -> dict[str, Layer]:
    """The layers with the capacity for a sparsity of `grow_to`, all sparse layers together. Raises UsageError,
    SparsityError."""
    start = overall_sparsity(layers)
    if not 0 <= grow_to <= start:
        raise UsageError(
            f"grow_to is {grow_to}; wanted the lowest sparsity that mutations grow to, at most the model's {start}"
        )
    starts = {name: layer.scheme.live_units(layer.spec, layer.sparsity) for name, layer in layers.items()}
    room = {name: max(units, starts[name]) for name, units in units_at(layers, grow_to).items()}
    return {name: replace(layer, capacity=room.get(name)) for name, layer in layers.items()}


def with_all(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers with the capacity for all weights of those whose masks may change. Raises SparsityError where a scheme
    has no mask in which all live."""
    room = {}
    for name, layer in sparse_layers(layers).items():
        try:
            room[name] = layer.scheme.live_units(layer.spec, 0.0)
        except SparsityError as refused:
            raise SparsityError(
                f"{name}: under scheme {layer.scheme} not all weights can live, as dense_start and the method gradual "
                "need it; choose another scheme"
            ) from refused
    return {name: replace(layer, capacity=room.get(name)) for name, layer in layers.items()}


def _elems(layers: Mapping[str, Layer]) -> dict[str, int]:
    return {name: layer.spec.weight_elems for name, layer in layers.items()}

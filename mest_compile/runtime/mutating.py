"""Changes of masks: which cells of a step's layers stay and which are new, and the parts that make it so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import StateError, UsageError
from mest_compile.operators.layers.values import cells_of
from mest_compile.runtime import arguments
from mest_compile.runtime.changes import Part
from mest_compile.runtime.state import Arrangement, HeldState, as_conv
from mest_compile.sparsity.layer import Layer
from mest_compile.sparsity.mutation import importance
from mest_compile.sparsity.room import masked_layers, sparse_layers, units_at, units_towards

# Of one layer: its live cells that stay, told by their places in the list of them, new ones, and what these start at;
# None: 0.
Change = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True, slots=True)
class MutationReport:
    """What a mutation did, and what it took of the thread that trains.

    layers           {weight name: "unchanged" | "re-indexed" | "recompiled"}
    seconds          of the whole mutation
    reindex_seconds  of these, once all units were chosen: for the index arrays and what moves with them, weights,
                     momentum and gradients
    uploaded_bytes   what went to another device, 0 where there is none
    """

    layers: dict[str, str]
    seconds: float
    reindex_seconds: float
    uploaded_bytes: int = 0


class Mutating:
    """Decides changes of a step's masks, {weight name: Change}, of which layers that are not named stay as they are.

    sparse    names of the sparse layers' weights
    mutating  of those that a mutation changes: the others are frozen
    """

    def __init__(self, layers: Mapping[str, Layer], shapes: Mapping[str, tuple[int, ...]], state: HeldState):
        """shapes: torch name -> shape."""
        self._layers, self._shapes, self._state = layers, shapes, state
        self.sparse, self.mutating = list(masked_layers(layers)), list(sparse_layers(layers))
        self._protected: dict[str, np.ndarray] = {}  # weight name -> grid, True where a cell dies last
        self._units_at = cache(lambda overall: units_at(layers, overall))  # mutations ask for the same few sparsities

    def check_room(self, grow_to: float) -> dict[str, int]:
        """{weight name: live units} of the sparse layers at that sparsity of all of them. Raises CapacityError where
        there is no room."""
        units = self._units_at(checks.number("grow_to", grow_to, below=1))
        for name, count in units.items():
            self._layers[name].check_room(count, grow_to)
        return units

    def first(
        self, weights: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], rng: np.random.Generator
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(weight name, live cells) of every layer, sparse or not, as it starts with those weights: by magnitude, but
        for those of `masks`, (out, in, kh, kw) bool. Raises StateError where a scheme cannot have such a mask."""
        for name, layer in self._layers.items():
            if name in masks:
                yield name, cells_of(layer.scheme.collapse(layer.spec, masks[name]))
                continue
            energy = layer.scheme.energy(layer.spec, as_conv(weights[name]))
            live = layer.scheme.live_units(layer.spec, layer.sparsity)
            yield name, cells_of(layer.scheme.start(layer.spec, energy, live, rng))

    def protect(self, masks: Mapping[str, np.ndarray]) -> None:
        """Lets cells of those masks, bool in torch's shape, die last. Raises StateError."""
        self._protected = self._grids(masks, "what to protect")

    def to_masks(self, masks: Mapping[str, np.ndarray]) -> dict[str, Change]:
        """What gives layers those masks, bool in torch's shape. Raises StateError, CapacityError."""
        keeps = self._grids(masks, "what to set as masks")
        for name, keep in keeps.items():
            layer = self._layers[name]
            units = layer.scheme.count(layer.spec, keep)
            layer.check_room(units, 1 - units * layer.scheme.unit_cells(layer.spec) / keep.size)
        return {
            name: (
                np.flatnonzero(keep.ravel()[self._state.cells(name)]),
                cells_of(keep & ~self._state.keep(name)),
                None,
            )
            for name, keep in keeps.items()
        }

    def _grids(self, masks: Mapping[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
        """{weight name: grid} of masks. Raises StateError."""
        grids = {}
        for name, mask in arguments.mapping(masks, what).items():
            if name not in self.sparse:
                raise StateError(f"no sparse layer {name!r}; there are: {', '.join(self.sparse)}")
            layer = self._layers[name]
            grids[name] = layer.scheme.collapse(layer.spec, as_conv(arguments.mask(mask, name, self._shapes[name])))
        return grids

    def by_importance(
        self,
        prune_to: float,
        grow_to: float,
        importance_lambda: float,
        rng: np.random.Generator,
        gradients: Mapping[str, np.ndarray] | None,
    ) -> dict[str, Change]:
        """Elastic Mutation, as `TrainStep.mutate` has it, with what it draws from `rng`.

        Raises UsageError, InputError, SparsityError, CapacityError.
        """
        prune_to, grow_to = (
            checks.number(name, value, below=1) for name, value in (("prune_to", prune_to), ("grow_to", grow_to))
        )
        importance_lambda = checks.number("importance_lambda", importance_lambda)
        if grow_to > prune_to:
            raise UsageError(f"mutate needs 0 <= grow_to <= prune_to < 1, got prune_to={prune_to}, grow_to={grow_to}")
        if gradients is not None:
            gradients = arguments.gradients(gradients, {name: self._shapes[name] for name in self.mutating})
        return self._changes(self._units_at(prune_to), self.check_room(grow_to), importance_lambda, rng, gradients)

    def by_pruning(self, to: float, importance_lambda: float, rng: np.random.Generator) -> dict[str, Change]:
        """What `TrainStep.prune` does. Raises UsageError, InputError, SparsityError."""
        units = units_towards(self._layers, checks.number("to", to, below=1))
        return self._changes(units, {}, checks.number("importance_lambda", importance_lambda), rng, None)

    def _changes(
        self,
        fewest: Mapping[str, int],
        most: Mapping[str, int],
        importance_lambda: float,
        rng: np.random.Generator,
        gradients: Mapping[str, np.ndarray] | None,
    ) -> dict[str, Change]:
        """Every layer is pruned to `fewest` live units, or stays where it has no more, and grows to `most`; those that
        it does not name do not grow."""
        changes: dict[str, Change] = {}
        for name in self.mutating:
            spec, scheme, cells = self._layers[name].spec, self._layers[name].scheme, self._state.cells(name)
            live = min(fewest[name], len(cells) // scheme.unit_cells(spec))
            stay, dead = self._pruned(name, live, importance_lambda, rng)
            wanted = None if gradients is None else scheme.energy(spec, as_conv(gradients[name]))
            new = scheme.grow(spec, cells.take(stay), most.get(name, live), rng, wanted, dead)
            changes[name] = stay, new, self._start_of(name, stay, new, dead, rng)
        return changes  # nothing is changed before all layers were asked, any of which may refuse

    def without_growth(
        self, names: Collection[str], prune_to: float, importance_lambda: float, rng: np.random.Generator
    ) -> dict[str, Change]:
        """What prunes those of the named layers that mutations change to `prune_to`, of all sparse layers together; one
        that is as sparse already stays as it is. Raises InputError, SparsityError."""
        fewest = self._units_at(checks.number("prune_to", prune_to, below=1))
        importance_lambda = checks.number("importance_lambda", importance_lambda)
        none = np.empty(0, np.int32)
        return {
            name: (self._pruned(name, fewest[name], importance_lambda, rng)[0], none, None)
            for name in self.mutating
            if name in names
        }

    def _pruned(
        self, name: str, fewest: int, importance_lambda: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """`Scheme.prune` of a layer, by importance, to `fewest` units or as many as it has."""
        spec, scheme = self._layers[name].spec, self._layers[name].scheme
        cells, places = self._state.cells(name), self._state.places[name]
        score = importance(
            self._state.get(name), self._state.get(f"{name}:gradient") if importance_lambda else None, importance_lambda
        )
        squares = np.square(score, dtype=np.float64).reshape(-1, scheme.cell_elems(spec))
        energy = (squares[:, 0] if squares.shape[1] == 1 else squares @ np.ones(squares.shape[1])).take(places)
        if name in self._protected and len(energy):  # above all others, in the same order among themselves
            energy = energy + (energy.max() + 1) * self._protected[name].ravel()[cells]
        return scheme.prune(spec, cells, energy, min(fewest, len(cells) // scheme.unit_cells(spec)), rng)

    def _start_of(
        self, name: str, stay: np.ndarray, new: np.ndarray, dead: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray | None:
        """What new cells start at: 0, next to live ones. A filter all of whose weights are 0 may get no gradient: the
        normalisation behind it gives its bias, and a ReLU nothing where that is not above 0. So those of `dead`, the
        groups of filters of which nothing stays, are drawn as large as the layer's weights are. (new, weights of a
        cell) float32; None: all start at 0. Ours: MEST's start at 0.
        """
        if not len(dead) or not len(new):
            return None
        layer = self._layers[name]
        elems, revived = layer.scheme.cell_elems(layer.spec), layer.scheme.lie_in(layer.spec, new, dead)
        living = self._state.get(name).reshape(-1, elems).take(self._state.places[name].take(stay), axis=0)
        start = np.zeros((len(new), elems), np.float32)
        start[revived] = rng.standard_normal((int(revived.sum()), elems)) * np.sqrt(
            np.square(living, dtype=np.float64).mean()
        )
        return start

    def parts(self, changes: Mapping[str, Change], install: Callable[[Arrangement], Any]) -> list[Part]:
        """The parts of a change that lets layers hold that. install: lets one of them hold an arrangement."""
        changing = {
            name: change
            for name, change in changes.items()
            if len(change[1]) or len(change[0]) < len(self._state.cells(name))
        }
        return [partial(self._exchange, name, change, install) for name, change in changing.items()]

    def _exchange(self, name: str, change: Change, install: Callable[[Arrangement], Any]) -> list[Part]:
        """Layer by layer: there need not be room for two states."""
        return [partial(install, self._state.moved(name, *change))]

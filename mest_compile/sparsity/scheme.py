"""What a sparsity scheme is: which units a layer's weight falls into, and which sets of live units are legal.

A layer's mask is `keep`, a bool grid (groups, sources, kh, kw) of *cells*: the blocks of weights that the kernels load
together. A scheme's *unit*, what it keeps or drops whole, is one cell or several. *Energy* is the squared importance of
a cell's weights, summed. Who mutates lists live cells, int32 places in the grid, ascending: at usual sparsities that is
less work than whole grids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, reduce
from math import prod
from typing import ClassVar, TypeVar

import numpy as np

from mest_compile.base.errors import InputError, SparsityError, StateError, UsageError
from mest_compile.base.registry import Registry
from mest_compile.ir.graph import LayerSpec
from mest_compile.sparsity import mutation

USUAL = 0.9  # sparsity when nobody says one
ROUNDING = 1e-5  # sparsities this close are one: that of all layers together is told in six digits


class Scheme(ABC):
    """Base of all schemes, frozen values. This class serves every scheme whose units are cells or whole slices of the
    grid.

    spans  axes of the grid that a unit covers from end to end, all but one; () when a unit is one cell
    spelling  regular expression of texts that mean a scheme of this class without its name; None: there are none
    """

    name: ClassVar[str]
    spans: ClassVar[tuple[int, ...]] = ()
    spelling: ClassVar[str | None] = None

    @classmethod
    def parse(cls, arguments: str) -> Scheme:
        """The scheme from the text behind its name's colon; most schemes take none. Raises UsageError."""
        if arguments:
            raise UsageError(f"scheme {cls.name!r} takes no arguments, got {arguments!r}")
        return cls()

    @classmethod
    def variants(cls) -> list[Scheme]:
        """Those of this class that a mask of unknown origin may be of."""
        return [cls()]

    def __str__(self) -> str:
        """What `parse_scheme` takes."""
        return self.name

    @property
    def fixed(self) -> float | None:
        """The one sparsity that a model of this scheme can be asked for; None: it can be asked for others."""
        return None

    def asked(self, sparsity: float | None, where: str = "") -> float:
        """The sparsity of a model that is asked for this one; None: nobody said. where: before the message.

        Raises SparsityError.
        """
        if sparsity is None:
            return USUAL if self.fixed is None else self.fixed
        if self.fixed is not None and abs(sparsity - self.fixed) > ROUNDING:
            raise SparsityError(
                f"{where}scheme {self} has sparsity {self.fixed:.4g}, not {sparsity:.4g}; leave sparsity out, or "
                "choose another scheme"
            )
        return sparsity

    @abstractmethod
    def block(self, layer: LayerSpec) -> tuple[int, int]:
        """(output channels, input channels) of one cell."""

    def kernels(self, layer: LayerSpec) -> tuple[str, ...]:
        """Names of the kernel families that the layer may run on, best first; a device takes the first that it has
        kernels of."""
        return ("gather",)

    def misfit(self, layer: LayerSpec) -> str:
        """Why the layer cannot be cut into this scheme's units, said of the scheme; "" when it can."""
        rows, sources = self.block(layer)
        out, inputs = layer.weight_shape[0] // layer.groups, layer.weight_shape[1]
        if out % rows == inputs % sources == 0:
            return ""
        each = f" in each of {layer.groups} groups" if layer.groups > 1 else ""
        return f"needs multiples of {rows} output and {sources} input channels, the layer has {out} and {inputs}{each}"

    def check(self, layer: LayerSpec) -> None:
        """Raises SparsityError when the layer cannot be cut into this scheme's units."""
        if why := self.misfit(layer):
            raise SparsityError(
                f"{layer.name}: scheme {self} {why}; choose another scheme, or list the layer in dense_layers"
            )

    def grid(self, layer: LayerSpec) -> tuple[int, int, int, int]:
        """Shape of the layer's grid of cells."""
        rows, sources = self.block(layer)
        out, inputs, height, width = layer.weight_shape
        return out // rows, inputs // sources, height, width

    def cell_elems(self, layer: LayerSpec) -> int:
        """Weights of one cell."""
        rows, sources = self.block(layer)
        return rows * sources

    def unit_cells(self, layer: LayerSpec) -> int:
        """Live cells of one unit that lives."""
        grid = self.grid(layer)
        return prod([grid[axis] for axis in self.spans])

    def energy(self, layer: LayerSpec, importance: np.ndarray) -> np.ndarray:
        """Squared importance of every cell in float64. (out, in, kh, kw) -> grid. Its root over a unit is the L2 norm
        MEST ranks by."""
        rows, sources = self.block(layer)
        groups, blocks, height, width = self.grid(layer)
        return np.square(importance, dtype=np.float64).reshape(groups, rows, blocks, sources, height, width).sum((1, 3))

    # Decisions, in the scheme's own units.

    def live_units(self, layer: LayerSpec, sparsity: float) -> int:
        """Units that live at `sparsity`: the nearest number, 1 or more. Raises SparsityError."""
        check_sparsity(layer, sparsity)
        return max(1, round(prod(self.grid(layer)) // self.unit_cells(layer) * (1.0 - sparsity)))

    def live_cells(self, layer: LayerSpec, sparsity: float) -> int:
        """Live cells of the units that live at `sparsity`. Raises SparsityError."""
        return self.live_units(layer, sparsity) * self.unit_cells(layer)

    def count(self, layer: LayerSpec, keep: np.ndarray) -> int:
        """Live units of a legal `keep`."""
        return int(self._alive(keep).sum())

    def start(self, layer: LayerSpec, energy: np.ndarray, live: int, rng: np.random.Generator) -> np.ndarray:
        """The first mask: the `live` units of most energy that `prune` leaves of all."""
        return self._pruned(layer, np.ones(self.grid(layer), bool), energy, live, rng)

    # Mutation. Live cells are listed, as the module says.

    def units(self, layer: LayerSpec, cells: np.ndarray) -> np.ndarray:
        """Which units live, ascending: each one's place on the axis of the grid that units do not span, or in the
        grid."""
        if not self.spans:
            return cells
        grid = self.grid(layer)
        return self._alive(cells.reshape(self._listed(grid))).ravel() // _strides(grid)[self._axis]

    def prune(
        self, layer: LayerSpec, cells: np.ndarray, energy: np.ndarray, live: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(places in the list of the live cells that stay, groups of filters that none of these lies in), both
        ascending: the `live` units of most energy; of equals the generator chooses. A filter that lives keeps its best
        unit while `live` is enough for all, where units are smaller than filters.

        energy (cells,). Raises SparsityError, InputError (NaN, infinite, or not one a cell).
        """
        if energy.shape != cells.shape:
            raise InputError(f"{layer.name}: prune needs one energy a cell: {cells.shape}, not {energy.shape}")
        grid = self.grid(layer)
        if not self.spans:
            bounds = np.searchsorted(cells, _filter_starts(grid[0], prod(grid[1:])))
            return mutation.prune_filters(energy, live, prod(grid), rng, bounds)
        listed = energy.reshape(self._listed(grid))
        stays = mutation.prune(self._sums(listed), live, grid[self._axis], rng)
        kept = np.broadcast_to(
            stays.reshape([1 if axis in self.spans else -1 for axis in range(listed.ndim)]), listed.shape
        )
        groups = np.arange(
            0 if 0 in self.spans else grid[0]
        )  # units that span filters leave none dead; others here are whole filters
        return np.flatnonzero(kept), np.delete(groups, self.units(layer, cells)[stays]) if len(groups) else groups

    def grow(
        self,
        layer: LayerSpec,
        cells: np.ndarray,
        live: int,
        rng: np.random.Generator,
        energy: np.ndarray | None,
        dead: np.ndarray,
    ) -> np.ndarray:
        """Cells of dead units that join until `live` units live: those of most energy (a grid), or, without one, drawn
        evenly.

        dead  groups of filters without a live unit, as `prune` gives them, which get one each before others do
        Raises SparsityError, CapacityError, InputError.
        """
        grid = self.grid(layer)
        if not self.spans:
            scores = None if energy is None else energy.ravel()
            return mutation.grow_filters(cells, prod(grid), live, rng, scores, dead, prod(grid[1:])).astype(np.int32)
        units = mutation.grow(
            self.units(layer, cells), grid[self._axis], live, rng, None if energy is None else self._sums(energy)
        ).astype(np.int32)
        places = [
            (np.arange(size, dtype=np.int32) if axis in self.spans else units) * stride
            for axis, (size, stride) in enumerate(zip(grid, _strides(grid), strict=True))
        ]
        return reduce(np.add, np.ix_(*places)).ravel()

    def lie_in(self, layer: LayerSpec, cells: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Which cells lie in one of the groups of filters, (cells,) bool."""
        return np.isin(cells // prod(self.grid(layer)[1:]), groups)

    # Masks of weights.

    def expand(self, layer: LayerSpec, keep: np.ndarray) -> np.ndarray:
        """Weight mask (out, in, kh, kw) bool of a grid."""
        rows, sources = self.block(layer)
        return np.repeat(np.repeat(keep, rows, axis=0), sources, axis=1)

    def fault(self, layer: LayerSpec, mask: np.ndarray) -> str | None:
        """Why this scheme cannot have a weight mask, (out, in, kh, kw) bool, of a layer that `check` takes; None: it
        can."""
        rows, sources = self.block(layer)
        blocks = mask.reshape(mask.shape[0] // rows, rows, mask.shape[1] // sources, sources, *mask.shape[2:])
        some, every = (
            how(how(blocks, (1, 3)), self.spans, keepdims=True) for how in (np.any, np.all)
        )  # of each unit's weights
        if cut := int((some & ~every).sum()):
            return f"is not made of whole units of scheme {self}: it cuts {cut} of {some.size} in two"
        return None

    def collapse(self, layer: LayerSpec, mask: np.ndarray) -> np.ndarray:
        """Grid of a weight mask. Raises StateError when this scheme cannot have that mask: units cut in two, or none
        alive."""
        if mask.shape != layer.weight_shape:
            raise StateError(f"{layer.name}: the mask has shape {mask.shape}, the weight {layer.weight_shape}")
        mask = mask.astype(bool)
        if why := self.fault(layer, mask):
            raise StateError(f"{layer.name}: the mask {why}; build it with the scheme's own mutation")
        if not mask.any():
            raise StateError(f"{layer.name}: the mask has no live weight; a layer needs at least one")
        rows, sources = self.block(layer)
        return mask[::rows, ::sources]

    def _pruned(
        self, layer: LayerSpec, keep: np.ndarray, energy: np.ndarray, live: int, rng: np.random.Generator
    ) -> np.ndarray:
        """`prune` of a grid, into a grid."""
        cells, kept = np.flatnonzero(keep).astype(np.int32), np.zeros(keep.shape, bool)
        kept.ravel()[cells[self.prune(layer, cells, energy.ravel()[cells], live, rng)[0]]] = True
        return kept

    def _alive(self, keep: np.ndarray) -> np.ndarray:
        """Which units of a legal `keep` live, axes that they span having length 1. A view: a cell tells of its unit."""
        return keep[tuple(slice(1) if axis in self.spans else slice(None) for axis in range(keep.ndim))]

    def _sums(self, energy: np.ndarray) -> np.ndarray:
        """The units' energies, flat."""
        if 0 in self.spans:
            energy = energy.sum(
                0, keepdims=True
            )  # by itself: NumPy is four times as slow over first and last axes at once
        return energy.sum(self.spans).ravel() if self.spans else energy.ravel()

    @property
    def _axis(self) -> int:
        """Of the grid, the one that units do not span."""
        return 6 - sum(self.spans)

    def _listed(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of listed cells of units that span axes: the grid without its dead units."""
        return tuple(size if axis in self.spans else -1 for axis, size in enumerate(grid))


def _strides(grid: tuple[int, ...]) -> list[int]:
    """How far neighbours on each axis of the grid are apart."""
    return [prod(grid[axis + 1 :]) for axis in range(len(grid))]


@cache
def _filter_starts(groups: int, each: int) -> np.ndarray:
    """Where in the grid each group of filters begins, and the last ends."""
    return np.arange(groups + 1, dtype=np.int32) * np.int32(each)


def check_sparsity(layer: LayerSpec, sparsity: float) -> None:
    """Raises SparsityError."""
    if not 0.0 <= sparsity < 1.0:
        raise SparsityError(
            f"{layer.name}: sparsity is {sparsity}; wanted 0 <= sparsity < 1 (0.9 keeps one weight in ten)"
        )


def loads_shared(channels: int) -> int:
    """The most channels of a cell, up to 4, that divide `channels`: its rows share their loads in forward, its sources
    in grad_input."""
    return next(size for size in (4, 2, 1) if channels % size == 0)


SCHEMES = Registry("scheme", "mest_compile.sparsity.schemes")


S = TypeVar("S", bound=type[Scheme])


def scheme(name: str) -> Callable[[S], S]:
    """Class decorator: registers a sparsity scheme."""

    def register(cls: S) -> S:
        SCHEMES.add(name, cls)
        return cls

    return register

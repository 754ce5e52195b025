"""N of every M consecutive input channels live: what NVIDIA's sparse tensor cores and torch.ao.pruning know as 2:4."""

import re
from dataclasses import dataclass
from math import prod

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import CapacityError, SparsityError, UsageError
from mest_compile.ir.graph import LayerSpec
from mest_compile.sparsity.mutation import highest
from mest_compile.sparsity.scheme import ROUNDING, Scheme, check_sparsity, scheme


@scheme("nm")
@dataclass(frozen=True, slots=True)
class NM(Scheme):
    """A unit is one weight; of each group of `m` consecutive input channels, at one output channel and kernel position,
    at most `n` live, and at the start exactly so many: "2:4", "1:4". The sparsity is 1 - n/m.

    Source: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv:2104.08378. Mutations prune the least
    important weights of the layer and grow in groups that have room.
    """

    n: int = 2
    m: int = 4
    name = "nm"
    spelling = r"(\d+):(\d+)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", checks.whole("NM: n", self.n, 1))
        object.__setattr__(self, "m", checks.whole("NM: m", self.m, 2))
        if self.n >= self.m:
            raise UsageError(f"NM keeps {self.n} of {self.m} weights; wanted fewer than there are, such as 2:4")

    @classmethod
    def parse(cls, arguments: str) -> Scheme:
        if not arguments:
            return cls()
        found = re.fullmatch(cls.spelling, arguments)
        if not found:
            raise UsageError(f"nm arguments are N:M as in nm:2:4, which is 2:4 for short, got {arguments!r}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def variants(cls) -> list[Scheme]:
        return [cls(2, 4), cls(1, 4), cls(1, 2), cls(4, 8), cls(2, 8), cls(1, 8)]

    @property
    def fixed(self) -> float:
        return 1.0 - self.n / self.m

    def block(self, layer: LayerSpec) -> tuple[int, int]:
        return 1, 1

    def misfit(self, layer: LayerSpec) -> str:
        inputs = layer.weight_shape[1]
        return f"needs a multiple of {self.m} input channels, the layer has {inputs}" if inputs % self.m else ""

    def live_units(self, layer: LayerSpec, sparsity: float) -> int:
        check_sparsity(layer, sparsity)
        most = prod(layer.weight_shape) // self.m * self.n
        if sparsity < self.fixed - ROUNDING:
            raise SparsityError(
                f"{layer.name}: sparsity is {sparsity:.4g}; scheme {self} has room for {self.fixed:.4g} and more: "
                f"mutations that grow beyond it, as method em_s does, are not for it; use em, or another scheme"
            )
        if sparsity < self.fixed + ROUNDING:
            return most
        return max(1, min(most, round(prod(layer.weight_shape) * (1.0 - sparsity))))

    def start(self, layer: LayerSpec, energy: np.ndarray, live: int, rng: np.random.Generator) -> np.ndarray:
        """The weights of most energy of each group, and of these the `live` of most."""
        best = self._best(self._groups(layer, energy), self.n, rng)
        return self._pruned(layer, self._grid(layer, best), energy, live, rng)

    def grow(
        self,
        layer: LayerSpec,
        cells: np.ndarray,
        live: int,
        rng: np.random.Generator,
        energy: np.ndarray | None,
        dead: np.ndarray,
    ) -> np.ndarray:
        """As every scheme's, but no group gets more than there is room for."""
        shape, count = layer.weight_shape, live - cells.size
        most = prod(shape) // self.m * self.n
        if live > most:
            raise CapacityError(f"{layer.name}: cannot grow to {live} live units: scheme {self} has room for {most}")
        if count < 0:
            raise SparsityError(f"{layer.name}: cannot grow to {live} live units: {cells.size} are alive; prune first")
        alive = np.zeros(shape, bool)
        alive.ravel()[cells] = True
        scores = rng.random(shape) if energy is None else energy
        alive, wanted = self._groups(layer, alive), self._groups(layer, scores)
        able = self._best(np.where(alive, -np.inf, wanted), self.n - alive.sum(1, keepdims=True), rng)
        free = np.flatnonzero(self._grid(layer, able))
        bounds = np.searchsorted(free, np.arange(shape[0] + 1) * prod(shape[1:]))
        return free[highest(scores.ravel()[free], count, rng, bounds, dead)].astype(np.int32)

    def fault(self, layer: LayerSpec, mask: np.ndarray) -> str | None:
        live = self._groups(layer, mask).sum(1)
        if over := int((live > self.n).sum()):
            return (
                f"has {over} of {live.size} groups of {self.m} input channels in which more than {self.n} weights live"
            )
        return None

    def _groups(self, layer: LayerSpec, grid: np.ndarray) -> np.ndarray:
        """(groups, m) of (out, in, kh, kw)."""
        out, inputs, height, width = layer.weight_shape
        return grid.reshape(out, inputs // self.m, self.m, height * width).swapaxes(2, 3).reshape(-1, self.m)

    def _grid(self, layer: LayerSpec, groups: np.ndarray) -> np.ndarray:
        """The way back."""
        out, inputs, height, width = layer.weight_shape
        return groups.reshape(out, inputs // self.m, height * width, self.m).swapaxes(2, 3).reshape(layer.weight_shape)

    @staticmethod
    def _best(scores: np.ndarray, counts: np.ndarray | int, rng: np.random.Generator) -> np.ndarray:
        """(groups, m) bool: the `counts` highest of each group; of equal scores the generator chooses."""
        order = np.lexsort((rng.random(scores.shape), -scores))
        ranks = np.empty_like(order)
        np.put_along_axis(ranks, order, np.arange(scores.shape[1])[None], 1)
        return ranks < counts

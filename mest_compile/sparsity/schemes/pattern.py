"""3x3 kernels that keep four cells in one of eight fixed patterns; whole kernels live or die, the same number in every
filter."""

from dataclasses import dataclass

import numpy as np

from mest_compile.base.errors import SparsityError
from mest_compile.ir.graph import LayerSpec
from mest_compile.sparsity.mutation import choices, grow_rows, prune_rows
from mest_compile.sparsity.scheme import Scheme, check_sparsity, scheme

# Two pairs of neighbours in a row, one of them with the centre, the other right above or below: the only eight such
# patterns. Both taps of a pair meet neighbouring pixels, so kernels compute them from one place, and what one tap reads
# for a pixel is what the other reads for the next. PatDNN (arXiv:2001.00138) draws its patterns, centre and three
# others, from those that are most frequent in trained networks; this set, closed under mirroring, is ours. (8, 3, 3)
# bool.
PATTERNS = np.array(
    [
        [[cell == "x" for cell in row] for row in rows.split()]
        for rows in (
            "xx. xx. ...",
            ".xx xx. ...",
            "xx. .xx ...",
            ".xx .xx ...",
            "... xx. xx.",
            "... xx. .xx",
            "... .xx xx.",
            "... .xx .xx",
        )
    ]
)
_LIVE_CELLS, _CELLS = 4, 9
_TAPS = np.array([np.flatnonzero(pattern) for pattern in PATTERNS])


@scheme("pattern")
@dataclass(frozen=True, slots=True)
class Pattern(Scheme):
    """A unit is a 3x3 kernel (output channel, input channel) with four live weights; every output filter keeps the same
    number of kernels.

    Sparsity counts weights: at 0.9 a share of 0.1 * 9/4 of the kernels lives. A live kernel keeps its pattern until it
    dies.
    """

    name = "pattern"

    def block(self, layer: LayerSpec) -> tuple[int, int]:
        return 1, 1

    def misfit(self, layer: LayerSpec) -> str:
        high, wide = layer.weight_shape[2:]
        return "" if (high, wide) == (3, 3) else f"is for 3x3 kernels, the layer's are {high}x{wide}"

    def kernels(self, layer: LayerSpec) -> tuple[str, ...]:
        return ("pattern_groups", "pattern", "gather") if layer.stride == (1, 1) else ("gather",)

    def unit_cells(self, layer: LayerSpec) -> int:
        return _LIVE_CELLS

    def live_units(self, layer: LayerSpec, sparsity: float) -> int:
        check_sparsity(layer, sparsity)
        out, inputs = layer.weight_shape[:2]
        share = (1.0 - sparsity) * _CELLS / _LIVE_CELLS
        if share > 1.0 + 1e-9:
            raise SparsityError(
                f"{layer.name}: sparsity is {sparsity:.4g}; scheme pattern starts at 1 - 4/9 = 0.556, where all "
                "kernels "
                "live with four of nine weights; ask for more, choose another scheme, or list the layer in "
                "dense_layers"
            )
        return out * max(1, min(inputs, round(inputs * share)))

    def count(self, layer: LayerSpec, keep: np.ndarray) -> int:
        return int(keep[:, :, 1, 1].sum())  # every pattern holds the centre

    def start(self, layer: LayerSpec, energy: np.ndarray, live: int, rng: np.random.Generator) -> np.ndarray:
        """In every kernel the pattern of most energy, in every filter the kernels whose patterns have most."""
        kept = np.tensordot(energy, PATTERNS, ((2, 3), (1, 2)))  # (out, in, patterns)
        return self._pruned(layer, PATTERNS[choices(kept, rng)], energy, live, rng)

    def units(self, layer: LayerSpec, cells: np.ndarray) -> np.ndarray:
        return cells[::_LIVE_CELLS] // _CELLS

    def prune(
        self, layer: LayerSpec, cells: np.ndarray, energy: np.ndarray, live: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        scores = sum(
            energy.reshape(layer.weight_shape[0], -1, _LIVE_CELLS).transpose(2, 0, 1)
        )  # several times as fast as .sum(2)
        stays = np.repeat(prune_rows(np.ones(scores.shape, bool), scores, _each(layer, live), rng).ravel(), _LIVE_CELLS)
        return np.flatnonzero(stays), np.array([], np.intp)  # every filter keeps a kernel

    def grow(
        self,
        layer: LayerSpec,
        cells: np.ndarray,
        live: int,
        rng: np.random.Generator,
        energy: np.ndarray | None,
        dead: np.ndarray,
    ) -> np.ndarray:
        """Kernels are drawn evenly from a filter's dead ones, their patterns evenly from the eight; with an energy, the
        kernels whose patterns have most.
        """
        alive = np.zeros(layer.weight_shape[:2], bool)
        alive.ravel()[self.units(layer, cells)] = True
        kept = None if energy is None else np.tensordot(energy, PATTERNS, ((2, 3), (1, 2)))  # (out, in, patterns)
        new = np.flatnonzero(grow_rows(alive, _each(layer, live), rng, None if kept is None else kept.max(2)) & ~alive)
        chosen = (
            rng.integers(len(PATTERNS), size=len(new))
            if kept is None
            else choices(kept.reshape(-1, len(PATTERNS))[new], rng)
        )
        return ((new * _CELLS)[:, None] + _TAPS[chosen]).ravel().astype(np.int32)

    def fault(self, layer: LayerSpec, mask: np.ndarray) -> str | None:
        alive = _kernels(mask)
        odd = alive & ~(mask[:, :, None] == PATTERNS).all((3, 4)).any(2)
        if odd.any():
            out, source = np.argwhere(odd)[0]
            return (
                f"has {odd.sum()} of {odd.size} kernels with none of the eight patterns, kernel ({out}, {source}) first"
            )
        each = alive.sum(1)
        if each.min() != each.max():
            return (
                f"has filters that keep {each.min()} to {each.max()} kernels; scheme pattern wants the same number in "
                "every filter"
            )
        return None


def _kernels(keep: np.ndarray) -> np.ndarray:
    """(out, in) bool: which kernels live."""
    return np.any(keep, (2, 3))


def _each(layer: LayerSpec, live: int) -> int:
    """Live kernels of a filter."""
    out = layer.weight_shape[0]
    if live % out:
        raise SparsityError(
            f"{layer.name}: {live} kernels cannot be shared evenly by {out} filters; live_units gives numbers that can"
        )
    return live // out

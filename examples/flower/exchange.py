"""What a fleet that trains one sparse model exchanges: the values of live weights, and once a bitmap of the mask.

Nothing here knows Flower. All clients have one mask. The server changes it between rounds by a rule of the values that
it sends, so that whoever has the mask of the round before works out the next one; a digest shows that it is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an array lies in a message: of every float array of a model its shape, those with masks first named in
    `sparse`. The same at the server and at all clients, as they compile the same model."""

    shapes: Mapping[str, tuple[int, ...]]
    sparse: tuple[str, ...]

    @classmethod
    def of(cls, state: Arrays, masks: Arrays) -> Layout:
        floats = {name: state[name].shape for name in sorted(state) if state[name].dtype == np.float32}
        return cls(floats, tuple(sorted(masks)))

    @property
    def dense_bytes(self) -> int:
        """What all values would be."""
        return 4 * sum(int(np.prod(shape)) for shape in self.shapes.values())


def pack_values(layout: Layout, state: Arrays, masks: Arrays) -> np.ndarray:
    """(n,) float32: live values of masked arrays and all of the others, one after another."""
    return np.concatenate(
        [state[name][masks[name]] if name in masks else state[name].ravel() for name in layout.shapes]
    ).astype(np.float32, copy=False)


def unpack_values(layout: Layout, values: np.ndarray, masks: Arrays) -> dict[str, np.ndarray]:
    """The arrays again, 0 where the mask is dead. Raises ValueError for values of another length or not finite."""
    counts = {
        name: int(masks[name].sum() if name in masks else np.prod(shape)) for name, shape in layout.shapes.items()
    }
    if values.shape != (sum(counts.values()),):
        raise ValueError(f"wanted {sum(counts.values())} finite values, got {values.shape}")
    if wrong := int((~np.isfinite(values)).sum()):
        raise ValueError(f"wanted finite values, {wrong} of {values.size} are not; a lower rate (--lr) may mend that")
    found, place = {}, 0
    for name, shape in layout.shapes.items():
        part = values[place : place + counts[name]]
        place += counts[name]
        found[name] = np.zeros(shape, np.float32)
        if name in masks:
            found[name][masks[name]] = part
        else:
            found[name][...] = part.reshape(shape)
    return found


def pack_masks(layout: Layout, masks: Arrays) -> bytes:
    """A bit a weight of the masked arrays."""
    return np.packbits(np.concatenate([masks[name].ravel() for name in layout.sparse])).tobytes() if masks else b""


def unpack_masks(layout: Layout, bitmap: bytes) -> dict[str, np.ndarray]:
    """Raises ValueError for a bitmap of another length."""
    sizes = [int(np.prod(layout.shapes[name])) for name in layout.sparse]
    if len(bitmap) != -(-sum(sizes) // 8):
        raise ValueError(f"wanted a bitmap of {sum(sizes)} weights, got {len(bitmap)} bytes")
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), count=sum(sizes)).astype(bool)
    parts = np.split(bits, np.cumsum(sizes)[:-1]) if sizes else []
    return {name: part.reshape(layout.shapes[name]) for name, part in zip(layout.sparse, parts)}


def digest(layout: Layout, masks: Arrays) -> bytes:
    """Eight bytes that other masks do not have."""
    return hashlib.sha256(pack_masks(layout, masks)).digest()[:8]


def take(
    layout: Layout, values: np.ndarray, bitmap: bytes, share: float, drawn_by: Sequence[int], wanted: bytes
) -> tuple[dict, dict]:
    """(state, masks) of a round: `values` lie where `bitmap`, the mask of the round before, lives; then `mutate` with
    the generator of the numbers `drawn_by`. Raises ValueError where values or bitmap do not fit, or where the masks
    that come out have another digest than `wanted`."""
    masks = unpack_masks(layout, bitmap)
    state, masks = mutate(unpack_values(layout, values, masks), masks, share, np.random.default_rng(drawn_by))
    if digest(layout, masks) != wanted:
        raise ValueError("the mask that comes out is not the server's; its bitmap is needed again")
    return state, masks


def average(values: Sequence[np.ndarray], examples: Sequence[int]) -> np.ndarray:
    """The mean over clients, each as often as it has examples. Raises ValueError where they differ in length."""
    if not values or len({one.shape for one in values}) > 1 or min(examples) < 1:
        raise ValueError(f"wanted equally many values from one client or more: {[one.shape for one in values]}")
    total = sum(count * one.astype(np.float64) for one, count in zip(values, examples))
    return (total / sum(examples)).astype(np.float32)


def mutate(state: Arrays, masks: Arrays, share: float, rng: np.random.Generator) -> tuple[dict, dict]:
    """(state, masks) in which that share of each masked array's live weights, the smallest, are dead and as many of the
    dead ones, drawn evenly, live: they begin at 0. One step of Elastic Mutation, arXiv:2110.14032, at the server: what
    clients have trained decides, and all keep one mask. In the order of names, whatever the mappings' is."""
    state, masks = dict(state), {name: mask.copy() for name, mask in masks.items()}
    for name in sorted(masks):
        mask = masks[name]
        flat, live, dead = mask.reshape(-1), np.flatnonzero(mask), np.flatnonzero(~mask)
        count = min(round(share * live.size), dead.size)
        weights = state[name].copy()
        dropped = live[np.argsort(np.abs(weights.reshape(-1)[live]), kind="stable")[:count]]
        flat[dropped], flat[rng.choice(dead, count, replace=False)] = False, True
        weights.reshape(-1)[dropped] = 0
        state[name] = weights
    return state, masks


def partitions(labels: np.ndarray, clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Indices of each client's examples: of every class, shares drawn from Dirichlet(alpha), the less alike the smaller
    alpha is. Source: Hsu et al., arXiv:1909.06335. No client is left without examples."""
    rng = np.random.default_rng(seed)
    while True:
        found: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            mine = rng.permutation(np.flatnonzero(labels == label))
            ends = np.cumsum(rng.dirichlet([alpha] * clients))[:-1] * len(mine)
            for one, part in zip(found, np.split(mine, ends.astype(int))):
                one.append(part)
        parts = [np.sort(np.concatenate(one)) for one in found]
        if min(map(len, parts)):
            return parts

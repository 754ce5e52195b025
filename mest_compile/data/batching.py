"""Batches: shuffled, augmented, normalised, and prepared one ahead of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mest_compile.base.errors import DataError
from mest_compile.data.dataset import Dataset
from mest_compile.data.streams import Stream

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


def pad_crop_flip(images: np.ndarray, rng: np.random.Generator, pad: int = 4, flip: bool = True) -> np.ndarray:
    """Each image shifted by up to `pad` pixels in y and x, zeros shifted in, and mirrored with probability 1/2 if
    `flip`.

    images (n, channels, height, width), left unchanged; the result has the same shape and dtype.
    """
    count, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    top, left = rng.integers(0, 2 * pad + 1, size=(2, count))
    cropped = windows[np.arange(count), :, top, left]
    if flip:
        mirrored = rng.random(count) < 0.5
        cropped[mirrored] = cropped[mirrored][..., ::-1]
    return cropped


def batches(
    dataset: Dataset | Stream,
    batch: int,
    rng: np.random.Generator,
    augment: bool,
    among: np.ndarray | None = None,
    drop_last: bool = True,
) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
    """One epoch of (images (n, C, H, W) float32 normalised, labels (n,) int64, indices (n,) int64 of the examples); n
    is `batch`, of the last one what is left.

    augment  shift images of a data set whose `shift` says so, mirror those whose `flip` does
    The order is drawn anew from `rng`.
    among  indices of the examples that the epoch is of; None: all
    drop_last  the examples that do not fill a last batch are left out: others each epoch
    A worker thread prepares the next batch while the caller uses this one; it alone uses `rng` until the iterator is
    closed. A stream's batches come in its own order, without indices. Raises DataError when the epoch would have no
    batch.
    """
    if isinstance(dataset, Stream):
        return dataset.epoch(batch, drop_last)
    among = np.arange(len(dataset)) if among is None else among
    count = batches_of(len(among), batch, drop_last)
    if not count:
        raise DataError(f"{dataset.name}: {len(among)} examples do not fill one batch of {batch}; use a smaller batch")
    order = rng.permutation(among)[: count * batch]
    return _prefetched(dataset, np.split(order, range(batch, len(order), batch)), rng, augment)


def batches_of(examples: int, batch: int, drop_last: bool) -> int:
    """Batches that so many examples make."""
    return examples // batch if drop_last else -(-examples // batch)


def _prefetched(
    dataset: Dataset, orders: Sequence[np.ndarray], rng: np.random.Generator, augment: bool
) -> Iterator[Batch]:
    def prepare(indices: np.ndarray) -> Batch:
        images = dataset.images[indices]
        if augment:
            images = pad_crop_flip(images, rng, dataset.pad if dataset.shift else 0, dataset.flip)
        return dataset.normalise(images), dataset.labels[indices], indices

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="mest-batches") as worker:
        pending = worker.submit(prepare, orders[0])
        for following in orders[1:]:
            ready, pending = pending.result(), worker.submit(prepare, following)
            yield ready
        yield pending.result()


def parts(dataset: Dataset | Stream, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every example once, in order: (images (n, C, H, W) float32 normalised, labels); n is `batch`, then the rest."""
    if isinstance(dataset, Stream):
        yield from dataset.parts(batch)
        return
    for start in range(0, len(dataset), batch):
        yield dataset.normalise(dataset.images[start : start + batch]), dataset.labels[start : start + batch]

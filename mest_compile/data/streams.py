"""Examples that come batch by batch, with transforms of their own: a torch DataLoader, or any iterable of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mest_compile.base.errors import DataError
from mest_compile.data.dataset import NO_LABEL
from mest_compile.data.examples import arranged, array_of, labels_of, pair_of
from mest_compile.models.inputs import Reading

Pair = tuple[np.ndarray, np.ndarray]


class Stream:
    """Labelled images that are drawn anew each epoch and never all in memory. They are taken as they come: floating
    point, scaled and augmented by whoever makes them.

    batches  an iterable that begins anew each time, of (images, labels) or {"image": ..., "label": ...} with any number
             of examples: images (n, C, H, W), (n, H, W) or (n, features) floating point, labels as in `as_dataset`
    classes  0 where labels are numbers
    labels, shape  labels of its first batch, and (channels, height, width) of an image
    Raises DataError when there are no examples, or they cannot be drawn again.
    """

    def __init__(
        self, batches: Iterable[Any], name: str, *, classes: int, numbers: bool = False, ignored: int = NO_LABEL
    ):
        self.name, self.classes, self.numbers, self.ignored = name, 0 if numbers else classes, numbers, ignored
        self._batches = batches
        if iter(batches) is batches:
            raise DataError(
                f"{name}: a {type(batches).__name__} can be gone through once, and every epoch goes through it; give a "
                "DataLoader, or an object whose __iter__ begins anew"
            )
        first = next(self._pairs(), None)
        if first is None or not len(first[0]):
            raise DataError(f"{name}: there are no examples")
        self.shape, self.labels = first[0].shape[1:], first[1]
        self._examples = self._count(len(first[0]))
        said = getattr(getattr(batches, "dataset", None), "classes", None)  # as torchvision names them
        named = isinstance(said, list | tuple) and len(said) == self.classes
        self.names = tuple(map(str, said)) if said is not None and named else ()

    def __len__(self) -> int:
        """Examples an epoch; of what does not tell its batches, as many as there were when they were counted."""
        return self._examples

    @property
    def reading(self) -> Reading:
        """Classes; how pictures became these images only their maker knows."""
        return Reading(self.names or tuple(str(label) for label in range(self.classes)))

    def describe(self) -> dict[str, Any]:
        """JSON-able facts. There is no digest: transforms may draw other numbers each time."""
        return {"name": self.name, "examples": len(self), "shape": list(self.shape), "classes": self.classes}

    def epoch(self, batch: int, drop_last: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray, None]]:
        """(images (n, C, H, W) float32, labels, None); n is `batch`, of the last ones what is left, unless they are
        left out: drop_last. Raises DataError when that is all."""
        drawn = 0
        for images, labels in self.parts(batch):
            if len(images) == batch or not drop_last:
                drawn += 1
                yield images, labels, None
        if not drawn:
            raise DataError(f"{self.name}: there are less than {batch} examples, one batch; use a smaller batch")

    def parts(self, batch: int) -> Iterator[Pair]:
        """The same with the last ones."""
        held: list[Pair] = []
        for pair in self._pairs():
            held.append(pair)
            if sum(len(labels) for _, labels in held) < batch:
                continue
            images, labels = (np.concatenate(arrays) for arrays in zip(*held))
            whole = len(labels) // batch * batch
            for start in range(0, whole, batch):
                yield images[start : start + batch], labels[start : start + batch]
            held = [(images[whole:], labels[whole:])] if whole < len(labels) else []
        if held:
            images, labels = (np.concatenate(arrays) for arrays in zip(*held))
            yield images, labels

    def _pairs(self) -> Iterator[Pair]:
        """Each batch as it comes. Raises DataError for one that cannot be trained on."""
        for place, batch in enumerate(self._batches):
            what = f"{self.name}, batch {place}"
            images, labels = pair_of(batch, what)
            pixels = arranged(array_of(images, f"{what}: the images"), what)
            if pixels.dtype == np.uint8:
                raise DataError(
                    f"{what}: images are uint8, and nobody says how they are scaled; let the loader's transform give "
                    "floating point, as torchvision's ToTensor and Normalize do, or give its data set itself"
                )
            if not np.isfinite(pixels).all():
                raise DataError(f"{what}: images hold NaN or infinity")
            found = labels_of(labels, what, self.numbers)
            if len(found) != len(pixels) or (place and pixels.shape[1:] != self.shape):
                wanted = f", those of batch 0 {self.shape}" if place else ""
                raise DataError(
                    f"{what}: images have shape {pixels.shape[1:]}{wanted}; there are {len(pixels)} of them and "
                    f"{len(found)} labels; wanted as many, all alike"
                )
            counted = found[found != self.ignored]
            if not self.numbers and counted.size and (counted.min() < 0 or counted.max() >= self.classes):
                raise DataError(
                    f"{what}: labels must be in 0..{self.classes - 1}, found {counted.min()}..{counted.max()}"
                )
            yield pixels, found

    def _count(self, first: int) -> int:
        """first: examples in the first batch."""
        try:
            most = len(self._batches) * first  # type: ignore[arg-type]
        except TypeError:
            return sum(len(labels) for _, labels in self._pairs())
        try:
            return min(most, len(self._batches.dataset))  # type: ignore[attr-defined]
        except (AttributeError, TypeError):
            return most

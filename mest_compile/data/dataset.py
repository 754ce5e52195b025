"""What a data set is, and how other people's data sets become one."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import DataError
from mest_compile.base.registry import Registry
from mest_compile.data.examples import Array, Examples, array_of, gather, labels_of, turned
from mest_compile.models.inputs import Inputs, Reading

SOURCES = Registry("data set", "mest_compile.data.sources")
NO_LABEL = -100  # of what does not count, as torch has it; losses take it that are told so


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Labelled images in memory.

    images     (n, channels, height, width) uint8 or float32
    labels     (n,) int64, in [0, classes) or `ignored`, or maps of them (n, H, W); or numbers, (n,) or (n, k) float32
    classes    0 where labels are numbers
    mean, std  (channels,) float32 in the units of `images`; a step is fed (images - mean) / std
    flip       whether a mirrored image is known to keep its label: a digit's does not, nor that of an arrow to the left
    names      of the classes, in the order of labels; empty: they have none but their numbers
    Raises DataError when these contradict each other.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: int
    mean: np.ndarray
    std: np.ndarray
    name: str
    flip: bool = False
    ignored: int = NO_LABEL
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype not in (np.uint8, np.float32):
            raise DataError(
                f"{self.name}: images must be (n, channels, height, width) uint8 or float32, "
                f"not {self.images.shape} {self.images.dtype}"
            )
        shaped = self.labels.ndim >= 1 if self.numbers else self.labels.ndim in (1, 3)
        if not shaped or len(self.labels) != len(self.images) or self.labels.dtype not in (np.int64, np.float32):
            raise DataError(
                f"{self.name}: {len(self.images)} images need as many int64 labels, "
                f"not {self.labels.shape} {self.labels.dtype}"
            )
        if not len(self.images):
            raise DataError(f"{self.name}: there are no examples")
        if self.numbers:
            if not np.isfinite(self.labels).all():
                raise DataError(f"{self.name}: labels hold NaN or infinity")
        else:
            counted = self.labels[self.labels != self.ignored]
            if counted.size and (counted.min() < 0 or counted.max() >= self.classes):
                raise DataError(
                    f"{self.name}: labels must be in 0..{self.classes - 1}, found {counted.min()}..{counted.max()}"
                )
        if self.names and len(self.names) != self.classes:
            raise DataError(f"{self.name}: {len(self.names)} names for {self.classes} classes; wanted one each")
        if self.images.dtype == np.float32 and not np.isfinite(self.images).all():
            raise DataError(f"{self.name}: images hold NaN or infinity")
        channels = self.images.shape[1:2]
        fit = self.mean.shape == channels == self.std.shape
        if not fit or not (np.isfinite(self.mean) & (self.std > 0) & (self.std < np.inf)).all():
            raise DataError(
                f"{self.name}: mean and std must be {channels[0]} finite numbers each, a channel's, std above 0; "
                f"not {self.mean}, {self.std}"
            )

    @classmethod
    def of(
        cls,
        images: np.ndarray,
        labels: np.ndarray,
        name: str,
        *,
        classes: int | None = None,
        like: Dataset | None = None,
        flip: bool = False,
        ignored: int = NO_LABEL,
        names: Sequence[str] = (),
    ) -> Dataset:
        """A data set of arrays. uint8 images are standardised per channel by their own statistics, float images are
        taken as they are.

        classes  None: the largest label + 1; of numbers there are none
        like     a training set whose classes, names, mean, std and flip are used instead: what a test set needs
        """
        if like is not None:
            if images.shape[1:] != like.images.shape[1:] or images.dtype != like.images.dtype:
                found, wanted = images.shape[1:], like.images.shape[1:]
                raise DataError(
                    f"{name}: images are {found} {images.dtype}, "
                    f"those of {like.name} {wanted} {like.images.dtype}{turned(found, wanted)}"
                )
            return cls(images, labels, like.classes, like.mean, like.std, name, like.flip, like.ignored, like.names)
        if not len(labels):
            raise DataError(f"{name}: there are no examples")
        if labels.dtype == np.float32:
            classes = 0
        elif classes is None:
            classes = int(labels.max(initial=-1, where=labels != ignored)) + 1
        return cls(images, labels, classes, *_statistics(images), name, flip, ignored, tuple(names))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def numbers(self) -> bool:
        """Whether labels are numbers, not classes."""
        return self.labels.dtype == np.float32

    @property
    def outputs(self) -> int:
        """How many outputs a model of it has: one a class, or one a number."""
        return math.prod(self.labels.shape[1:2]) if self.numbers else self.classes

    @property
    def pad(self) -> int:
        """Pixels that augmentation shifts an image by at most: an eighth of its side, the 4 of 32 that CIFAR recipes
        use."""
        return min(self.images.shape[2:]) // 8

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """(images - mean) / std as contiguous float32; images (k, channels, height, width) in the units of this data
        set."""
        return self._inputs.scaled(images)

    @property
    def _inputs(self) -> Inputs:
        return Inputs(self.images.shape[2:], mean=tuple(self.mean.tolist()), std=tuple(self.std.tolist()))

    @property
    def reading(self) -> Reading:
        """How pictures become what a step of this data is fed; of floating point numbers nobody knows that."""
        names = self.names or tuple(str(label) for label in range(self.classes))
        return Reading(names, self._inputs if self.images.dtype == np.uint8 else None)

    def describe(self) -> dict[str, Any]:
        """JSON-able facts; `crc32` tells whether another data set holds the same examples in the same order."""
        crc = zlib.crc32(np.ascontiguousarray(self.labels).data, zlib.crc32(np.ascontiguousarray(self.images).data))
        return {
            "name": self.name,
            "examples": len(self),
            "shape": list(self.images.shape[1:]),
            "classes": self.classes,
            "mirrored": self.flip,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "crc32": f"{crc:08x}",
        }


@dataclass(frozen=True, slots=True)
class Split:
    """A training set and a test set, normalised alike."""

    train: Dataset
    test: Dataset


Source = Callable[[Path | None], Split]
OF_NUMBERS: dict[str, Source] = {}  # sources whose labels may be numbers


def source(name: str, numbers: Source | None = None) -> Callable[[Source], Source]:
    """Function decorator: registers a data source, a function (folder: Path | None) -> Split. numbers: reads it where
    labels are numbers; None: it has classes."""

    def register(function: Source) -> Source:
        SOURCES.add(name, function)
        if numbers is not None:
            OF_NUMBERS[name] = numbers
        return function

    return register


def load(name: str, folder: str | os.PathLike | None = None, numbers: bool = False) -> Split:
    """The data set of that name, read from `folder` where it has files.

    numbers  labels are numbers, not classes
    Raises UnknownName, and DataError when files are missing or damaged.
    """
    read = SOURCES.find(name)
    if numbers and name not in OF_NUMBERS:
        raise DataError(
            f"{name} has classes, and the loss takes numbers; give data of {' or '.join(OF_NUMBERS)}, or another loss"
        )
    return (OF_NUMBERS[name] if numbers else read)(None if folder is None else Path(folder))


def as_dataset(
    data: Any,
    *,
    classes: int | None = None,
    like: Dataset | None = None,
    name: str = "arrays",
    numbers: bool = False,
    ignored: int = NO_LABEL,
) -> Dataset:
    """A Dataset of anything that holds labelled images.

    data  a Dataset; a pair (images, labels) of numpy arrays or torch tensors; or a torch-style Dataset: len() and [i]
          -> (image, int). Images are (C, H, W) each, uint8 or floating point; (H, W) is taken as one channel, which
          a step of series (C, L) takes as such, (features,) as 1x1 images. Floating point becomes float32. Labels are
          whole numbers of 0 or more, one an example or one a pixel, and `ignored` where there is none.
    numbers  labels are numbers instead, one or several an example
    classes, like  as in Dataset.of
    A torch Dataset is read once: random transforms in it happen once, use the recipe's `augment` instead.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Array):
        images, labels = array_of(data[0], f"{name}: the images"), labels_of(data[1], name, numbers)
    elif isinstance(data, Examples):
        images, labels = gather(data, name, numbers)
    else:
        raise DataError(
            f"{name}: a data set is a Dataset, (images, labels) arrays or a torch Dataset, not {type(data).__name__}"
        )
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"{name}: images must be uint8 or floating point, not {images.dtype}; convert them")
    if images.ndim not in (2, 3, 4):
        raise DataError(f"{name}: images must be (n, C, H, W), (n, H, W) or (n, features), not {images.shape}")
    if images.ndim == 4 and images.shape[3] in (1, 3, 4) and images.shape[1] == images.shape[2] > 4:
        found = images.shape[1:]
        raise DataError(
            f"{name}: images must be (n, C, H, W), not {images.shape}{turned(found, (found[2], *found[:2]))}"
        )
    with np.errstate(over="ignore"):  # what is beyond float32 is refused as infinite
        images = images if images.dtype == np.uint8 else images.astype(np.float32, copy=False)
    images = images[:, :, None, None] if images.ndim == 2 else images[:, None] if images.ndim == 3 else images
    return Dataset.of(images, labels, name, classes=classes, like=like, ignored=ignored)


def _statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel, (channels,) float32; 0 and 1 for float images and for a constant
    channel's deviation."""
    channels = images.shape[1]
    if images.dtype != np.uint8:
        return np.zeros(channels, np.float32), np.ones(channels, np.float32)
    counts = np.zeros((channels, 256))
    for start in range(0, len(images), 4096):  # in pieces: bincount widens its input to 8 bytes a pixel
        for channel in range(channels):
            counts[channel] += np.bincount(images[start : start + 4096, channel].ravel(), minlength=256)
    share, levels = counts / counts.sum(1, keepdims=True), np.arange(256)
    mean = share @ levels
    std = np.sqrt((share * (levels - mean[:, None]) ** 2).sum(1))
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)

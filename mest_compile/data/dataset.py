"""What a data set is, and how other people's data sets become one."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import DataError, UsageError
from mest_compile.base.registry import Registry
from mest_compile.data.examples import Array, Examples, arranged, array_of, gather, labels_of, turned
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
    shift      whether a shifted image is known to keep its label
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
    shift: bool = False

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
        shift: bool = False,
    ) -> Dataset:
        """A data set of arrays. uint8 images are standardised per channel by their own statistics, float images are
        taken as they are.

        classes  None: the largest label + 1; of numbers there are none
        like     a training set whose classes, names, mean, std, flip and shift are used instead: what a test set needs
        """
        if like is not None:
            if images.shape[1:] != like.images.shape[1:] or images.dtype != like.images.dtype:
                found, wanted = images.shape[1:], like.images.shape[1:]
                raise DataError(
                    f"{name}: images are {found} {images.dtype}, "
                    f"those of {like.name} {wanted} {like.images.dtype}{turned(found, wanted)}"
                )
            return replace(like, images=images, labels=labels, name=name)
        if not len(labels):
            raise DataError(f"{name}: there are no examples")
        if labels.dtype == np.float32:
            classes = 0
        elif classes is None:
            classes = int(labels.max(initial=-1, where=labels != ignored)) + 1
        return cls(images, labels, classes, *_statistics(images), name, flip, ignored, tuple(names), shift)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def numbers(self) -> bool:
        """Whether labels are numbers, not classes."""
        return self.labels.dtype == np.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of an image."""
        return self.images.shape[1:]

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

    def scaled_as(self, reading: Reading | None) -> Dataset:
        """The same, its pixels scaled as a model's were before; as it is where nobody says how, or they are no
        pixels."""
        inputs = None if reading is None else reading.inputs
        if inputs is None or self.images.dtype != np.uint8 or inputs.channels != self.images.shape[1]:
            return self
        return replace(self, mean=np.array(inputs.mean, np.float32), std=np.array(inputs.std, np.float32))

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
    """A training set, a test set, and a validation set that the best model is chosen by, normalised alike.

    known_test, val  None: there is none
    """

    train: Dataset
    known_test: Dataset | None = None
    val: Dataset | None = None

    @property
    def test(self) -> Dataset:
        """Raises DataError where there is none."""
        if self.known_test is None:
            raise DataError(f"{self.train.name} has no test part; give data that has one")
        return self.known_test


Source = Callable[[Path | None], Split]
OF_NUMBERS: dict[str, Source] = {}  # sources whose labels may be numbers
Resizing = Callable[[Path | None, tuple[int, int]], Split]
RESIZED: dict[str, Resizing] = {}  # sources whose images may be of any sizes


def source(name: str, numbers: Source | None = None, resized: Resizing | None = None) -> Callable[[Source], Source]:
    """Function decorator: registers a data source, a function (folder: Path | None) -> Split.

    numbers  reads it where labels are numbers; None: it has classes
    resized  reads it with images resized to (height, width); None: they have their size
    """

    def register(function: Source) -> Source:
        SOURCES.add(name, function)
        if numbers is not None:
            OF_NUMBERS[name] = numbers
        if resized is not None:
            RESIZED[name] = resized
        return function

    return register


def load(
    name: str,
    folder: str | os.PathLike | None = None,
    numbers: bool = False,
    resize: tuple[int, int] | None = None,
    val_split: float = 0.0,
    seed: int = 0,
) -> Split:
    """The data set of that name, read from `folder` where it has files.

    numbers    labels are numbers, not classes
    resize     (height, width) that images are cut and resized to
    val_split  share of the training examples, of each class alike, that become the validation set, drawn by seed
    Raises UnknownName, UsageError, and DataError when files are missing or damaged.
    """
    read = SOURCES.find(name)
    place = None if folder is None else Path(folder)
    if resize is not None:
        if name not in RESIZED:
            raise UsageError(f"images of {name} have one size; leave resize out")
        return with_validation(RESIZED[name](place, resize), val_split, seed)
    if numbers and name not in OF_NUMBERS:
        raise DataError(
            f"{name} has classes, and the loss takes numbers; give data of {' or '.join(OF_NUMBERS)}, or another loss"
        )
    return with_validation((OF_NUMBERS[name] if numbers else read)(place), val_split, seed)


def with_validation(split: Split, share: float, seed: int) -> Split:
    """With that share of the training examples as validation set; 0: as it is. Raises UsageError."""
    share = checks.number("val_split", share, below=1)
    if not share:
        return split
    train = split.train
    if split.val is not None:
        raise UsageError(f"{train.name} has a validation part already; leave val_split out")
    rng, drawn = np.random.default_rng(seed), np.zeros(len(train), bool)
    groups = [np.arange(len(train))]
    if not train.numbers and train.labels.ndim == 1:
        groups = [np.flatnonzero(train.labels == label) for label in np.unique(train.labels)]
    for mine in groups:
        drawn[rng.permutation(mine)[: round(share * len(mine))]] = True
    if not drawn.any() or drawn.all():
        raise UsageError(f"val_split {share:g} of {len(train)} examples leaves none of one part; give another share")
    kept, val = (replace(train, images=train.images[part], labels=train.labels[part]) for part in (~drawn, drawn))
    return replace(split, train=kept, val=replace(val, name=f"{train.name} validation"))


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
          -> (image, int), or {"image": ..., "label": ...}. Images are (C, H, W) each, uint8 or floating point; (H, W)
          is taken as one channel, which a step of series (C, L) takes as such, (features,) as 1x1 images. Floating
          point becomes float32. Labels are whole numbers of 0 or more, one an example or one a pixel, and `ignored`
          where there is none.
    numbers  labels are numbers instead, one or several an example
    classes, like  as in Dataset.of
    A torch Dataset is read once: random transforms in it happen once. Give a Trainer a DataLoader of it, or use the
    recipe's `augment`.
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
    images = arranged(images, name)
    named = getattr(data, "classes", None)  # as torchvision's ImageFolder names them
    told = classes if classes is not None else None if named is None else len(named)
    names = [str(one) for one in named] if isinstance(named, list | tuple) and len(named) == told else ()
    return Dataset.of(images, labels, name, classes=told, like=like, ignored=ignored, names=names)


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

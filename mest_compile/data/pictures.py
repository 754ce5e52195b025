"""Photos of any size as labelled images of the size that a net wants: from folders, a CSV file, arrays, a torch
Dataset."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import DataError
from mest_compile.base.foreign import is_picture
from mest_compile.data.dataset import Dataset, Split
from mest_compile.data.examples import Array, Examples, array_of, labels_of
from mest_compile.data.sources.folder import SUFFIXES, check_depth, fitted, open_image, read_picture
from mest_compile.models.inputs import Inputs

TEST_SHARE = 0.2  # of each class, where there is no test part
SPARE = "(spare "  # the name of an output that no class has yet begins so
TRAIN, TEST, VALS = "train", "test", ("val", "valid", "validation")  # names of folders


@dataclass(frozen=True, slots=True)
class Pictures:
    """Labelled images, split, and what they are called.

    val      what the best of several models is chosen by; None: there is no such part
    classes  their names, in the order of labels
    files    of the test images, where they were; numbers of examples where they were in no files
    """

    train: Photos
    test: Photos
    val: Photos | None
    classes: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def split(self) -> Split:
        """All of them read. Raises DataError."""
        return Split(self.train.read(), self.test.read(), None if self.val is None else self.val.read())

    def crc32(self) -> int:
        """Tells whether others are the same: classes, labels, and what the images' files or arrays hold. Of a torch
        Dataset, whose transforms may draw other numbers each time, no image counts. Raises DataError."""
        crc = zlib.crc32("\0".join(self.classes).encode())
        for part in (self.train, self.test, self.val):
            crc = crc if part is None else part.crc32(crc)
        return crc


class Photos:
    """Labelled images that are read when they are asked for, so that no more of them than are used are in memory.

    shape   (n, C, H, W), as `inputs` cuts and resizes them
    labels  (n,) int64, in [0, classes)
    """

    def __init__(self, part: _Part, inputs: Inputs, classes: int, name: str):
        self._part, self._inputs, self.classes, self.name = part, inputs, classes, name
        self.labels = part.labels
        self.shape = (len(part.labels), inputs.channels, *inputs.size)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, places: slice) -> np.ndarray:
        """(places, C, H, W) uint8, pixels as they are: a net does the rest. Raises DataError."""
        wanted = range(len(self))[places]
        images = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        for image, place in zip(images, wanted):
            found = self._part.read(place)
            fit = read_picture if isinstance(found, Path) else fitted
            image[:] = fit(found, self._inputs)
        return images

    def crc32(self, before: int) -> int:
        """Goes on from what came `before`. Raises DataError."""
        crc = zlib.crc32(np.ascontiguousarray(self.labels, np.int64).data, before)
        for place in range(len(self)):
            crc = zlib.crc32(self._part.content(place), crc)
        return crc

    def read(self) -> Dataset:
        """All of them. Raises DataError."""
        plain = np.zeros(self.shape[1], np.float32), np.ones(self.shape[1], np.float32)
        return Dataset(self[:], self.labels, self.classes, *plain, self.name)


@dataclass(frozen=True, slots=True)
class _Part:
    """Examples as they were found, not yet read. read: the image of a place. content: what tells it from another one,
    b"" where it may be another each time it is read."""

    read: Callable[[int], Any]
    labels: np.ndarray
    files: tuple[str, ...]
    content: Callable[[int], bytes]

    def only(self, places: np.ndarray) -> _Part:
        return _Part(
            lambda place: self.read(int(places[place])),
            self.labels[places],
            tuple(self.files[place] for place in places),
            lambda place: self.content(int(places[place])),
        )


def read_pictures(
    train: Any,
    inputs: Inputs,
    test: Any = None,
    seed: int = 0,
    known: Sequence[str] = (),
    spare: int = 0,
    val: Any = None,
    val_share: float = 0.0,
) -> Pictures:
    """Pictures of a folder, a CSV file, a pair (images, labels), a torch Dataset, or a `Split`, cut and resized as
    `inputs` says.

    train  a folder of folders, one a class, or with train/ and test/ in it that are such, and val/ where there is
           a validation part (val/ alone is the test part); a CSV file whose lines
           are file and label, files relative to it, with or without a line of names first; uint8 arrays (n, C, H, W),
           (n, H, W) or (n, H, W, C), or a torch Dataset of them or of Pillow's images, and labels
    test   the same; None: a fifth of every class, at least one, drawn by seed
    known  classes that there are already, of which there need be no images; others take the places of spare ones among
           them, or come behind them
    spare  how many classes come behind all others that have no images yet, "(spare 1)" and so on
    val    the same as test; None: that of the data, else `val_share` of every class's training images, at least one
           where there are two, drawn by seed; a share of 0: there is none
    Raises DataError.
    """
    if isinstance(train, Split):
        parts = (train.train, train.test, train.val)
        train, test, val = (None if part is None else (part.images, part.labels) for part in parts)
    part, names = _found(train, None)
    if isinstance(train, str | Path) and (Path(train) / TRAIN).is_dir():
        tests, vals = (
            next((Path(train) / name for name in named if (Path(train) / name).is_dir()), None)
            for named in ((TEST,), VALS)
        )
        if test is None and tests is None:
            tests, vals = vals, None
        test, val = test or tests, val or vals
    if known:
        names, part = _among(known, names, part)
    if test is None:
        drawn = _stratified(part.labels, np.random.default_rng(seed), names, known)
        part, tested = part.only(np.flatnonzero(~drawn)), part.only(np.flatnonzero(drawn))
    else:
        tested = _beside(test, names, known)
    validates = None if val is None else _beside(val, names, known)
    if validates is None and val_share:
        drawn = _drawn(part.labels, val_share, np.random.default_rng([seed, 1]))
        if drawn.any():  # else there is one image of each class
            part, validates = part.only(np.flatnonzero(~drawn)), part.only(np.flatnonzero(drawn))
    counts = np.bincount(part.labels, minlength=len(names))
    if empty := [name for name, count in zip(names, counts) if count == 0 and name not in known]:
        raise DataError(f"there is no image to train on of class {empty[0]!r}; give some, or leave the class out")
    if len(names) < 2:
        raise DataError(f"there is one class, {names[0]!r}; wanted two or more: a folder of images for each")
    names = [*names, *(f"{SPARE}{number})" for number in range(1, spare + 1))]
    read = Photos(part, inputs, len(names), "pictures")
    photos = Photos(tested, inputs, len(names), "pictures test")
    validation = None if validates is None else Photos(validates, inputs, len(names), "pictures validation")
    return Pictures(read, photos, validation, tuple(names), tested.files)


def _beside(data: Any, names: Sequence[str], known: Sequence[str]) -> _Part:
    """A part beside that which is trained on, labelled likewise. Raises DataError where it has other classes."""
    part, its = _found(data, None if known else names)
    if known:
        its, part = _among(names, its, part)
        if unknown := [name for name in its if name not in names]:
            raise DataError(f"{data} has the class {unknown[0]!r}, which is not trained on")
    return part


def _among(known: Sequence[str], names: Sequence[str], part: _Part) -> tuple[list[str], _Part]:
    """(known classes and what else has examples, the part with labels among these)."""
    there = [name for name, count in zip(names, np.bincount(part.labels, minlength=len(names))) if count]
    order = list(known)
    for name in there:
        if name not in order:
            free = next((place for place, one in enumerate(order) if one.startswith(SPARE)), len(order))
            order[free : free + 1] = [name]
    places = np.array([order.index(name) if name in order else -1 for name in names])
    return order, replace(part, labels=places[part.labels])


def _stratified(labels: np.ndarray, rng: np.random.Generator, names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """(n,) bool, TEST_SHARE of every class's examples, at least one; none of a single one of a class that is known."""
    for name, count in zip(names, np.bincount(labels, minlength=len(names))):
        if count < 2 and name not in known:
            raise DataError(
                f"class {name!r} has {count} images; wanted 2 or more, of which some are kept for the test, or a "
                "test part of your own"
            )
    return _drawn(labels, TEST_SHARE, rng)


def _drawn(labels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """(n,) bool, that share of every class's examples, at least one of two."""
    drawn = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        drawn[rng.permutation(mine)[: max(len(mine) > 1, round(share * len(mine)))]] = True
    return drawn


def _found(data: Any, names: Sequence[str] | None) -> tuple[_Part, list[str]]:
    """Examples and names of classes. names: those of the training part, which a test part is told in."""
    if isinstance(data, str | Path):
        return _of_files(Path(data), names)
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Array):
        return _of_arrays(data[0], data[1], names)
    if isinstance(data, Examples):
        return _of_dataset(data, names)
    raise DataError(
        f"a data set is a folder, a CSV file, (images, labels) arrays or a torch Dataset, not {type(data).__name__}"
    )


def _of_files(path: Path, names: Sequence[str] | None) -> tuple[_Part, list[str]]:
    listed = list(_of_csv(path) if path.is_file() else _of_folder(path))
    there = sorted({name for _, name in listed})
    if names is not None and (unknown := sorted(set(there) - set(names))):
        raise DataError(f"{path} has the class {unknown[0]!r}, which is not trained on")
    if not listed:
        raise DataError(f"{path} has no {', '.join(SUFFIXES)} files in folders, one a class")
    for file, _ in listed:
        with open_image(file) as picture:
            check_depth(picture, file)
    order = list(names or there)
    files = [file for file, _ in listed]
    labels = np.array([order.index(name) for _, name in listed], np.int64)

    def content(place: int) -> bytes:
        try:
            return files[place].read_bytes()
        except OSError as problem:
            raise DataError(f"{files[place]} cannot be read ({problem.strerror})") from problem

    return _Part(files.__getitem__, labels, tuple(map(str, files)), content), order


def _of_folder(path: Path) -> Iterator[tuple[Path, str]]:
    if not path.is_dir():
        raise DataError(f"no folder or CSV file {path}; give a folder with a folder of images for each class")
    for folder in sorted((path / TRAIN if (path / TRAIN).is_dir() else path).iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            for file in sorted(folder.iterdir()):
                if file.suffix.lower() in SUFFIXES:
                    yield file, folder.name


def _of_csv(path: Path) -> Iterator[tuple[Path, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as opened:
            rows = [row for row in csv.reader(opened) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DataError(f"{path} cannot be read ({problem}); wanted a CSV file of file and label") from problem
    for number, row in enumerate(rows, 1):
        if len(row) < 2 or not row[1].strip():
            raise DataError(f"{path}, line {number}: wanted a file and its label with a comma between them")
        file = path.parent / row[0].strip()
        if number == 1 and not file.exists():  # names of the columns
            continue
        if not file.is_file():
            raise DataError(f"{path}, line {number}: no file {file}")
        yield file, row[1].strip()


def _of_arrays(images: Any, labels: Any, names: Sequence[str] | None) -> tuple[_Part, list[str]]:
    from PIL import Image

    array, numbers = array_of(images, "the images"), labels_of(labels, "arrays")
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise DataError(
            f"images must be uint8 pixels (n, C, H, W), (n, H, W) or (n, H, W, C), not {array.shape} {array.dtype}; a "
            "net that was trained on photos scales them itself"
        )
    if array.ndim == 4 and array.shape[3] not in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim == 4 and array.shape[3] not in (1, 3):
        raise DataError(f"images must have 1 or 3 channels, not shape {images.shape}")
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if len(array) != len(numbers):
        raise DataError(f"there are {len(array)} images and {len(numbers)} labels; wanted as many")

    def read(place: int) -> Any:
        return Image.fromarray(np.ascontiguousarray(array[place]))

    files = tuple(f"example {place}" for place in range(len(array)))
    return _Part(read, numbers, files, lambda place: array[place].tobytes()), _numbered(numbers, names)


def _of_dataset(data: Examples, names: Sequence[str] | None) -> tuple[_Part, list[str]]:
    """Its images are read twice, for labels and where they are used, so that not all of them are in memory."""
    from PIL import Image

    def as_picture(place: int, image: Any) -> Any:
        if is_picture(image):
            return image
        array = array_of(image, f"the image of example {place}")
        if array.dtype != np.uint8:
            raise DataError(
                f"the image of example {place} is {array.dtype}; wanted uint8 pixels or one of Pillow's images: leave "
                "transforms that scale it out"
            )
        array = array if array.ndim == 2 else array.transpose(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))

    def read(place: int) -> Any:
        return as_picture(place, data[place][0])

    found = []
    for place in range(len(data)):
        image, label = data[place]
        as_picture(place, image)
        found.append(int(label))
    numbers = labels_of(np.array(found, np.int64), "the data set")
    said = getattr(data, "classes", None)  # as torchvision's ImageFolder names them
    if names is None and isinstance(said, list | tuple) and len(said) > numbers.max(initial=-1):
        names = [str(name) for name in said]
    files = tuple(f"example {place}" for place in range(len(data)))
    return _Part(read, numbers, files, lambda place: b""), _numbered(numbers, names)


def _numbered(labels: np.ndarray, names: Sequence[str] | None) -> list[str]:
    if not len(labels) or labels.min() < 0:
        raise DataError("labels must be numbers of classes from 0 on, of one example or more")
    if names is None:
        return [str(label) for label in range(int(labels.max()) + 1)]
    if labels.max() >= len(names):
        raise DataError(f"labels go to {labels.max()}, and there are {len(names)} classes to train on")
    return list(names)

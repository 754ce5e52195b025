"""CIFAR-10 and CIFAR-100 in the *binary* version that their authors publish (data_batch_1.bin, train.bin ...): rows of
labels and pixels.

Their *python* version is pickles. A pickle can run anything, so it is refused, with what to get in its place.
`folder` is the unpacked folder or the one that holds it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mest_compile.base.errors import DataError
from mest_compile.data.dataset import Dataset, Split, source

PIXELS = 3 * 32 * 32


@dataclass(frozen=True, slots=True)
class Layout:
    """How one of the two is laid out. folder, python_folder: what its archives unpack to. `label_bytes` stand before
    the pixels of a row, the last of them is the label. names_file: lists the classes.
    """

    name: str
    classes: int
    train_files: tuple[str, ...]
    test_file: str
    folder: str
    python_folder: str
    label_bytes: int
    names_file: str


CIFAR10 = Layout(
    "cifar10",
    10,
    tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test_batch",
    "cifar-10-batches-bin",
    "cifar-10-batches-py",
    1,
    "batches.meta.txt",
)
CIFAR100 = Layout(
    "cifar100", 100, ("train",), "test", "cifar-100-binary", "cifar-100-python", 2, "fine_label_names.txt"
)


@source("cifar10")
def cifar10(folder: Path | None) -> Split:
    """(3, 32, 32) uint8 images, 10 classes."""
    return _load(CIFAR10, folder)


@source("cifar100")
def cifar100(folder: Path | None) -> Split:
    """(3, 32, 32) uint8 images, 100 classes (the fine labels)."""
    return _load(CIFAR100, folder)


def _load(layout: Layout, folder: Path | None) -> Split:
    if folder is None:
        raise DataError(f"{layout.name} is not on this machine by itself; give --data-folder with the official files")
    where = _find(layout, folder)
    parts = [_read(where / f"{name}.bin", layout) for name in (*layout.train_files, layout.test_file)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    names = _names(where / layout.names_file, layout.classes)
    train = Dataset.of(images, labels, layout.name, classes=layout.classes, flip=True, names=names, shift=True)
    return Split(train, Dataset.of(*parts[-1], f"{layout.name} test", like=train))


def _find(layout: Layout, folder: Path) -> Path:
    """The folder with the files."""
    for where in (folder, folder / layout.folder):
        if (where / f"{layout.test_file}.bin").is_file():
            return where
    if any((where / layout.test_file).is_file() for where in (folder, folder / layout.python_folder)):
        raise DataError(
            f"{layout.name}: {folder} has the python version, which is pickles, and a pickle can run anything; "
            f"unpack the official binary version there"
        )
    raise DataError(f"{layout.name}: no {layout.test_file}.bin in {folder}; unpack the official binary version there")


def _names(path: Path, classes: int) -> list[str]:
    """Of the classes; none where the file that lists them was not copied."""
    lines = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return lines if len(lines) == classes else []


def _read(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as problem:
        raise DataError(f"{path} cannot be read ({problem.strerror}); unpack the official files again") from problem
    row = layout.label_bytes + PIXELS
    if not data.size or data.size % row:
        raise DataError(f"{path} holds {data.size} bytes, not whole rows of {row}; get it again")
    rows = data.reshape(-1, row)
    return rows[:, layout.label_bytes :].reshape(-1, 3, 32, 32), rows[:, layout.label_bytes - 1].astype(np.int64)

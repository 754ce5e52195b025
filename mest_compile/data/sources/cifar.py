"""CIFAR-10 and CIFAR-100 as their authors publish them.

Preferred is the *binary* version (data_batch_1.bin, train.bin ...): rows of labels and pixels, nothing to interpret. The *python* version
is pickles, and a pickle can call anything; it is read by an unpickler that knows numpy arrays and plain values only.
`folder` is the unpacked folder or the one that holds it.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct  # type: ignore[attr-defined]

from mest_compile.data.dataset import Dataset, Split, source
from mest_compile.errors import DataError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True, slots=True)
class Layout:
    """How one of the two is laid out. `label_bytes` stand before the pixels of a binary row, the last of them is the label."""

    name: str
    classes: int
    train_files: tuple[str, ...]
    test_file: str
    folders: tuple[str, ...]
    label_bytes: int
    label_key: str


CIFAR10 = Layout("cifar10", 10, tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch",
                 ("cifar-10-batches-bin", "cifar-10-batches-py"), 1, "labels")
CIFAR100 = Layout("cifar100", 100, ("train",), "test", ("cifar-100-binary", "cifar-100-python"), 2, "fine_labels")


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
    where, suffix, read = _find(layout, folder)
    parts = [read(where / f"{name}{suffix}", layout) for name in (*layout.train_files, layout.test_file)]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    train = Dataset.of(images, labels, layout.name, classes=layout.classes)
    return Split(train, Dataset.of(*parts[-1], f"{layout.name} test", like=train))


def _find(layout: Layout, folder: Path) -> tuple[Path, str, Callable[[Path, Layout], tuple[np.ndarray, np.ndarray]]]:
    """(folder, file name suffix, reader) of the version that is there, binary first."""
    versions: tuple[tuple[str, Callable], ...] = ((".bin", _read_binary), ("", _read_python))
    for suffix, read in versions:
        for where in (folder, *(folder / name for name in layout.folders)):
            if (where / f"{layout.test_file}{suffix}").is_file():
                return where, suffix, read
    raise DataError(f"{layout.name}: neither {layout.test_file}.bin nor {layout.test_file} in {folder}; "
                    f"unpack the official binary or python version there")


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise DataError(f"{path} cannot be read ({problem.strerror}); unpack the official files again") from problem


def _read_binary(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    data, row = np.frombuffer(_read_file(path), np.uint8), layout.label_bytes + PIXELS
    if not data.size or data.size % row:
        raise DataError(f"{path} holds {data.size} bytes, not whole rows of {row}; get it again")
    rows = data.reshape(-1, row)
    return rows[:, layout.label_bytes:].reshape(-1, 3, 32, 32), rows[:, layout.label_bytes - 1].astype(np.int64)


def _read_python(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    content = read_plain_pickle(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not a dict; get it again")
    images, labels = (content.get(key, content.get(key.encode())) for key in ("data", layout.label_key))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != PIXELS:
        raise DataError(f"{path} has no uint8 'data' of {PIXELS} bytes a row; is it a {layout.name} batch?")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise DataError(f"{path} has no list of whole numbers {layout.label_key!r}; is it a {layout.name} batch?")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, lists, numbers, strings and numpy arrays. Everything else a pickle may ask for is refused before it is imported."""

    ALLOWED = {("numpy.core.multiarray", "_reconstruct"): _reconstruct, ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
               ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")
        return self.ALLOWED[module, name]


def read_plain_pickle(path: Path) -> Any:
    """The plain value in a pickle, Python 2 strings as bytes. Raises DataError when it is damaged or asks for anything but numpy arrays."""
    data = io.BytesIO(_read_file(path))
    try:
        return _PlainUnpickler(data, encoding="bytes").load()
    except Exception as problem:  # a damaged pickle may raise anything at all (Python's manual), and all of it means the same
        raise DataError(f"{path} cannot be read ({problem}); get it again, or the binary version") from problem

"""The MNIST family's idx files, plain or gzipped."""

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np

from mest_compile.base.errors import DataError
from mest_compile.data.dataset import Dataset, Split, source

DEBIAN_FOLDER = Path(
    "/usr/share/datasets/fashion-mnist"
)  # where Debian's dataset-fashion-mnist puts its files, on every machine
UNSIGNED_BYTE = 0x08
CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@source("fashion-mnist")
def fashion_mnist(folder: Path | None) -> Split:
    """(1, 28, 28) uint8 images, 10 classes, from Debian's package or any folder of
    {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]."""
    where = DEBIAN_FOLDER if folder is None else folder
    if not where.is_dir():
        raise DataError(
            f"fashion-mnist: no folder {where}; give --data-folder or apt-get install dataset-fashion-mnist"
        )
    train = Dataset.of(*_pair(where, "train"), "fashion-mnist", classes=10, flip=True, names=CLOTHES, shift=True)
    return Split(train, Dataset.of(*_pair(where, "t10k"), "fashion-mnist test", like=train))


def _pair(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"), dimensions=3)
    return images[:, None], read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), dimensions=1).astype(np.int64)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"no {name} or {name}.gz in {folder}; give --data-folder or apt-get install dataset-fashion-mnist")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an idx file. Raises DataError when it is damaged or has other dimensions."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as problem:
        raise DataError(f"{path} cannot be read ({problem}); get it again") from problem
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, UNSIGNED_BYTE, dimensions)):
        raise DataError(f"{path} is not an idx file of {dimensions} dimensions of bytes; get it again")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, 4))
    if len(data) - header != prod(shape):
        raise DataError(
            f"{path} should hold {prod(shape)} bytes after its header but holds {len(data) - header}; get it again"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)

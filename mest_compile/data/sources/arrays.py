"""Arrays of one's own: train.npz and test.npz, each with `images` and `labels`. They need nothing but numpy, on a device too."""

import zipfile
from pathlib import Path

import numpy as np

from mest_compile.data.dataset import Dataset, Split, source
from mest_compile.errors import DataError


@source("arrays")
def arrays(folder: Path | None) -> Split:
    """images (n, C, H, W) uint8 or float32, labels (n,) whole numbers, as np.savez writes them; no pickled objects."""
    if folder is None:
        raise DataError("arrays: give --data-folder with train.npz and test.npz in it, each with images and labels")
    train = Dataset.of(*_read(folder / "train.npz"), "arrays", flip=False)
    return Split(train, Dataset.of(*_read(folder / "test.npz"), "arrays test", like=train))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["images"], file["labels"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
        raise DataError(f"{path} cannot be read ({problem}); write it with np.savez(path, images=..., labels=...)") from problem

"""Arrays of one's own: train.npz and test.npz, each with `images` and `labels`. They need nothing but numpy, on a
device too."""

from functools import partial
from pathlib import Path

import numpy as np

from mest_compile.base.errors import DataError
from mest_compile.data.dataset import Split, as_dataset, source


def _split(folder: Path | None, numbers: bool = False) -> Split:
    if folder is None:
        raise DataError("arrays: give --data-folder with train.npz and test.npz in it, each with images and labels")
    train = as_dataset(_read(folder / "train.npz"), name="arrays", numbers=numbers)
    return Split(train, as_dataset(_read(folder / "test.npz"), like=train, name="arrays test", numbers=numbers))


@source("arrays", numbers=partial(_split, numbers=True))
def arrays(folder: Path | None) -> Split:
    """What `as_dataset` takes of arrays, as np.savez writes them: images (n, C, H, W) and labels (n,), or maps of them
    (n, H, W), or numbers (n, k) for losses that take them; no pickled objects."""
    return _split(folder)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return file["images"], file["labels"]
    except Exception as problem:  # of damaged bytes numpy, zipfile and the unpackers raise whatever meets them
        said = " ".join(str(problem).split()) or type(problem).__name__
        raise DataError(
            f"{path} cannot be read ({said}); write it with np.savez(path, images=..., labels=...)"
        ) from problem

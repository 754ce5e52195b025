"""scikit-learn's 1797 handwritten digits: embedded, so that a first run needs no download."""

from pathlib import Path

import numpy as np

from mest_compile.base.errors import DataError
from mest_compile.data.dataset import Dataset, Split, source

# every fifth example of each class is a test example: 80/20, stratified, and no generator whose stream could change
TEST_EVERY = 5


@source("digits")
def digits(folder: Path | None) -> Split:
    """(1, 8, 8) uint8 images, 10 classes: scikit-learn's 0..16 as pixels are, 0..255."""
    if folder is not None:
        raise DataError("digits is embedded in scikit-learn and takes no folder; leave --data-folder out")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = labels.astype(np.int64)
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    train = Dataset.of(images[~test], labels[~test], "digits", classes=10, shift=True)
    return Split(train, Dataset.of(images[test], labels[test], "digits test", like=train))

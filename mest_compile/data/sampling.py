"""A few batches of a data set, as a step takes them."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from math import prod

import numpy as np

from mest_compile.base.errors import InputError
from mest_compile.data.batching import batches
from mest_compile.data.dataset import Dataset
from mest_compile.data.examples import turned
from mest_compile.data.streams import Stream


def check_shape(dataset: Dataset | Stream, input_shape: tuple[int, ...]) -> None:
    """Raises InputError when a step of that input shape does not take such images."""
    wanted, found = tuple(input_shape[1:]), dataset.shape
    series = len(wanted) == 2 and found == (1, *wanted)  # (n, C, L), which a data set holds as (n, 1, C, L)
    if not series and wanted != found and wanted != (prod(found),):
        raise InputError(
            f"the step takes images of shape {wanted}, {dataset.name} has {found}"
            + (turned(found, wanted) or f"; compile with input_shape=({input_shape[0]}, {', '.join(map(str, found))})")
        )


def sample(dataset: Dataset, input_shape: tuple[int, ...], most: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """At most `most` batches of (images of `input_shape` float32 normalised, labels), drawn by seed, not augmented.
    Raises InputError where the images do not fit, DataError where they do not fill one batch."""
    check_shape(dataset, input_shape)
    rng = np.random.default_rng(seed)
    with closing(batches(dataset, input_shape[0], rng, augment=False)) as drawn:  # type: ignore[type-var]
        return [(images.reshape(input_shape), labels) for images, labels, _ in islice(drawn, most)]

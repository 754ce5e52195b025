"""What elements are stored as, and their sizes."""

from __future__ import annotations

import numpy as np

FLOAT_BYTES = 4
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint16": 2, "int32": 4}
ACTIVATIONS = ("float32", "float16", "bfloat16")  # what forward values may be stored as
LARGEST = {"float16": 65504.0, "bfloat16": 255 * 2.0**120}
BITS = "uint16"  # what holds a bfloat16, the upper half of a float32, where nothing has that type: NumPy, TVM's code


def gradients_of(activations: str) -> str:
    """What gradients of activations that are stored so are stored as: a mean loss divides them by the batch, and
    float16 loses what is below 6e-8."""
    return "bfloat16" if activations == "bfloat16" else "float32"


def to_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as arrays of that type hold them, rounded to the nearest, ties to even."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(BITS)


def to_float(array: np.ndarray) -> np.ndarray:
    """float32 of what `to_stored` gave; others as they are."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == BITS else array


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as they are after they were stored."""
    return to_float(to_stored(values, dtype))

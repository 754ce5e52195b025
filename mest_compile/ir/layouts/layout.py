"""Sizes of elements."""

from __future__ import annotations

FLOAT_BYTES = 4
ITEM_BYTES = {"float32": 4, "float16": 2, "int32": 4}
ACTIVATIONS = ("float32", "float16")  # what forward values may be stored as

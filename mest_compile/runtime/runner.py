"""What holds a step's arrays and runs its programs: in this process, on a GPU, on a device at the other end of a link, from an artifact.

A step is written against this; runners differ only in where arrays lie and how programs start.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Runner(Protocol):
    """uploaded_bytes: arrays and code sent to another device so far; 0 where there is none."""

    uploaded_bytes: int

    def put(self, name: str, array: np.ndarray) -> None:
        """Copies an array, flat, under that name; the caller may change it afterwards. A new size makes a new buffer. Need not wait."""

    def get(self, name: str) -> np.ndarray:
        """A copy of the array of that name, flat, after all that was asked for before is done."""
        ...

    def run(self, function: str) -> None:
        """Starts one of `FUNCTIONS`; `get` waits for it."""

    def profile(self, function: str, repeats: int) -> dict[str, float]:
        """{call: seconds}, the median of `repeats` runs, "rest" beside the kernels. Arrays that the function writes change."""
        ...

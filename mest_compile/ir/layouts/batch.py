"""Images with pixels times examples innermost, in slices of examples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mest_compile.ir.layouts.layout import BITS, ITEM_BYTES
from mest_compile.ir.problem import ASIDE, SIZE


@dataclass(frozen=True, slots=True)
class Image:
    """How an activation lies in memory: (slices, channels, top + height + bottom, left + width + right, vector), C
    order.

    batch   examples; a slice holds `vector` of them, so that neighbouring pixels of a channel stand side by side
    halo    (top, left, bottom, right) pixels around every channel, always zero, so that padding needs no copy
    dtype   what it is stored as; kernels compute in float32 whatever it is
    Lanes from `batch` on hold no example: their content is arbitrary but finite in forward values and must be 0 in
    gradients.
    """

    channels: int = field(metadata=SIZE)
    height: int = field(metadata=SIZE)
    width: int = field(metadata=SIZE)
    batch: int = field(metadata=SIZE)
    halo: tuple[int, int, int, int] = field(default=(0, 0, 0, 0), metadata=ASIDE)
    vector: int = 8
    dtype: str = "float32"

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def array_dtype(self) -> str:
        """Type of its arrays, which NumPy and TVM know."""
        return BITS if self.dtype == "bfloat16" else self.dtype

    @property
    def slices(self) -> int:
        return -(-self.batch // self.vector)

    @property
    def lanes(self) -> int:
        """Examples there is room for: batch rounded up to whole vectors."""
        return self.slices * self.vector

    @property
    def rows(self) -> int:
        """Rows of a channel, halo included."""
        return self.halo[0] + self.height + self.halo[2]

    @property
    def columns(self) -> int:
        """Pixels of a row, halo included."""
        return self.halo[1] + self.width + self.halo[3]

    @property
    def row_elems(self) -> int:
        return self.columns * self.vector

    @property
    def channel_elems(self) -> int:
        return self.rows * self.row_elems

    @property
    def slice_elems(self) -> int:
        return self.channels * self.channel_elems

    @property
    def elems(self) -> int:
        return self.slices * self.slice_elems

    @property
    def origin(self) -> int:
        """Elements from the start of a channel to its first real pixel."""
        return self.halo[0] * self.row_elems + self.halo[1] * self.vector

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """The array's shape, halo and empty lanes included."""
        return self.slices, self.channels, self.rows, self.columns, self.vector

    @property
    def interior(self) -> tuple[slice, ...]:
        """Index of the real pixels, all lanes, in an array of `shape`."""
        return (
            slice(None),
            slice(None),
            slice(self.halo[0], self.halo[0] + self.height),
            slice(self.halo[1], self.halo[1] + self.width),
        )

    def pack(self, values: np.ndarray, empty: float = 0.0, halo: float = 0.0) -> np.ndarray:
        """An array of `shape` that holds values (channels, height, width, batch); `empty` fills lanes without an
        example."""
        array = np.full(self.shape, halo, values.dtype)
        lanes = np.full((*values.shape[:3], self.lanes), empty, values.dtype)
        lanes[..., : self.batch] = values
        array[self.interior] = np.moveaxis(lanes.reshape(*values.shape[:3], self.slices, self.vector), 3, 0)
        return array

    def unpack(self, array: np.ndarray, empty_lanes: bool = False) -> np.ndarray:
        """(channels, height, width, batch) of a flat array or one of `shape`; `empty_lanes`: those without an example
        too."""
        inside = np.moveaxis(array.reshape(self.shape)[self.interior], 0, 3)
        lanes = inside.reshape(*inside.shape[:3], self.lanes)
        return lanes if empty_lanes else lanes[..., : self.batch]

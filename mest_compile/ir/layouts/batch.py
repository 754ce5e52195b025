"""Images with pixels times examples innermost, in slices of examples."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from mest_compile.ir.layouts.layout import BITS, ITEM_BYTES
from mest_compile.ir.problem import ASIDE, SIZE

GAP_BYTES = 128  # two cache lines, of which a tile of pixels may be
SETS_BYTES = 1024  # of 4 KiB that a way of the first-level cache holds


@dataclass(frozen=True, slots=True)
class Image:
    """How an activation lies in memory: (slices, channels, top + height + bottom, left + width + right, vector), C
    order.

    batch   examples; a slice holds `vector` of them, so that neighbouring pixels of a channel stand side by side
    halo    (top, left, bottom, right) pixels around every channel, always zero, so that padding needs no copy
    dtype   what it is stored as; kernels compute in float32 whatever it is
    abreast  neighbouring pixels of a row that kernels take as one vector, where a slice has fewer examples than a
            vector has lanes; the last vector of a row may end in the right halo
    combed  n: a row has the columns 0, n, 2n, ... first, then 1, n + 1, ..., each part with a left and a right halo of
            its own, so that what a stride of n reads are neighbours
    gap     elements behind a channel that nobody reads
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
    abreast: int = 1
    combed: int = 1
    gap: int = field(default=0, metadata=ASIDE)

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
    def part_columns(self) -> int:
        """Pixels of a combed row's part, halo included."""
        return self.halo[1] + -(-self.width // self.combed) + self.halo[3]

    @property
    def columns(self) -> int:
        """Pixels of a row, halo included."""
        return self.part_columns * self.combed

    @property
    def floats(self) -> int:
        """Elements of a vector."""
        return self.abreast * self.vector

    @property
    def row_elems(self) -> int:
        return self.columns * self.vector

    @property
    def channel_elems(self) -> int:
        return self.rows * self.row_elems + self.gap

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

    def haloed(self, halo: tuple[int, int, int, int]) -> Image:
        """With that halo, wider where the last vector of a row ends behind it."""
        over = overhang(-(-self.width // self.combed), self.abreast)
        return replace(self, halo=(*halo[:3], max(halo[3], over)))

    def spread(self) -> Image:
        """With a gap where channels lie a multiple of 1 KiB apart: their pixels would all be in the same few sets of a
        cache, which a kernel that reads many channels of a pixel throws out again and again (dense 1x1 convolutions of
        ResNet-50 at 32x32 run at 70 instead of 33 GFLOP/s). Rows of several pixels a vector stay as they are."""
        together = self.channel_elems * self.item_bytes % SETS_BYTES == 0
        if not together or self.abreast > 1 or self.channels == 1 or self.height * self.width == 1:
            return self
        return replace(self, gap=GAP_BYTES // self.item_bytes)

    def column(self, x: int) -> int:
        """Elements from a row's pixel 0 to its pixel x, which may lie in the halo."""
        return (x % self.combed * self.part_columns + x // self.combed) * self.vector

    def apart(self, step: int, pixels: int) -> int:
        """Elements from a vector of `pixels` pixels, of which one is `step` columns from the next, to the vector behind
        it."""
        assert pixels == 1 or step == self.combed, f"{pixels} pixels that are {step} apart are no vector of {self}"
        return pixels * self.vector * step // self.combed

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """That of an array's `view`, halo and empty lanes included."""
        return self.slices, self.channels, self.rows, self.columns, self.vector

    def view(self, array: np.ndarray) -> np.ndarray:
        """A flat array, or one of `shape`, in `shape`, without the gaps."""
        if not self.gap or array.shape == self.shape:
            return array.reshape(self.shape)
        strides = (self.slice_elems, self.channel_elems, self.row_elems, self.vector, 1)
        return np.lib.stride_tricks.as_strided(
            array.reshape(self.elems), self.shape, [stride * array.itemsize for stride in strides]
        )

    @property
    def interior(self) -> tuple[slice | np.ndarray, ...]:
        """Index of the real pixels, all lanes, in an array of `shape`."""
        columns: slice | np.ndarray = slice(self.halo[1], self.halo[1] + self.width)
        if self.combed > 1:
            x = np.arange(self.width)
            columns = self.halo[1] + x % self.combed * self.part_columns + x // self.combed
        return slice(None), slice(None), slice(self.halo[0], self.halo[0] + self.height), columns

    def pack(self, values: np.ndarray, empty: float = 0.0, halo: float = 0.0) -> np.ndarray:
        """An array of `shape`, flat where there are gaps, that holds values (channels, height, width, batch); `empty`
        fills lanes without an example."""
        array = np.full(self.elems, halo, values.dtype)
        lanes = np.full((*values.shape[:3], self.lanes), empty, values.dtype)
        lanes[..., : self.batch] = values
        self.view(array)[self.interior] = np.moveaxis(lanes.reshape(*values.shape[:3], self.slices, self.vector), 3, 0)
        return array if self.gap else array.reshape(self.shape)

    def unpack(self, array: np.ndarray, empty_lanes: bool = False) -> np.ndarray:
        """(channels, height, width, batch) of a flat array or one of `shape`; `empty_lanes`: those without an example
        too."""
        inside = np.moveaxis(self.view(array)[self.interior], 0, 3)
        lanes = inside.reshape(*inside.shape[:3], self.lanes)
        return lanes if empty_lanes else lanes[..., : self.batch]


def abreast(width: int, examples: int, lanes: int) -> int:
    """`Image.abreast` of rows of `width` pixels, `examples` in a slice, on vectors of up to `lanes` floats: the fewest
    vectors a row, the narrowest of those that are as few. All are powers of two but the width."""
    counts = [1 << power for power in range((lanes // examples).bit_length())]
    return min(counts, key=lambda pixels: (-(-width // pixels), pixels))


def overhang(width: int, pixels: int) -> int:
    """Columns from a row's end to that of its last vector of `pixels`."""
    return -width % pixels

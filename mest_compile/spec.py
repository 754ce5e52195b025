"""Frozen facts that the rest of the compiler passes around. Everything checks itself when made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np

from mest_compile import checks
from mest_compile.errors import SpecError

FLOAT_BYTES = 4
ITEM_BYTES = {"float32": 4, "float16": 2, "int32": 4}
ACTIVATIONS = ("float32", "float16")  # what forward values may be stored as


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A trainable convolution or linear layer, every size known when we compile.

    name          torch name of its weight: "layer1.0.conv1.weight"
    weight_shape  (out, in, kh, kw), elements; a linear layer is (out, in, 1, 1)
    input_shape   (batch, in, h, w), elements; a linear layer is (batch, in, 1, 1)
    stride, padding  (y, x), pixels
    """

    name: str
    weight_shape: tuple[int, int, int, int]
    input_shape: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def __post_init__(self):
        if self.weight_shape[1] != self.input_shape[1]:
            raise SpecError(f"{self.name}: the weight takes {self.weight_shape[1]} channels, "
                            f"the input has {self.input_shape[1]}")
        if min(self.output_size) < 1:
            raise SpecError(f"{self.name}: a {self.input_shape[2]}x{self.input_shape[3]} input is too small for "
                            f"a {self.weight_shape[2]}x{self.weight_shape[3]} kernel with padding {self.padding}")

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the output, pixels."""
        return tuple((size + 2 * pad - kernel) // step + 1 for size, pad, kernel, step in
                     zip(self.input_shape[2:], self.padding, self.weight_shape[2:], self.stride))  # type: ignore

    @property
    def weight_elems(self) -> int:
        out, inputs, height, width = self.weight_shape
        return out * inputs * height * width


@dataclass(frozen=True, slots=True)
class SGD:
    """torch.optim.SGD's rule: lr, momentum, weight_decay (L2, on every parameter), nesterov."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False

    def __post_init__(self):
        for name, below in (("lr", inf), ("momentum", 1.0), ("weight_decay", inf)):
            object.__setattr__(self, name, checks.number(f"SGD: {name}", getattr(self, name), below=below, error=SpecError))
        checks.flag("SGD: nesterov", self.nesterov, error=SpecError)
        if self.nesterov and self.momentum == 0:
            raise SpecError("nesterov needs a momentum above 0")


@dataclass(frozen=True, slots=True)
class Node:
    """One operator of the forward graph.

    op      name in the operator registry: "conv2d", "linear", "batch_norm", "relu", "add", "max_pool2d", "avg_pool2d",
            "global_avg_pool", "flatten"
    name    unique; the dotted torch module path where there is one
    inputs  names of the producing nodes; "input" is the graph's input
    params  role -> torch parameter or buffer name. conv2d, linear: weight, bias?; batch_norm: weight, bias, running_mean, running_var
    attrs   conv2d: stride, padding; batch_norm: eps, momentum (torch's: share of the new statistics); pools: kernel, stride,
            padding, avg_pool2d also count_include_pad
    shape   of the output: (N, C, H, W) or (N, features)
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    params: Mapping[str, str] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ForwardGraph:
    """A model's forward pass in topological order; the last node gives the logits (N, classes).

    state_shapes  every parameter and buffer of the model by torch name, in torch's order and shape
    """

    nodes: tuple[Node, ...]
    input_shape: tuple[int, ...]
    state_shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Image:
    """How an activation lies in memory: (slices, channels, top + height + bottom, left + width + right, vector), C order.

    batch   examples; a slice holds `vector` of them, so that neighbouring pixels of a channel stand side by side
    halo    (top, left, bottom, right) pixels around every channel, always zero, so that padding needs no copy
    dtype   what it is stored as; kernels compute in float32 whatever it is
    Lanes from `batch` on hold no example: their content is arbitrary but finite in forward values and must be 0 in gradients.
    """

    channels: int
    height: int
    width: int
    batch: int
    halo: tuple[int, int, int, int] = (0, 0, 0, 0)
    vector: int = 8
    dtype: str = "float32"

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

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
        return (slice(None), slice(None), slice(self.halo[0], self.halo[0] + self.height), slice(self.halo[1], self.halo[1] + self.width))

    def pack(self, values: np.ndarray, empty: float = 0.0, halo: float = 0.0) -> np.ndarray:
        """An array of `shape` that holds values (channels, height, width, batch); `empty` fills lanes without an example."""
        array = np.full(self.shape, halo, values.dtype)
        lanes = np.full((*values.shape[:3], self.lanes), empty, values.dtype)
        lanes[..., :self.batch] = values
        array[self.interior] = np.moveaxis(lanes.reshape(*values.shape[:3], self.slices, self.vector), 3, 0)
        return array

    def unpack(self, array: np.ndarray, empty_lanes: bool = False) -> np.ndarray:
        """(channels, height, width, batch) of a flat array or one of `shape`; `empty_lanes`: those without an example too."""
        inside = np.moveaxis(array.reshape(self.shape)[self.interior], 0, 3)
        lanes = inside.reshape(*inside.shape[:3], self.lanes)
        return lanes if empty_lanes else lanes[..., :self.batch]

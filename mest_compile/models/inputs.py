"""What images a net was trained on: their size, how they were cut out of photos, how pixels were scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import SpecError


@dataclass(frozen=True, slots=True)
class Inputs:
    """Pixels are 0 to 255, channels red, green, blue, or one that is grey; a net sees (pixels - mean) / std.

    size  (height, width)
    crop  share of the largest centred window of the size's proportions that is taken and resized, 0 < crop <= 1
    mean, std  a channel's, in pixels
    """

    size: tuple[int, int]
    crop: float = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (255.0, 255.0, 255.0)

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise SpecError(f"size is {checks.shown(self.size)}; wanted (height, width), whole numbers of 1 or more")
        if not 0 < self.crop <= 1:
            raise SpecError(f"crop is {checks.shown(self.crop)}; wanted a share above 0 and at most 1")
        if not self.mean or len(self.mean) != len(self.std) or not min(self.std) > 0:
            raise SpecError(
                f"mean is {checks.shown(self.mean)}, std {checks.shown(self.std)}; wanted a number for each channel, "
                "std above 0"
            )

    @property
    def channels(self) -> int:
        return len(self.mean)

    def window(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of what is taken of a picture of that size, whole pixels."""
        scale = min(width / self.size[1], height / self.size[0])
        # Rounded first: 0.8 * 3.75 * 8 may be a hair below 24.
        wide, high = (max(1, int(round(self.crop * scale * side, 6))) for side in (self.size[1], self.size[0]))
        left, top = (width - wide) // 2, (height - high) // 2
        return left, top, left + wide, top + high

    def scaled(self, pixels: np.ndarray) -> np.ndarray:
        """(pixels - mean) / std as contiguous float32; pixels (n, channels, height, width)."""
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        result = np.subtract(pixels, mean, dtype=np.float32)
        result /= std
        return np.ascontiguousarray(result)

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Inputs:
        """Raises KeyError, TypeError or SpecError where a document is none of `to_json`."""
        size, mean, std = (tuple(document[name]) for name in ("size", "mean", "std"))
        return cls((int(size[0]), int(size[1])), float(document["crop"]), mean, std)


@dataclass(frozen=True, slots=True)
class Reading:
    """How pictures become what a step is fed, and what its answers are called: what checkpoints, artifacts and exports
    carry.

    classes  names, in the order of outputs; empty: outputs are numbers
    inputs   None: images were made ready elsewhere, and nobody said how
    """

    classes: tuple[str, ...] = ()
    inputs: Inputs | None = None

    def name(self, place: int) -> str:
        """Of an output; its number where it has none."""
        return self.classes[place] if place < len(self.classes) else str(place)

    def to_json(self) -> dict[str, Any]:
        return {"classes": list(self.classes), "inputs": None if self.inputs is None else self.inputs.to_json()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Reading:
        """Raises KeyError, TypeError or SpecError where a document is none of `to_json`."""
        inputs = document["inputs"]
        return cls(tuple(map(str, document["classes"])), None if inputs is None else Inputs.from_json(inputs))

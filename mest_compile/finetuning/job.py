"""What a fine-tuning is asked to do, checked when it is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mest_compile.base import checks
from mest_compile.base.errors import UsageError
from mest_compile.models.inputs import Inputs
from mest_compile.options import StepOptions

SPARSITY = 0.8  # of what trains
EPOCHS, PATIENCE, BATCH = 30, 10, 16
TRAINABLE = "last:3"
OPTIMIZER = "adamw:lr=0.003"
VAL_SHARE = 0.1  # of the training images of a class, by which the best epoch is chosen where no others are given
GIB, MIB = 2**30, 2**20
BUFFER_BYTES = 16 * MIB
NAMED = (
    "model",
    "data",
    "test",
    "val",
    "weights",
    "continue_from",
)  # what a file can tell only where it is a name or a path


@dataclass(frozen=True, slots=True)
class Job:
    """The arguments of `mest.finetune`, which says what each means.

    options  of the step that trains the last blocks; its seed is that of all else
    """

    model: Any
    data: Any
    options: StepOptions
    test: Any = None
    val: Any = None
    weights: str | Path | None = None
    inputs: Inputs | None = None
    image: tuple[int, int, int] | None = None
    batch: int = BATCH
    epochs: int = EPOCHS
    seconds: float | None = None
    patience: int | None = PATIENCE
    augment: bool = False
    artifact: bool = False
    feature_bytes: int = GIB
    continue_from: str | Path | None = None
    buffer_bytes: int = BUFFER_BYTES
    spare_classes: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("epochs", 1), ("feature_bytes", 0), ("spare_classes", 0)):
            object.__setattr__(self, name, checks.whole(name, getattr(self, name), least))
        object.__setattr__(self, "buffer_bytes", checks.size("buffer_bytes", self.buffer_bytes, at_least=0))
        if self.patience is not None:
            object.__setattr__(self, "patience", checks.whole("patience", self.patience, 1, ", or None"))
        if self.seconds is not None:
            object.__setattr__(self, "seconds", checks.number("seconds", self.seconds, also=", or None for no limit"))
        for name in ("augment", "artifact"):
            checks.flag(name, getattr(self, name))
        if self.inputs is not None and not isinstance(self.inputs, Inputs):
            raise UsageError(f"inputs is {checks.shown(self.inputs)}; wanted mest.Inputs(size, crop, mean, std)")
        if self.image is not None:
            sizes = tuple(checks.whole("image", size, 1, ": (channels, height, width)") for size in self.image)
            if len(sizes) != 3:
                raise UsageError(f"image is {checks.shown(self.image)}; wanted (channels, height, width)")
            object.__setattr__(self, "image", sizes)

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` gives an equal job back where model and data are names or paths, which are None
        where they are objects."""

        def told(name: str, value: Any) -> Any:
            if isinstance(value, Path):
                return str(value.resolve())
            if name in NAMED:
                return value if isinstance(value, str) else None
            return value.to_json() if isinstance(value, Inputs | StepOptions) else value

        found = {one.name: told(one.name, getattr(self, one.name)) for one in fields(self)}
        return found | {"image": None if self.image is None else list(self.image)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Job:
        """Raises TypeError where a document says other things."""
        inputs, image = document["inputs"], document["image"]
        read = {
            "options": StepOptions.from_json(document["options"]),
            "inputs": None if inputs is None else Inputs.from_json(inputs),
            "image": None if image is None else tuple(image),
        }
        return cls(**{**document, **read})

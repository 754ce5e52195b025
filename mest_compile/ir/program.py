"""A program: the kernel calls of one step in order, and the buffers they use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.layouts.layout import ITEM_BYTES

# "statistics" is what a training step writes of its forward pass; "clip" bounds the norm of the gradients. "update",
# whose calls stand among those of the backward pass, uses held buffers only, so that it can be run on its own, as do
# "clip" and "zero", which is where gradients of several passes begin.
Stage = Literal["forward", "statistics", "backward", "clip", "update", "zero"]
FUNCTIONS: dict[str, tuple[str, tuple[Stage, ...]]] = {  # what a step can run: program and its stages
    "train": ("train", ("forward", "statistics", "backward", "update")),
    "gradients": ("train", ("forward", "backward")),
    "backward": ("train", ("forward", "statistics", "backward", "clip")),
    "update": ("train", ("update",)),
    "predict": ("predict", ("forward",)),
}
ADDING: dict[str, tuple[str, tuple[Stage, ...]]] = {  # the same of a step whose passes' gradients add up
    "zero": ("train", ("zero",)),
    "add": ("train", ("forward", "statistics", "backward")),
    "gradients": ("train", ("forward", "backward")),
    "clip": ("train", ("clip",)),
    "update": ("train", ("update",)),
    "predict": ("predict", ("forward",)),
}
OF_BATCH = frozenset(("train", "gradients", "backward", "add"))  # those that read a batch and its labels


# How often a phase of a layer multiplies every live weight with the pixels that read it.
PRODUCTS = {"forward": 1, "recompute": 1, "grad_input": 1, "grad_weight": 1, "backward": 2}


@dataclass(eq=False, slots=True)
class Buffer:
    """A flat array on the device.

    elems       None when it depends on the mask: such buffers are always held by the step
    kind        what its bytes are counted as: "batch", "values", "indices", "gradients", "optimizer", "arena"
    image       how an activation lies in it, None for anything else
    parts       torch names of the dense parameters or statistics in it, one after another
    layer       the layer's weight, where a layer holds it; `role` is what it is of the layer: "" its values,
                "gradient", an index array
    sharers     weights of the layers that use it one after another, where it is as large as the largest needs it
    """

    name: str
    elems: int | None
    dtype: str = "float32"
    kind: str = "arena"
    image: Image | None = None
    parts: tuple[str, ...] = ()
    layer: str = ""
    role: str = ""
    sharers: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        """Held by the step from one call to the next; the others share the arena."""
        return self.kind != "arena"

    @property
    def size_bytes(self) -> int:
        assert self.elems is not None, f"{self.name} has no size before a mask is known"
        return self.elems * ITEM_BYTES[self.dtype]


class Activation(Buffer):
    """A value of the graph or its gradient: an image lies in it."""

    image: Image


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel call. `name` is unique in its step ("layer1.0.conv1.forward"); equal (kernel, problem) share one
    compiled kernel.

    phase  of a convolution or linear layer: "forward", "recompute", "grad_input", "grad_weight", "grad_bias", or
           "backward" where one kernel has both gradients; "" for other calls
    """

    name: str
    kernel: str
    problem: Any
    buffers: tuple[Buffer, ...]
    stage: Stage
    phase: str = ""

    @property
    def layer(self) -> str:
        """Weight name of the layer whose values, gradients or index it takes first, "" where there is none."""
        return self.buffers[0].layer


@dataclass(slots=True)
class Program:
    """Calls in order.

    slots   the arena's storages in bytes
    places  of every temporary buffer (slot, bytes from its start); `ir/arena.py` chooses both
    kept    buffers that the step holds whether a call takes them or not
    """

    name: str
    calls: list[Call]
    slots: list[int] = field(default_factory=list)
    places: dict[Buffer, tuple[int, int]] = field(default_factory=dict)
    kept: tuple[Buffer, ...] = ()

    def buffers(self) -> list[Buffer]:
        """Every buffer once, in order of first use."""
        return list(dict.fromkeys(buffer for call in self.calls for buffer in call.buffers))

    def held(self) -> list[Buffer]:
        return [buffer for buffer in dict.fromkeys((*self.buffers(), *self.kept)) if buffer.held]

    @property
    def adds(self) -> bool:
        """Whether gradients are added to what is there."""
        return any(call.stage == "zero" for call in self.calls)

    @property
    def functions(self) -> Mapping[str, tuple[str, tuple[Stage, ...]]]:
        """What a step of this training program can run."""
        return ADDING if self.adds else FUNCTIONS

    def lifetimes(self) -> dict[Buffer, tuple[int, int]]:
        """Temporary buffer -> places of the first and the last call that takes it."""
        found: dict[Buffer, tuple[int, int]] = {}
        for place, call in enumerate(self.calls):
            for buffer in call.buffers:
                if not buffer.held:
                    found[buffer] = found.get(buffer, (place, place))[0], place
        return found

    def saved_bytes(self) -> int:
        """Arena bytes that the forward pass leaves for the backward pass."""
        turn = next((place for place, call in enumerate(self.calls) if call.stage == "backward"), len(self.calls))
        return sum(buffer.size_bytes for buffer, (first, last) in self.lifetimes().items() if first < turn <= last)

    @property
    def arena_bytes(self) -> int:
        return sum(self.slots)


Functions = Mapping[str, tuple[Program, tuple[Stage, ...]]]  # name -> a program and the stages of it that are run


def function_name(name: str, examples: int | None) -> str:
    """Of one of OF_BATCH for fewer examples than the step's programs are of; None: for as many."""
    return name if examples is None else f"of{examples}_{name}"


def functions_of_fewer(train: Program, examples: int) -> Functions:
    """What a step can run of a training program for so many examples."""
    return {
        function_name(name, examples): (train, stages)
        for name, (_, stages) in train.functions.items()
        if name in OF_BATCH
    }


def functions_of(train: Program, predict: Program, number: int = 0) -> Functions:
    """What a step can run, by name: a program and the stages of it. number: of one of several steps in a library, the
    first being 0; names end with it."""
    programs = {"train": train, "predict": predict}
    return {f"{name}{number or ''}": (programs[program], stages) for name, (program, stages) in train.functions.items()}

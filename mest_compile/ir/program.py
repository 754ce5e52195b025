"""A program: the kernel calls of one step in order, the buffers they use, and where the temporary ones lie in
memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
    """

    name: str
    elems: int | None
    dtype: str = "float32"
    kind: str = "arena"
    image: Image | None = None
    parts: tuple[str, ...] = ()
    layer: str = ""
    role: str = ""

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
    """Calls in order. `slots` are the arena's storages in bytes; `slot_of` says which one holds a temporary buffer;
    `kept` are buffers that the step holds whether a call takes them or not."""

    name: str
    calls: list[Call]
    slots: list[int] = field(default_factory=list)
    slot_of: dict[Buffer, int] = field(default_factory=dict)
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

    def saved_bytes(self) -> int:
        """Arena bytes that the forward pass leaves for the backward pass."""
        born, dies = _lifetimes(self.calls)
        turn = next((place for place, call in enumerate(self.calls) if call.stage == "backward"), len(self.calls))
        return sum(buffer.size_bytes for buffer in born if born[buffer] < turn <= dies[buffer])

    @property
    def arena_bytes(self) -> int:
        return sum(self.slots)


def _lifetimes(calls: Sequence[Call]) -> tuple[dict[Buffer, int], dict[Buffer, int]]:
    """(first, last) call of every temporary buffer."""
    born: dict[Buffer, int] = {}
    dies: dict[Buffer, int] = {}
    for place, call in enumerate(calls):
        for buffer in call.buffers:
            if not buffer.held:
                born.setdefault(buffer, place)
                dies[buffer] = place
    return born, dies


def plan_memory(program: Program, slots: Sequence[int] = ()) -> None:
    """Gives every temporary buffer a slot, such that no two that live at the same time share one.

    `slots` (bytes) are there already and used first: the evaluation program runs in the training program's memory.
    Large buffers come first, each into the smallest slot that is free while it lives; a new slot is made when there is
    none. So small ones fill the gaps in the lives of large ones. Source: "greedy by size" of Pisarchyk and Lee,
    arXiv:2001.03288.
    """
    born, dies = _lifetimes(program.calls)
    sizes = list(slots)
    taken: list[list[tuple[int, int]]] = [[] for _ in sizes]
    for buffer in sorted(born, key=lambda b: (-b.size_bytes, born[b])):
        first, last = born[buffer], dies[buffer]
        free = [
            slot
            for slot, size in enumerate(sizes)
            if size >= buffer.size_bytes
            and all(last < other_first or other_last < first for other_first, other_last in taken[slot])
        ]
        slot = min(free, key=sizes.__getitem__, default=len(sizes))
        if slot == len(sizes):
            sizes.append(buffer.size_bytes)
            taken.append([])
        program.slot_of[buffer] = slot
        taken[slot].append((first, last))
    program.slots = sizes


def plan_memory_like(program: Program, like: Program) -> None:
    """Gives the temporary buffers of a program those slots that the same ones, which are no smaller, have in a program
    of the same calls for more examples. Where calls differ it plans anew, in slots that are there as far as it can."""
    theirs, mine = (_numbered(one.buffers()) for one in (like, program))
    if all(
        key in theirs and buffer.size_bytes <= like.slots[like.slot_of[theirs[key]]] for key, buffer in mine.items()
    ):
        program.slots = list(like.slots)
        program.slot_of = {buffer: like.slot_of[theirs[key]] for key, buffer in mine.items()}
    else:
        plan_memory(program, like.slots)


def _numbered(buffers: Iterable[Buffer]) -> dict[tuple[str, int], Buffer]:
    """(name, how many of that name came before) -> temporary buffer: a value that is computed again comes again."""
    counts: Counter[str] = Counter()
    found = {}
    for buffer in buffers:
        if not buffer.held:
            found[buffer.name, counts[buffer.name]] = buffer
            counts[buffer.name] += 1
    return found


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

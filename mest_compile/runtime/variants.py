"""Which kernel a layer's phase runs on: the indexed one, or one with the layer's structure baked in. A pure function of
measured times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Variant = Literal["indexed", "specialized"]
LEAST_GAIN = 0.02  # of a kernel's time: less is within what two measurements of the same kernel differ by


@dataclass(frozen=True, slots=True)
class Times:
    """Of one kernel call, measured. compile_seconds: of the specialized kernel in a compile worker; 0 where it is
    compiled already."""

    indexed_seconds: float
    specialized_seconds: float
    compile_seconds: float


@dataclass(frozen=True, slots=True)
class Choice:
    """variant, and in one line why."""

    variant: Variant
    why: str


def choose(times: Times, steps: int | None) -> Choice:
    """The variant of least time until the structure is next expected to change, compiling included.

    steps  between two mutations; None: there are no mutations, and compiling is always paid back
    What is compiled in the background takes the processor from the step, so its seconds count in full.
    Source: ours.
    """
    gain = times.indexed_seconds - times.specialized_seconds
    said = f"{times.specialized_seconds * 1e3:.3f} ms against {times.indexed_seconds * 1e3:.3f} ms a step"
    if gain < LEAST_GAIN * times.indexed_seconds:
        return Choice("indexed", f"no gain: specialized {said}")
    if times.compile_seconds == 0:
        return Choice("specialized", f"{said}, compiled already")
    paid = times.compile_seconds / gain
    said += f"; {times.compile_seconds:.2f} s of compiling are paid back in {paid:.0f} steps"
    if steps is None:
        return Choice("specialized", said)
    return Choice("specialized" if steps > paid else "indexed", f"{said} of {steps} between mutations")

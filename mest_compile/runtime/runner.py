"""What holds a step's arrays and runs its programs: in this process, on a GPU, on a device at the other end of a link,
from an artifact.

A step is written against this; runners differ only in where arrays lie and how programs start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mest_compile.ir.program import Functions


class Runner(Protocol):
    """uploaded_bytes: arrays and code sent to another device so far; 0 where there is none."""

    uploaded_bytes: int

    def put(self, name: str, array: np.ndarray) -> None:
        """Copies an array, flat, under that name; the caller may change it afterwards. A new size makes a new buffer.
        Need not wait."""

    def get(self, name: str) -> np.ndarray:
        """A copy of the array of that name, flat, after all that was asked for before is done."""
        ...

    def run(self, function: str) -> None:
        """Starts one of `FUNCTIONS`; `get` waits for it."""

    def profile(self, function: str, repeats: int) -> dict[str, float]:
        """{call: seconds}, the median of `repeats` runs, "rest" beside the kernels. Arrays that the function writes
        change."""
        ...


@runtime_checkable
class Exchanges(Protocol):
    """A runner whose kernels can be exchanged one by one."""

    def exchange(self, kernels: Mapping[str, Any]) -> None:
        """Puts other kernels in place of some of the training program's: {call name: callable}."""


@runtime_checkable
class Extends(Protocol):
    """A runner that can be given more to run."""

    def extend(self, programs: Functions, code: Any) -> None:
        """Lets `run` run more, of the same arrays and in the same memory. code: as it was made with."""

    def forget(self, functions: Iterable[str]) -> None:
        """Lets go of what `extend` brought."""


@runtime_checkable
class SendsAhead(Protocol):
    """A runner that sends what comes next to another device while that computes."""

    def put_ahead(self, name: str, array: np.ndarray) -> None:
        """Sends the array that `name` is to be after `turn`."""

    def turn(self) -> None:
        """What was sent ahead is the present from now on."""


@runtime_checkable
class Clocked(Protocol):
    """A runner that reads the clock of its device."""

    def seconds(self, function: str, repeats: int) -> list[float]:
        """Of each of `repeats` runs of one of `FUNCTIONS`."""
        ...


@runtime_checkable
class Spares(Protocol):
    """A runner whose programs keep memory while none of them runs."""

    def spare(self) -> None:
        """Gives it back; the next run takes it again."""


@runtime_checkable
class Closes(Protocol):
    """A runner on a device that has to be given back."""

    def close(self) -> None:
        """Gives the device back. What the step held there is lost."""

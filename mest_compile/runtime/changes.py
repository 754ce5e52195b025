"""Changes of a step that are made whole, whatever interrupts them: a list of what is left to do, which is done before
anything else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from mest_compile.base import exclusive

P = ParamSpec("P")
R = TypeVar("R")

# A part may be called again when it was interrupted: it writes the same however often, or it writes nothing and returns
# the parts that do.
Part = Callable[[], "Sequence[Part] | None"]


class Changes:
    """What is left of a change of a step. Ctrl-C, or any other exception, leaves the change before its first part or to
    be finished."""

    def __init__(self) -> None:
        self._left: tuple[Part, ...] = ()

    def begin(self, *parts: Part) -> None:
        """Makes `parts` what is left to do, in place of what was, and does nothing of it yet."""
        self._left = parts

    def make(self, *parts: Part) -> None:
        """`begin`, and `finish`."""
        self._left = parts
        self.finish()

    def finish(self) -> None:
        """Does what is left. Whatever a part raises stays left with it."""
        while left := self._left:
            more = left[0]() or ()
            if self._left is left:  # otherwise a signal's handler came in between and has finished
                self._left = (*more, *left[1:])


class Shared(Protocol):
    """What several threads use, one after another."""

    _turn: threading.RLock
    _changes: Changes


S = TypeVar("S", bound=Shared)


def in_turn(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Callers in several threads take turns, and a change that was interrupted is finished before anything else."""

    @wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        exclusive.check_process()  # first: in a forked process nobody would give the turn back
        with self._turn:
            self._changes.finish()
            return method(self, *args, **kwargs)

    return call

"""Compiling as seen on stderr: how many kernels are done, and the time left."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class CompileProgress:
    """How far compiling is, on a rich status; a context manager. `told` is a Builder's `progress`."""

    def __init__(self, console: Console, what: str):
        self._what, self._console = what, console
        self._status = console.status(what)
        self._began = perf_counter()

    def __enter__(self) -> CompileProgress:
        self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        self._status.stop()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._console.print("stopped while compiling; what was compiled is kept and serves the next start")

    def told(self, done: int, total: int) -> None:
        left = (perf_counter() - self._began) / max(done, 1) * (total - done)
        self._status.update(f"{self._what}: {done} of {total} kernels" + (f", {left:.0f} s left" if done else ""))

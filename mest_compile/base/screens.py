"""Where somebody may be watching a Python program: on a terminal, or in a notebook."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import TextIO


def in_notebook() -> bool:
    """Whether cells of a notebook run in this process."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return shell is not None and hasattr(shell, "kernel")


def screen() -> TextIO | None:
    """Where progress is shown: stderr of a terminal, a notebook's output, which has stderr in red. None: nobody
    watches."""
    if in_notebook():
        return sys.stdout
    return sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None


class CompileLine:
    """One line that says how far compiling is, where somebody watches, and goes when that is done; of what takes less
    than a second, nothing."""

    def __init__(self) -> None:
        self._began, self._wide = 0.0, 0

    def __call__(self, done: int, total: int) -> None:
        if done == 1:
            self._began = perf_counter()
        passed, where = perf_counter() - self._began, screen()
        if where is None or (passed < 1 and not self._wide):
            return
        left = passed / max(done - 1, 1) * (total - done)
        line = "" if done == total else f"compiling: {done} of {total} kernels, {left:.0f} s left"
        where.write(f"\r{line:<{self._wide}}\r{line}")
        where.flush()
        self._wide = len(line)

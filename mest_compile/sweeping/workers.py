"""Where a sweep's commands run: processes of this machine, each with threads of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

LOST = -1  # exit code of a command that did not end by itself: killed, or on a machine that is gone


def command_line(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "mest_compile.sweeping.work", str(os.getpid()), *arguments]


def environment(threads: int) -> dict[str, str]:
    """Of a command with so many threads: libraries' pools have as many, and do not choose cores themselves."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_NUM_THREADS"), threads)
    return {**os.environ, **{name: str(count) for name, count in counts.items()}, "TVM_BIND_THREADS": "0"}


class Workers(Protocol):
    """Who runs commands."""

    @property
    def slots(self) -> int:
        """How many at once."""

    def start(self, job: int, arguments: Sequence[str], log: Path) -> None:
        """Begins `mest-compile` with such arguments, whose output is added to the file `log`; job: the caller's name
        for it, of which there are none twice at a time."""

    def ended(self) -> dict[int, int]:
        """{job: exit code, or LOST} of those that have ended since it was asked last. Does not wait."""

    def close(self) -> None:
        """Kills what still runs."""


class LocalWorkers:
    """Processes here, so many at once, each with so many threads. All may use all cores, and the system spreads them:
    with fewer cores in sight kernels are cut otherwise, and a cell would not be what it is when trained alone."""

    def __init__(self, slots: int, threads: int):
        self.slots, self._threads = slots, threads
        self._running: dict[int, subprocess.Popen] = {}

    def start(self, job: int, arguments: Sequence[str], log: Path) -> None:
        with log.open("ab") as file:
            self._running[job] = subprocess.Popen(
                command_line(arguments),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(self._threads),
            )

    def ended(self) -> dict[int, int]:
        codes = {job: code for job, one in self._running.items() if (code := one.poll()) is not None}
        for job in codes:
            del self._running[job]
        return {job: LOST if code < 0 else code for job, code in codes.items()}

    def close(self) -> None:
        for one in self._running.values():
            one.kill()
        for one in self._running.values():
            one.wait()
        self._running.clear()

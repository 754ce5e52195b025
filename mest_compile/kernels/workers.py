"""Processes that compile kernels while training goes on.

A worker is a Python process of its own, started when the first kernel is asked for and kept: TVM's parser runs one at a
time within a process, a fork would copy a thread pool without its threads, and starting costs a second. It reads
requests and writes answers, a line of JSON each, and leaves what it compiles in the kernel cache, from where the
trainer loads it. It runs at idle priority, and beside training rests most of the time: without rests a step on all
cores takes 1.3 times as long.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from mest_compile.base.errors import BuildError
from mest_compile.hardware.host import cores, end_with_parent
from mest_compile.hardware.target import Target
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import KernelSource

log = logging.getLogger(__name__)
SHARE = 0.05  # of the time: a step of the wide ResNet-32 takes 1.02 times as long then (docs/planning.md)
RUN_SECONDS = 0.02  # at a time


@dataclass(frozen=True, slots=True)
class Built:
    """A request's end: the kernel is in the cache, or `problem` says why not. seconds: spent in the worker on it."""

    key: str
    seconds: float
    problem: str | None = None


class Workers:
    """Compiles kernels into the cache of `folder`, `count` at a time. processes: those that live.

    share  of the time that they run while nobody waits for them, 0 < share <= 1; None: so little that a step is hardly
           slower
    """

    def __init__(self, folder: Path, count: int | None = None, share: float | None = None):
        self.folder = folder
        self.count = count or max(1, cores() // 2)
        self.share = share or SHARE
        self._hurry = threading.Event()  # somebody waits: no rests
        self.started = False
        self._requests: Queue[KernelSource | None] = Queue()  # None: no more will come
        self._done: Queue[Built] = Queue()
        self._asked: set[str] = set()
        self.processes: list[subprocess.Popen] = []

    def ask(self, sources: Iterable[KernelSource]) -> None:
        """Begins to compile those that were not asked for before; returns at once."""
        for source in sources:
            if source.key not in self._asked:
                self._asked.add(source.key)
                self._requests.put(source)
        if not self.started and not self._requests.empty():
            self.started = True
            atexit.register(self.close)
            for _ in range(self.count):
                begun = threading.Event()
                threading.Thread(target=self._feed, args=(begun,), daemon=True).start()
                begun.wait()
            if self.share < 1:
                threading.Thread(target=self._pace, daemon=True).start()
        elif not self.processes:
            self._refuse()

    def done(self) -> list[Built]:
        """What has ended since the last call."""
        found = []
        while True:
            try:
                found.append(self._done.get_nowait())
            except Empty:
                break
        self._asked -= {built.key for built in found}
        return found

    def wait(self, sources: Iterable[KernelSource], timeout_seconds: float = 600) -> list[Built]:
        """Asks, and waits until all of them have ended. Raises BuildError after timeout_seconds without one that
        ends."""
        self._hurry.set()
        try:
            return self._wait(sources, timeout_seconds)
        finally:
            self._hurry.clear()

    def _wait(self, sources: Iterable[KernelSource], timeout_seconds: float) -> list[Built]:
        wanted = {source.key: source for source in sources}
        self.ask(wanted.values())
        found: dict[str, Built] = {}
        others: list[Built] = []
        while found.keys() < wanted.keys():
            try:
                built = self._done.get(timeout=timeout_seconds)
            except Empty:
                raise BuildError(
                    f"compile workers gave no answer for {timeout_seconds:.0f} s; go on without specialize"
                ) from None
            if built.key in wanted:
                found[built.key] = built
                self._asked.discard(built.key)
            else:
                others.append(built)
        for built in others:  # of those that `done` tells of
            self._done.put(built)
        return list(found.values())

    def dismiss(self) -> None:
        """Lets the processes end when they have done what they were asked for; nothing is asked of them any more."""
        for _ in range(self.count):
            self._requests.put(None)

    def close(self) -> None:
        """Ends the processes."""
        processes, self.processes = self.processes, []
        for process in processes:
            process.kill()
            process.wait()

    def _refuse(self) -> None:
        while not self._requests.empty():
            if source := self._requests.get():
                self._done.put(Built(source.key, 0.0, "no compile worker is left"))

    def _pace(self) -> None:
        """Lets the processes run for their share of the time: their priority alone does not keep them from a core on
        which a thread of the step waits for another, as TVM's threads give way while they wait.
        """
        while self.processes:
            if self._hurry.wait(timeout=RUN_SECONDS * (1 / self.share - 1)):
                self._signal(signal.SIGCONT)
                time.sleep(RUN_SECONDS)
                continue
            self._signal(signal.SIGCONT)
            time.sleep(RUN_SECONDS)
            if self._asked and not self._hurry.is_set():
                self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        for process in list(self.processes):
            process.send_signal(number)

    def _feed(self, begun: threading.Event) -> None:
        """Starts a worker and gives it requests, one after another, until it dies. What it was at then ends with a
        problem; others go to other workers. It lives no longer than this thread, which is its parent.
        """
        process = subprocess.Popen(
            [sys.executable, "-c", "from mest_compile.kernels.workers import serve; serve()", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        begun.set()
        assert process.stdin and process.stdout
        while True:
            source = self._requests.get()
            if source is None:
                process.stdin.close()
                process.wait()
                process.stdout.close()
                if process in self.processes:
                    self.processes.remove(process)
                return
            answer = ""
            try:
                process.stdin.write(json.dumps(asdict(source)) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:  # a broken pipe; said below
                pass
            if answer:
                self._done.put(Built(source.key, **json.loads(answer)))
                continue
            code = process.wait()
            process.stdin.close()
            process.stdout.close()
            if process in self.processes:  # otherwise closed by us
                log.warning(
                    "a compile worker ended with code %d at kernel %s; its layer stays on the indexed one",
                    code,
                    source.kernel,
                )
                self.processes.remove(process)
            self._done.put(Built(source.key, 0.0, f"its compile worker ended with code {code}"))
            if not self.processes:
                self._refuse()
            return


def serve() -> None:
    """A worker's life: the folder of the cache is its argument."""
    end_with_parent()  # one that rests when the trainer is killed would rest for ever
    sys.modules["torch"] = None  # type: ignore[assignment]  # TVM would import it where it is there: 2 s
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints does not get between the answers
    builder = Builder(Path(sys.argv[1]))
    for line in sys.stdin:
        start = time.perf_counter()
        problem = None
        try:
            builder.store(_source(json.loads(line)))
        except BuildError as error:
            problem = str(error)
        answers.write(json.dumps({"seconds": time.perf_counter() - start, "problem": problem}) + "\n")
        answers.flush()


def _source(facts: dict[str, Any]) -> KernelSource:
    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return KernelSource(
        facts["kernel"],
        facts["text"],
        Target(**{name: tuples(value) for name, value in facts["target"].items()}),
        facts["checked"],
    )

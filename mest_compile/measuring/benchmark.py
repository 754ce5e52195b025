"""Side-by-side timing of whole training steps: two processes take turns on one machine, so that its moods hit both.

Each contestant (`contestants.py`) runs in a process of its own, `python -m mest_compile.measuring.benchmark NAME`, and
talks JSON lines: first the
case comes in, then turns of a number of steps, then the end.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from mest_compile.base.errors import MestError, UsageError
from mest_compile.hardware import host
from mest_compile.measuring.case import Built, Case
from mest_compile.measuring.contestants import find_contestant, find_interpreter, run_miniature
from mest_compile.measuring.machine import Others, machine

PACKAGE = Path(__file__).resolve().parents[1]
ANSWER_SECONDS = 3600  # that a contestant may take for one answer; compiling a step takes minutes
TURN_SECONDS = (
    0.25  # a turn lasts about this long; a shorter one would mostly time the caches refilling after the other's turn
)
SETTLE_SECONDS = 0.02  # thread pools spin for some milliseconds after their last task and would steal the other's core


@dataclass(frozen=True, slots=True)
class Side:
    """One contestant's figures. `round_seconds` holds its median step time of every round.

    setup_seconds       to build the step, kernels that the cache keeps excluded
    import_bytes        resident once everything was imported
    warm_bytes          resident once a miniature net has run a step: imports and the code that libraries load on first
                        use
    setup_peak_bytes    highest resident set while the step was built and compiled, above warm_bytes
    ready_bytes         resident when the step was built and freed memory given back to the system, above warm_bytes
    training_peak_bytes highest resident set while steps ran, above warm_bytes
    planned_bytes       what the step itself says it needs while it trains; None where it does not say
    """

    name: str
    round_seconds: tuple[float, ...]
    setup_seconds: float
    last_loss: float
    import_bytes: int
    warm_bytes: int
    setup_peak_bytes: int
    ready_bytes: int
    training_peak_bytes: int
    planned_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.round_seconds)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two sides of one case; a ratio above 1 says that ours is faster."""

    case: Case
    ours: Side
    rival: Side
    machine: dict[str, Any]
    versions: dict[str, str]
    measured_at: str

    @property
    def ratios(self) -> tuple[float, ...]:
        """The rival's time over ours, round by round."""
        return tuple(
            theirs / mine for mine, theirs in zip(self.ours.round_seconds, self.rival.round_seconds, strict=True)
        )

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def ratio_interval(self) -> tuple[float, float, float]:
        """(low, high, confidence) of the median ratio."""
        return median_interval(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""

        def side(figures: Side) -> dict[str, Any]:
            return {
                **asdict(figures),
                "median_seconds": figures.median_seconds,
                "min_seconds": min(figures.round_seconds),
                "max_seconds": max(figures.round_seconds),
            }

        return {
            "case": self.case.to_json(),
            "ours": side(self.ours),
            "rival": side(self.rival),
            "ratio": self.ratio,
            "ratio_interval": self.ratio_interval,
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
            "ratios": self.ratios,
            "machine": self.machine,
            "versions": self.versions,
            "measured_at": self.measured_at,
        }


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(low, high, confidence) of the median, from order statistics: no assumption about how the values are spread.

    The narrowest symmetric pair of ordered values whose confidence is at least the wanted one; the extremes where none
    is (fewer than six values), then with the lower confidence that they have. Source: the sign test; k-th smallest and
    k-th largest of n values enclose the median with probability 1 - 2 P(Binomial(n, 1/2) < k).
    """
    ordered, count = sorted(values), len(values)
    low, found, below = 0, 1 - 2.0 ** (1 - count), 2.0**-count
    for place in range(1, (count + 1) // 2):
        below += math.comb(count, place) * 2.0**-count
        if 1 - 2 * below < confidence:
            break
        low, found = place, 1 - 2 * below
    return ordered[low], ordered[count - 1 - low], found


def compare(
    case: Case,
    rival: str = "torch",
    ours: str = "mest",
    repeats: int = 7,
    warmup: int = 3,
    progress: Callable[[str, int, int], None] | None = None,
    rival_python: str | Path | None = None,
) -> Comparison:
    """Times both contestants in alternation, each in its own process.

    repeats       rounds; in each, both sides have a turn of at least one step, and who goes first changes
    warmup        steps of each side before anything counts, at least 1
    progress      called with (what happens now, rounds done, rounds in all)
    rival_python  interpreter of a rival that needs its own environment; None: the one that benchmarks/environments.sh
                  makes
    Raises UnknownName, UsageError, NotInstalled, and MestError when a process fails.
    """
    interpreters = {name: find_interpreter(name, sys.executable, rival_python) for name in (ours, rival)}
    if repeats < 1 or warmup < 1:
        raise UsageError(f"repeats and warmup must be at least 1; got {repeats} and {warmup}")
    say = progress or (lambda what, done, total: None)
    load_before = os.getloadavg()[0]
    runners: list[_Runner] = []
    try:
        for name in (ours, rival):
            say(f"building {name}", 0, repeats)
            runners.append(_Runner(name, case, interpreters[name]))
            if runners[-1].setup():
                runners.pop().close()
                runners.append(_Runner(name, case, interpreters[name]))
                runners[-1].setup()
        for runner in runners:
            say(f"warming up {runner.name}", 0, repeats)
            runner.turn(warmup)
            runner.steps_per_turn = max(1, math.ceil(TURN_SECONDS / min(runner.turn(1))))
        rounds: dict[_Runner, list[float]] = {runner: [] for runner in runners}
        others = Others(runner.process.pid for runner in runners)
        for number in range(repeats):
            say("measuring", number, repeats)
            for runner in runners if number % 2 == 0 else reversed(runners):
                time.sleep(SETTLE_SECONDS)
                rounds[runner].append(statistics.median(runner.turn(runner.steps_per_turn)))
        others_cores = others.cores()
        say("measuring", repeats, repeats)
        sides = [runner.finish(tuple(rounds[runner])) for runner in runners]
    finally:
        for runner in runners:
            runner.close()
    versions = {"python": platform.python_version()}
    for runner in runners:
        versions |= runner.versions
    return Comparison(
        case,
        sides[0],
        sides[1],
        {**machine(), "load_before": load_before, "others_cores": others_cores},
        versions,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


class _Runner:
    """The parent's end of one contestant's process."""

    def __init__(self, name: str, case: Case, python: str = sys.executable):
        self.name, self.case, self.steps_per_turn = name, case, 1
        self.versions: dict[str, str] = {}
        self._setup: dict[str, Any] = {}
        self._loss = math.nan
        threads = str(case.threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TVM_NUM_THREADS": threads,
            "TVM_BIND_THREADS": "0",
        }
        # A pipe that nobody reads would block a talkative process.
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115
        # A rival's own environment needs our package, and nothing of what is installed beside it.
        self._path = tempfile.TemporaryDirectory()
        if python != sys.executable:
            Path(self._path.name, "mest_compile").symlink_to(PACKAGE, target_is_directory=True)
            environment["PYTHONPATH"] = self._path.name
        self.process = subprocess.Popen(
            [python, "-m", "mest_compile.measuring.benchmark", name],
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env=environment,
        )

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            there = select.select([self.process.stdout], [], [], ANSWER_SECONDS)[0]
            if not there:
                self.process.kill()
                raise MestError(
                    f"the {self.name} process of the benchmark has not answered for {ANSWER_SECONDS} s, and was "
                    "killed; it was "
                    f"asked for {json.dumps(request)[:100]}"
                )
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self.process.wait()
            self._messages.seek(0)
            last = self._messages.read().strip().splitlines()[-1:] or ["it wrote nothing"]
            raise MestError(f"the {self.name} process of the benchmark died with exit code {code}: {last[0]}")
        reply = json.loads(answer)
        if "error" in reply:
            raise MestError(f"the {self.name} side of the benchmark failed: {reply['error']}")
        return reply

    def setup(self) -> bool:
        """Builds the step; True when that compiled something, so that a process started now has less behind it."""
        self._setup = self._ask({"case": self.case.to_json()})
        self.versions = self._setup["versions"]
        return self._setup["cold"]

    def turn(self, steps: int) -> list[float]:
        """Seconds of each of `steps` steps, run now."""
        reply = self._ask({"steps": steps})
        self._loss = reply["loss"]
        if not math.isfinite(self._loss):
            raise MestError(
                f"the {self.name} side's loss became {self._loss}, whose time would say nothing; lower the learning "
                f"rate of {self.case.options.optimizer}"
            )
        return reply["seconds"]

    def finish(self, round_seconds: tuple[float, ...]) -> Side:
        peak = self._ask({"finish": True})["peak_bytes"]
        setup, warm = self._setup, self._setup["warm_bytes"]
        return Side(
            self.name,
            round_seconds,
            setup["setup_seconds"],
            self._loss,
            setup["import_bytes"],
            warm,
            setup["peak_bytes"] - warm,
            setup["ready_bytes"] - warm,
            peak - warm,
            setup["planned_bytes"],
            tuple(setup["notes"]),
        )

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._messages.close()
        self._path.cleanup()


def _memory_bytes(peak: bool = False) -> int:
    """Of this process, now or the most. Raises MestError where the system does not tell."""
    if (found := host.resident_bytes(peak)) is None:
        raise MestError("this system does not tell what memory a process has; measure it on Linux")
    return found


def _settle_memory() -> int:
    """Gives freed memory back to the system, as far as the C library can; returns the resident bytes."""
    gc.collect()
    host.give_memory_back()
    return _memory_bytes()


def _set_up(name: str, case: Case) -> tuple[Built, dict[str, Any]]:
    """The built step, and the answer to the request for it."""
    contestant = find_contestant(name)
    contestant.load()
    imported = _memory_bytes()
    cold = run_miniature(contestant, case.threads)
    warm = _settle_memory()
    host.forget_peak()
    started = time.perf_counter()
    built = contestant.build(case)
    seconds, peak = time.perf_counter() - started, _memory_bytes(peak=True)
    answer = {
        "setup_seconds": seconds,
        "import_bytes": imported,
        "warm_bytes": warm,
        "peak_bytes": peak,
        "ready_bytes": _settle_memory(),
        "planned_bytes": built.planned_bytes,
        "cold": cold or built.cold,
        "notes": built.notes,
        "versions": {package: metadata.version(package) for package in contestant.packages},
    }
    host.forget_peak()
    return built, answer


def _serve(name: str) -> None:
    """The contestant's process: answers requests on stdin until told to finish."""
    find_contestant(name)
    # Libraries that print must not disturb the protocol: it keeps the real stdout, everybody else gets stderr.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    built: Built | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                built, reply = _set_up(name, Case.from_json(request["case"]))
            elif "steps" in request:
                assert built is not None
                seconds, loss = [], math.nan
                for _ in range(request["steps"]):
                    started = time.perf_counter()
                    loss = built.step()
                    seconds.append(time.perf_counter() - started)
                reply = {"seconds": seconds, "loss": loss}
            else:
                print(json.dumps({"peak_bytes": _memory_bytes(peak=True)}), file=replies)
                return
        except MestError as error:
            reply = {"error": " ".join(str(error).split())}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    _serve(sys.argv[1])

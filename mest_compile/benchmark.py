"""Side-by-side timing of whole training steps: two processes take turns on one machine, so that its moods hit both.

Each contestant is a function in `CONTESTANTS` that builds a step from a `Case`; it runs in a process of its own,
`python -m mest_compile.benchmark NAME`, and talks JSON lines: first the case comes in, then turns of a number of steps,
then the end. A further rival is one more function.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.errors import MestError, UnknownName, UsageError

TURN_SECONDS = 0.25    # a turn lasts about this long; a shorter one would mostly time the caches refilling after the other's turn
SETTLE_SECONDS = 0.02  # thread pools spin for some milliseconds after their last task and would steal the other's core


@dataclass(frozen=True, slots=True)
class Case:
    """What both sides compute: an SGD-momentum step of a built-in model on random images.

    input_shape  (N, C, H, W), elements
    width        channels of the first stage; None is the model's own
    sparsity     share of weights that are zero in sparse layers; dense contestants ignore it
    threads      for both sides
    """

    model: str
    input_shape: tuple[int, ...] = (64, 3, 32, 32)
    width: int | None = None
    classes: int = 10
    scheme: str = "block"
    sparsity: float = 0.9
    distribution: str = "uniform"
    target: str = "local"
    threads: int = 1
    seed: int = 0
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """(images (N, C, H, W) float32, labels (N,) int64), the same in every process."""
        rng = np.random.default_rng(self.seed)
        images = rng.standard_normal(self.input_shape, dtype=np.float32)
        return images, rng.integers(0, self.classes, self.input_shape[0])


Step = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Contestant:
    """`load` imports all that is needed, so that memory can be counted above it; `build` returns one training step."""

    load: Callable[[], None]
    build: Callable[[Case], Step]
    packages: tuple[str, ...]


def _load_mest() -> None:
    import torch.export  # noqa: F401
    import tvm  # noqa: F401

    import mest_compile

    mest_compile.compile  # noqa: B018


def _build_mest(case: Case) -> Step:
    import mest_compile as mest
    from mest_compile.models import build_model
    from mest_compile.sparsity import parse_scheme

    model = build_model(case.model, case.input_shape, case.classes, case.width, case.seed)
    step = mest.compile(
        model, case.input_shape, scheme=parse_scheme(case.scheme), sparsity=case.sparsity, distribution=case.distribution,
        optimizer=mest.SGD(lr=case.lr, momentum=case.momentum, weight_decay=case.weight_decay),
        target=case.target, threads=case.threads, seed=case.seed)
    images, labels = case.batch()
    return lambda: step(images, labels, lr=case.lr).loss


def _load_torch() -> None:
    import torch  # noqa: F401


def _build_torch(case: Case) -> Step:
    import torch
    from torch.nn.functional import cross_entropy

    from mest_compile.models import build_model

    torch.set_num_threads(case.threads)
    model = build_model(case.model, case.input_shape, case.classes, case.width, case.seed).train()
    numpy_images, numpy_labels = case.batch()
    images, labels = torch.from_numpy(numpy_images), torch.from_numpy(numpy_labels)
    if images.dim() == 4:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.lr, momentum=case.momentum, weight_decay=case.weight_decay)

    def step() -> float:
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


CONTESTANTS = {
    "mest": Contestant(_load_mest, _build_mest, ("mest-compile", "apache-tvm", "apache-tvm-ffi", "numpy")),
    "torch": Contestant(_load_torch, _build_torch, ("torch", "numpy")),
}


def find_contestant(name: str) -> Contestant:
    """Raises UnknownName with the names there are."""
    if name not in CONTESTANTS:
        raise UnknownName(f"no rival {name!r} to measure against; there are: {', '.join(sorted(CONTESTANTS))}")
    return CONTESTANTS[name]


@dataclass(frozen=True, slots=True)
class Side:
    """One contestant's figures. `round_seconds` holds its median step time of every round.

    import_bytes        resident once everything was imported
    setup_peak_bytes    highest resident set while the step was built and compiled, above import_bytes
    training_peak_bytes highest resident set while steps ran, above import_bytes
    """

    name: str
    round_seconds: tuple[float, ...]
    setup_seconds: float
    last_loss: float
    import_bytes: int
    setup_peak_bytes: int
    training_peak_bytes: int

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
        return tuple(theirs / mine for mine, theirs in zip(self.ours.round_seconds, self.rival.round_seconds, strict=True))

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        def side(figures: Side) -> dict[str, Any]:
            return {**asdict(figures), "median_seconds": figures.median_seconds,
                    "min_seconds": min(figures.round_seconds), "max_seconds": max(figures.round_seconds)}

        return {"case": asdict(self.case), "ours": side(self.ours), "rival": side(self.rival), "ratio": self.ratio,
                "ratio_min": min(self.ratios), "ratio_max": max(self.ratios), "ratios": self.ratios,
                "machine": self.machine, "versions": self.versions, "measured_at": self.measured_at}


def compare(case: Case, rival: str = "torch", ours: str = "mest", repeats: int = 7, warmup: int = 3,
            progress: Callable[[str, int, int], None] | None = None) -> Comparison:
    """Times both contestants in alternation, each in its own process.

    repeats   rounds; in each, both sides have a turn of at least one step, and who goes first changes
    warmup    steps of each side before anything counts, at least 1
    progress  called with (what happens now, rounds done, rounds in all)
    Raises UnknownName, UsageError, and MestError when a process fails.
    """
    for name in (ours, rival):
        find_contestant(name)
    if repeats < 1 or warmup < 1:
        raise UsageError(f"repeats and warmup must be at least 1; got {repeats} and {warmup}")
    say = progress or (lambda what, done, total: None)
    load_before = os.getloadavg()[0]
    runners: list[_Runner] = []
    try:
        for name in (ours, rival):
            say(f"building {name}", 0, repeats)
            runners.append(_Runner(name, case))
            runners[-1].setup()
        for runner in runners:
            say(f"warming up {runner.name}", 0, repeats)
            runner.turn(warmup)
            runner.steps_per_turn = max(1, math.ceil(TURN_SECONDS / min(runner.turn(1))))
        rounds: dict[_Runner, list[float]] = {runner: [] for runner in runners}
        for number in range(repeats):
            say("measuring", number, repeats)
            for runner in runners if number % 2 == 0 else reversed(runners):
                time.sleep(SETTLE_SECONDS)
                rounds[runner].append(statistics.median(runner.turn(runner.steps_per_turn)))
        say("measuring", repeats, repeats)
        sides = [runner.finish(tuple(rounds[runner])) for runner in runners]
    finally:
        for runner in runners:
            runner.close()
    versions = {"python": platform.python_version()}
    for runner in runners:
        versions |= runner.versions
    return Comparison(case, sides[0], sides[1], {**machine(), "load_before": load_before}, versions,
                      datetime.now(UTC).isoformat(timespec="seconds"))


def machine() -> dict[str, Any]:
    """What a reader needs to know about this machine to judge a timing."""
    import psutil

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", facts.get("Features", "")).split()
    return {"cpu": facts.get("model name") or platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "vector_isa": [flag for flag in ("avx2", "fma", "avx512f", "amx_tile", "asimd", "sve") if flag in flags],
            "memory_bytes": psutil.virtual_memory().total, "system": f"{platform.system()} {platform.release()}"}


class _Runner:
    """The parent's end of one contestant's process."""

    def __init__(self, name: str, case: Case):
        self.name, self.case, self.steps_per_turn = name, case, 1
        self.versions: dict[str, str] = {}
        self._setup: dict[str, Any] = {}
        self._loss = math.nan
        threads = str(case.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TVM_NUM_THREADS": threads,
                       "TVM_BIND_THREADS": "0"}
        self._messages = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would block a talkative process
        self._process = subprocess.Popen([sys.executable, "-m", "mest_compile.benchmark", name], text=True, bufsize=1,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, env=environment)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            self._messages.seek(0)
            last = self._messages.read().strip().splitlines()[-1:] or ["it wrote nothing"]
            raise MestError(f"the {self.name} process of the benchmark died with exit code {code}: {last[0]}")
        reply = json.loads(answer)
        if "error" in reply:
            raise MestError(f"the {self.name} side of the benchmark failed: {reply['error']}")
        return reply

    def setup(self) -> None:
        self._setup = self._ask({"case": asdict(self.case)})
        self.versions = self._setup["versions"]

    def turn(self, steps: int) -> list[float]:
        """Seconds of each of `steps` steps, run now."""
        reply = self._ask({"steps": steps})
        self._loss = reply["loss"]
        if not math.isfinite(self._loss):
            raise MestError(f"the {self.name} side's loss became {self._loss}, whose time would say nothing; lower lr={self.case.lr}")
        return reply["seconds"]

    def finish(self, round_seconds: tuple[float, ...]) -> Side:
        peak = self._ask({"finish": True})["peak_bytes"]
        imported = self._setup["import_bytes"]
        return Side(self.name, round_seconds, self._setup["setup_seconds"], self._loss, imported,
                    self._setup["peak_bytes"] - imported, peak - imported)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._messages.close()


def _memory_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process. getrusage's maximum is no use: it is inherited from the parent over exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise MestError(f"/proc/self/status has no {field}; memory can be measured on Linux only")


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's way to set VmHWM back to VmRSS


def _serve(name: str) -> None:
    """The contestant's process: answers requests on stdin until told to finish."""
    contestant = find_contestant(name)
    # Libraries that print must not disturb the protocol: it keeps the real stdout, everybody else gets stderr.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    step: Step | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                contestant.load()
                imported = _memory_bytes("VmRSS")
                started = time.perf_counter()
                fields = request["case"]
                step = contestant.build(Case(**{**fields, "input_shape": tuple(fields["input_shape"])}))
                reply = {"setup_seconds": time.perf_counter() - started, "import_bytes": imported,
                         "peak_bytes": _memory_bytes("VmHWM"),
                         "versions": {package: metadata.version(package) for package in contestant.packages}}
                _forget_peak()
            elif "steps" in request:
                assert step is not None
                seconds, loss = [], math.nan
                for _ in range(request["steps"]):
                    started = time.perf_counter()
                    loss = step()
                    seconds.append(time.perf_counter() - started)
                reply = {"seconds": seconds, "loss": loss}
            else:
                print(json.dumps({"peak_bytes": _memory_bytes("VmHWM")}), file=replies)
                return
        except MestError as error:
            reply = {"error": " ".join(str(error).split())}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    _serve(sys.argv[1])

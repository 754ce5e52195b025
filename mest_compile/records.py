"""Tuning records: which knobs of a schedule were tried for which kernel, how that ended, and which are the best. Needs no tvm.

A log is a file of JSON lines, one a target (`local.jsonl`), only ever appended to: the user's own in `folder()`, shipped ones in
autotune_logs/. What is read is judged line by line, and what cannot be trusted is left out and counted:

torn        a last line without its end: the process that wrote it was killed; the next line written starts on a line of its own
damaged     a line that is no record, or whose digest is not that of its content: a time, or anything else, was edited
foreign     a record of another device, CPU or TVM version: its times say nothing about this one
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from statistics import median
from typing import Any

import platformdirs

from mest_compile.errors import StateError
from mest_compile.hardware import Target
from mest_compile.host import wait_exclusive

log = logging.getLogger(__name__)

IN_STEP = "in step"   # the message of records whose seconds are those of the calls within a whole step
STEP = "step"         # the "kernel" of records that time a whole training step
SECTIONS = ("sections.forward", "sections.grad_input")  # the "kernels" of records that time a layer whose index is cut otherwise
SIZES = frozenset({"channels", "height", "width", "batch", "section_channels", "rows_live", "sources_live", "live", "chunks", "count",
                   "flop"})
IGNORED = frozenset({"halo", "grid", "eps", "momentum", "layers"})  # they change the code, but not which knobs are good
FARTHEST = 4.0        # doublings of sizes, all together, up to which another problem is near
COUNTED = "instructions"  # begins the `cpu` of records that are ranked by executed instructions
MODEL_UNIT = 1e-9     # "seconds" of a modelled cycle or an executed instruction in records, as if the core ran at 1 GHz


@cache
def tvm_version() -> str:
    return metadata.version("apache-tvm")


class Outcome(Enum):
    """How a trial ended. Only OK can win."""

    OK = "ok"
    BUILD_FAILED = "build-failed"
    WRONG = "wrong-answer"
    TIMED_OUT = "timed-out"
    CRASHED = "crashed"


class Measure(Enum):
    """Where a record's seconds come from. MEASURED beats MODELLED; EMULATED says nothing about a device and is never used to choose."""

    MEASURED = "measured"
    MODELLED = "modelled"
    EMULATED = "emulated"


@dataclass(frozen=True, slots=True)
class Record:
    """One trial.

    kernel, problem  "gather.conv" and its sizes, as `plain` gives them
    live     live cells of the layer it was timed with, 0 where there are none
    target   `target_facts`
    cpu      model of the CPU that it ran on, "" where the target's name says it; of a modelled record the model, of an emulated one
             what was behind the emulation: clocks of their own
    knobs    those that are not the schedule's defaults
    seconds  of each run, empty unless the outcome is OK
    text     digest of the kernel's text: a schedule that changed since gives another
    message  what went wrong
    """

    kernel: str
    problem: Mapping[str, Any]
    live: int
    target: Mapping[str, Any]
    cpu: str
    knobs: Mapping[str, Any]
    outcome: Outcome
    measure: Measure
    seconds: tuple[float, ...]
    text: str
    tvm: str = field(default_factory=tvm_version)
    message: str = ""

    def to_line(self) -> str:
        """One JSON line, its digest last."""
        facts = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        facts |= {"outcome": self.outcome.value, "measure": self.measure.value}
        content = json.dumps(plain(facts), sort_keys=True)
        return f'{content[:-1]}, "digest": "{_digest(content)}"}}'

    @classmethod
    def from_line(cls, line: str) -> Record:
        """Raises ValueError on a line that is no record or was changed since it was written."""
        try:
            facts = json.loads(line)
            digest = facts.pop("digest")
            if digest != _digest(json.dumps(facts, sort_keys=True)):
                raise ValueError("its content is not what its digest was taken of")
            return cls(**facts | {"outcome": Outcome(facts["outcome"]), "measure": Measure(facts["measure"]),
                                  "seconds": tuple(map(float, facts["seconds"])), "knobs": knobs_from(facts["knobs"])})
        except (AttributeError, KeyError, TypeError) as problem:
            raise ValueError(f"it is no tuning record ({problem!r})") from problem

    @property
    def key(self) -> tuple[str, str, int]:
        return _key(self.kernel, self.problem, self.live)


@dataclass(frozen=True, slots=True)
class Choice:
    """Knobs for a kernel and where they are from: "exact" (this very problem was tuned), "nearest" (one like it) or "default".
    A step that is loaded keeps those of the step that was saved.

    seconds, default_seconds  as recorded for these knobs and for the default ones, where they are
    modelled  by records of a model instead of a clock, whose seconds are a scale
    """

    knobs: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "default"
    seconds: float | None = None
    default_seconds: float | None = None
    modelled: bool = False


@dataclass(slots=True)
class Trials:
    """All records of one kernel, problem and measure.

    seconds  knobs -> seconds of runs by themselves; in_step: within whole steps, which alone decide where there are any
    wrong    knobs that once failed; tried: all of them
    """

    kernel: str
    problem: Mapping[str, Any]
    live: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    in_step: dict[str, list[float]] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)
    records: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        knobs = json.dumps(plain(record.knobs), sort_keys=True)
        self.tried.add(knobs)
        self.records.append(record)
        if record.outcome is not Outcome.OK:
            self.wrong.add(knobs)  # once wrong is wrong, whatever other runs of it gave
            return
        if self.text.get(knobs) != record.text:  # the schedule changed in between
            self.seconds[knobs], self.text[knobs] = [], record.text
            self.in_step.pop(knobs, None)
        if record.message == IN_STEP:
            self.in_step.setdefault(knobs, []).extend(record.seconds)
        else:
            self.seconds[knobs] += record.seconds

    def ranking(self, by_themselves: bool = False) -> list[tuple[float, dict[str, Any], str]]:
        """(median seconds, knobs, digest of the text), fastest first; by_themselves: whatever whole steps said."""
        times = self.seconds if by_themselves else self.in_step or self.seconds
        found = [(median(seconds), knobs) for knobs, seconds in times.items() if seconds and knobs not in self.wrong]
        return [(seconds, knobs_from(json.loads(knobs)), self.text[knobs]) for seconds, knobs in sorted(found)]


class Records:
    """The trustworthy records of one target. Reads `paths` when first asked."""

    def __init__(self, target: Target, paths: Iterable[Path] = ()):
        self.target, self.paths = target, tuple(paths)
        self.left_out: Counter[str] = Counter()
        self._trials: dict[tuple[Measure, str], dict[tuple[str, str, int], Trials]] = {}  # by clock: seconds of two are never compared
        self._read = False

    @classmethod
    def of(cls, target: Target) -> Records:
        """The shipped and the user's records of `target`."""
        return cls(target, [shipped(target), user_log(target)])

    @property
    def cpu(self) -> str:
        """Model of the CPU that the records are of."""
        return cpu_of(self.target)

    def for_target(self, target: Target) -> Records:
        """The same logs, read for another target."""
        return Records(target, self.paths)

    def load(self) -> Records:
        if not self._read:
            self._read = True
            for path in self.paths:
                for record in self._trusted(path):
                    self.add(record)
        return self

    def add(self, record: Record) -> None:
        clock = self._trials.setdefault((record.measure, record.cpu), {})
        clock.setdefault(record.key, Trials(record.kernel, record.problem, record.live)).add(record)

    def trials(self, kernel: str, problem: Any, live: int, measure: Measure = Measure.MEASURED, cpu: str | None = None) -> Trials:
        """What is known of this very problem by one clock; cpu: None for that of the target."""
        facts = plain(problem)
        clock = self.load()._trials.get((measure, self.cpu if cpu is None else cpu), {})
        return clock.get(_key(kernel, facts, live)) or Trials(kernel, facts, live)

    def _clocks(self) -> list[tuple[Measure, str]]:
        """Those that decide, the best first: measured times, modelled cycles, executed instructions."""
        modelled = [cpu for measure, cpu in self.load()._trials if measure is Measure.MODELLED]
        return [(Measure.MEASURED, self.cpu),
                *((Measure.MODELLED, cpu) for cpu in sorted(modelled, key=lambda cpu: (cpu.startswith(COUNTED), cpu)))]

    def best(self, kernel: str, problem: Any, live: int, text: Callable[[Mapping[str, Any]], str | None]) -> Choice:
        """The knobs for a kernel.

        text  knobs -> digest of the kernel's text with them, None where the schedule does not take them for this problem
        An exact record only counts while its schedule still gives the text that was timed.
        """
        for measure, cpu in self._clocks():
            ranking = self.trials(kernel, problem, live, measure, cpu).ranking()
            default = next((seconds for seconds, knobs, _ in ranking if not knobs), None)
            for seconds, knobs, digest in ranking:
                if text(knobs) == digest:
                    return Choice(knobs, "exact", seconds, default, measure is Measure.MODELLED)
            for near in self._near(kernel, plain(problem), live, self._trials.get((measure, cpu), {})):
                for _, knobs, _ in near.ranking()[:1]:
                    if text(knobs) is not None:
                        return Choice(knobs, "nearest", modelled=measure is Measure.MODELLED)
        return Choice()

    @staticmethod
    def _near(kernel: str, problem: Mapping[str, Any], live: int, clock: Mapping[tuple[str, str, int], Trials]) -> list[Trials]:
        """Trials of other problems of the same structure, nearest first."""
        structure, sizes = _class(problem, live)
        found = []
        for number, trials in enumerate(clock.values()):
            if trials.kernel == kernel:
                other, theirs = _class(trials.problem, trials.live)
                if other == structure and theirs.keys() == sizes.keys():
                    distance = sum(abs(math.log2(sizes[name] / theirs[name])) for name in sizes)
                    if distance <= FARTHEST:
                        found.append((distance, number, trials))
        return [trials for _, _, trials in sorted(found, key=lambda entry: entry[:2])]

    def _trusted(self, path: Path) -> Iterable[Record]:
        try:
            content = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        except OSError as problem:
            log.warning("%s cannot be read (%s); nothing is taken from it", path, problem.strerror)
            return
        lines = content.split("\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                record = Record.from_line(line)
            except ValueError as problem:
                torn = number == len(lines)
                self.left_out["torn" if torn else "damaged"] += 1
                if not torn:
                    log.warning("%s, line %d is left out: %s", path, number, problem)
                continue
            if is_foreign(record, self.target):
                self.left_out["foreign"] += 1
            else:
                yield record


class FixedRecords(Records):
    """Records that name one set of knobs for each (kernel, problem, live) of `knobs`, by `key_of`, and the defaults for the rest."""

    def __init__(self, target: Target, knobs: Mapping[tuple[str, str, int], Mapping[str, Any]]):
        super().__init__(target)
        self._knobs = knobs

    def best(self, kernel: str, problem: Any, live: int, text: Callable[[Mapping[str, Any]], str | None]) -> Choice:
        found = self._knobs.get(key_of(kernel, problem, live))
        return Choice() if found is None else Choice(found, "exact")


class LogFile:
    """Appends records to a log; several processes may. Each record is one write, on the disk before the next trial begins."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: Record) -> None:
        """Raises StateError when the log cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                wait_exclusive(file)
                torn = b""
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    torn = b"" if file.read(1) == b"\n" else b"\n"
                file.write(torn + record.to_line().encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as problem:
            raise StateError(f"the log {self.path} cannot be written: {problem.strerror}; pass another --log") from problem


def folder() -> Path:
    """Where the user's logs are."""
    return platformdirs.user_log_path("mest-compile") / "autotune"


def user_log(target: Target) -> Path:
    return folder() / f"{target.name}.jsonl"


def shipped(target: Target) -> Path:
    """The log that comes with the package; it need not exist."""
    return Path(str(resources.files("mest_compile.autotune_logs"))) / f"{target.name}.jsonl"


def target_facts(target: Target) -> dict[str, Any]:
    """What of a target decides how fast a kernel's text runs; sizes of caches and the like are in the text."""
    return {"device": target.device, "llvm": plain(target.llvm), "vector": target.vector}


def is_foreign(record: Record, target: Target) -> bool:
    """Whether the record is of another device, CPU or TVM version. A step's records are of every vector width, a model's of any CPU."""
    mine, theirs = target_facts(target), dict(record.target)
    if record.kernel == STEP:
        mine.pop("vector"), theirs.pop("vector", None)
    elsewhere = record.measure is Measure.MEASURED and record.cpu != cpu_of(target)
    return mine != theirs or elsewhere or record.tvm != tvm_version()


def cpu_of(target: Target) -> str:
    """Model of the CPU behind a target that stands for the machine at hand; others are named by their file."""
    return host_model() if target.name == "local" else ""


@cache
def host_model() -> str:
    """This machine's CPU."""
    return cpu_model(Path("/proc/cpuinfo").read_text())


def cpu_model(cpuinfo: str) -> str:
    """The CPU that a machine's /proc/cpuinfo tells of: "AMD EPYC, family 26, model 2". Names alone are shared by generations."""
    found: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    names = {"model name": "", "cpu family": "family ", "model": "model ", "CPU implementer": "implementer ", "CPU part": "part "}
    return ", ".join(said + found[name] for name, said in names.items() if name in found) or "unknown"


def unit_of(measure: Measure, cpu: str) -> tuple[str, float]:
    """(a unit for people, how many of it are in a second of records of that clock)."""
    if measure is not Measure.MODELLED:
        return "ms", 1e3
    return f"k{COUNTED if cpu.startswith(COUNTED) else 'cycles'}", 1e-3 / MODEL_UNIT


def plain(value: Any) -> Any:
    """`value` as JSON gives it back. Images in float32 do not say so: records from before there was a choice stay theirs."""
    if is_dataclass(value) and not isinstance(value, type):
        found = {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
        return {name: item for name, item in found.items() if (name, item) != ("dtype", "float32")}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def knobs_from(found: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs as schedules take them: lists are tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def text_digest(text: str) -> str:
    return _digest(text)


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def key_of(kernel: str, problem: Any, live: int) -> tuple[str, str, int]:
    """What records of one problem have in common."""
    return _key(kernel, plain(problem), live)


def _key(kernel: str, problem: Mapping[str, Any], live: int) -> tuple[str, str, int]:
    return kernel, json.dumps(problem, sort_keys=True), live


def _class(problem: Mapping[str, Any], live: int) -> tuple[str, dict[str, float]]:
    """(structure, sizes) of a problem: equal structures differ in sizes only."""
    sizes: dict[str, float] = {"live": max(live, 1)}
    structure: dict[str, Any] = defaultdict(list)

    def walk(name: str, value: Any) -> None:
        last = name.rpartition(".")[2]
        if last in IGNORED:
            return
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{name}.{key}", item)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            structure[name].append(len(value))
        elif last in SIZES and isinstance(value, int | float) and value > 0:
            sizes[name] = value
        else:
            structure[name].append(value)

    walk("", problem)
    return json.dumps(structure, sort_keys=True), sizes

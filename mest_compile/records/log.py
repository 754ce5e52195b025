"""Tuning records: which knobs of a schedule were tried for which kernel, how that ended, and which are the best. Needs
no tvm.

There is a log for each target (`local.jsonl`): the user's own in `folder()`, shipped ones in autotune_logs/. What
cannot be trusted is left out and counted:

torn        a last line without its end: the process that wrote it was killed; the next line written starts on a line of
            its own
damaged     a line that is no record, or whose digest is not that of its content: a time, or anything else, was edited
foreign     a record of another device, machine or TVM version: its times say nothing about this one
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import platformdirs

from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.cpu import host_model, machine_model
from mest_compile.hardware.target import Target, is_native
from mest_compile.ir.problem import likeness, told_apart
from mest_compile.records.record import (
    COUNTED,
    IN_STEP,
    MODEL_UNIT,
    SECTIONS,
    STEP,
    Choice,
    Damaged,
    LogFile,
    Measure,
    Outcome,
    Record,
    key_of,
    knobs_from,
    knobs_text,
    plain,
    problem_key,
    read_log,
    target_facts,
    text_digest,
    tvm_version,
    unit_of,
)

__all__ = [
    "COUNTED",
    "IN_STEP",
    "MODEL_UNIT",
    "SECTIONS",
    "STEP",
    "Choice",
    "FixedRecords",
    "LogFile",
    "Measure",
    "Outcome",
    "Record",
    "Records",
    "Trials",
    "cpu_of",
    "folder",
    "host_model",
    "is_foreign",
    "key_of",
    "knobs_from",
    "machine_model",
    "plain",
    "shipped",
    "target_facts",
    "text_digest",
    "tvm_version",
    "unit_of",
    "user_log",
]

log = logging.getLogger(__name__)

FARTHEST = 4.0  # doublings of sizes, all together, up to which another problem is near


@dataclass(slots=True)
class Trials:
    """All records of one kernel, problem and measure.

    seconds  knobs -> seconds of runs by themselves; in_step: within whole steps, which alone decide where there are any
    wrong    knobs that once failed; tried: all of them
    late     knobs -> the longest limit within which they did not end; in_time: the longest that those had which did
    """

    kernel: str
    problem: Mapping[str, Any]
    live: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    in_step: dict[str, list[float]] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)
    late: dict[str, float] = field(default_factory=dict)
    in_time: dict[str, float] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        knobs, limit = knobs_text(record.knobs), record.limit_seconds or 0.0
        self.tried.add(knobs)
        self.records.append(record)
        if record.outcome is Outcome.TIMED_OUT:
            self.late[knobs] = max(limit, self.late.get(knobs, 0.0))
            return
        if record.outcome is not Outcome.OK:
            self.wrong.add(knobs)  # once wrong is wrong, whatever other runs of it gave
            return
        self.in_time[knobs] = max(limit, self.in_time.get(knobs, 0.0))
        if self.text.get(knobs) != record.text:  # the schedule changed in between
            self.seconds[knobs], self.text[knobs] = [], record.text
            self.in_step.pop(knobs, None)
        if record.message == IN_STEP:
            self.in_step.setdefault(knobs, []).extend(record.seconds)
        else:
            self.seconds[knobs] += record.seconds

    def decided(self, limit_seconds: float) -> Trials:
        """Without what timed out within a shorter limit than this one, which decides nothing."""
        open_ = {
            knobs
            for knobs, limit in self.late.items()
            if limit < limit_seconds and knobs not in self.wrong | self.in_time.keys()
        }
        records = [record for record in self.records if knobs_text(record.knobs) not in open_]
        return replace(self, tried=self.tried - open_, records=records) if open_ else self

    def beside(self, unbuilt: Trials) -> Trials:
        """With what could not be built."""
        return replace(
            self,
            wrong=self.wrong | unbuilt.wrong,
            tried=self.tried | unbuilt.tried,
            records=[*unbuilt.records, *self.records],
        )

    def _failed(self, knobs: str) -> bool:
        return knobs in self.wrong or (knobs in self.late and self.late[knobs] >= self.in_time[knobs])

    def ranking(self, by_themselves: bool = False) -> list[tuple[float, dict[str, Any], str]]:
        """(median seconds, knobs, digest of the text), fastest first; by_themselves: whatever whole steps said."""
        times = self.seconds if by_themselves else self.in_step or self.seconds
        found = [(median(seconds), knobs) for knobs, seconds in times.items() if seconds and not self._failed(knobs)]
        return [(seconds, knobs_from(json.loads(knobs)), self.text[knobs]) for seconds, knobs in sorted(found)]


class Records:
    """The trustworthy records of one target. Reads `paths` when first asked.

    cpu  the machine whose times count, by `machine_model`; None: `cpu_of` the target. "": not known; then the machine
         that most records are of comes first, and those of two are never compared
    """

    def __init__(self, target: Target, paths: Iterable[Path] = (), cpu: str | None = None):
        self.target, self.paths = target, tuple(paths)
        self.cpu = cpu_of(target) if cpu is None else cpu
        self.left_out: Counter[str] = Counter()
        self._trials: dict[
            tuple[Measure, str], dict[tuple[str, str, int], Trials]
        ] = {}  # by clock: seconds of two are never compared
        self._read = False

    @classmethod
    def of(cls, target: Target) -> Records:
        """The shipped and the user's records of `target`."""
        return cls(target, [shipped(target), user_log(target)])

    def for_target(self, target: Target) -> Records:
        """The same logs, read for another target on the same machine."""
        return self if target == self.target else Records(target, self.paths, self.cpu)

    def on(self, cpu: str) -> Records:
        """The same logs, read for that machine."""
        return self if cpu == self.cpu else Records(self.target, self.paths, cpu)

    def load(self) -> Records:
        if not self._read:
            self._read = True
            doubted = {verdict for path in self.paths for verdict in self._load(path)}
            for trials in (trials for clock in self._trials.values() for trials in clock.values()):
                trials.wrong |= {knobs for kernel, knobs in doubted if kernel == trials.kernel}
        return self

    def _load(self, path: Path) -> set[tuple[str, str]]:
        """What damaged lines may have said that it failed."""
        doubted = set()
        mine, foreign = _logged(path, _stamp(path), self.target, self.cpu)
        self.left_out.update(["foreign"] * foreign)
        for found in mine:
            if isinstance(found, Damaged):
                self.left_out["torn" if found.torn else "damaged"] += 1
                if not found.torn:
                    log.warning("%s, line %d is left out: %s", path, found.number, found.problem)
                if found.verdict is not None:
                    doubted.add(found.verdict)
            else:
                self.add(found)
        return doubted

    def add(self, record: Record) -> None:
        clock = self._trials.setdefault(
            (record.measure, "" if record.measure is Measure.UNMEASURED else record.cpu), {}
        )
        clock.setdefault(record.key, Trials(record.kernel, record.problem, record.live)).add(record)

    def trials(
        self, kernel: str, problem: Any, live: int, measure: Measure = Measure.MEASURED, cpu: str | None = None
    ) -> Trials:
        """What is known of this very problem by one clock; cpu: None for that of the target. What does not build does
        not by any."""
        facts = plain(problem)
        key = problem_key(kernel, facts, live)
        known = self.load()._trials.get((measure, self.cpu if cpu is None else cpu), {}).get(key) or Trials(
            kernel, facts, live
        )
        unbuilt = self._trials.get((Measure.UNMEASURED, ""), {}).get(key)
        return known if unbuilt is None else known.beside(unbuilt)

    def measured(self) -> list[str]:
        """The machines that measured records are of, the one with most records first."""
        counts = Counter(
            {
                cpu: sum(len(trials.records) for trials in clock.values())
                for (measure, cpu), clock in self.load()._trials.items()
                if measure is Measure.MEASURED
            }
        )
        return sorted(counts, key=lambda cpu: (-counts[cpu], cpu))

    def _clocks(self) -> list[tuple[Measure, str]]:
        """Those that decide, the best first: measured times, modelled cycles, executed instructions."""
        modelled = [cpu for measure, cpu in self.load()._trials if measure is Measure.MODELLED]
        return [
            *((Measure.MEASURED, cpu) for cpu in ([self.cpu] if self.cpu else self.measured())),
            *((Measure.MODELLED, cpu) for cpu in sorted(modelled, key=lambda cpu: (cpu.startswith(COUNTED), cpu))),
        ]

    def best(self, kernel: str, problem: Any, live: int, text: Callable[[Mapping[str, Any]], str | None]) -> Choice:
        """The knobs for a kernel.

        text  knobs -> digest of the kernel's text with them, None where the schedule does not take them for this
              problem
        An exact record only counts while its schedule still gives the text that was timed.
        """
        for measure, cpu in self._clocks():
            ranking = self.trials(kernel, problem, live, measure, cpu).ranking()
            default = next((seconds for seconds, knobs, _ in ranking if not knobs), None)
            for seconds, knobs, digest in ranking:
                if text(knobs) == digest:
                    return Choice(knobs, "exact", seconds, default, measure is Measure.MODELLED)
            for near in self._near(kernel, problem, live, self._trials.get((measure, cpu), {})):
                for _, knobs, _ in near.ranking()[:1]:
                    if text(knobs) is not None:
                        return Choice(knobs, "nearest", modelled=measure is Measure.MODELLED)
        return Choice()

    @staticmethod
    def _near(kernel: str, problem: Any, live: int, clock: Mapping[tuple[str, str, int], Trials]) -> list[Trials]:
        """Trials of problems of the same structure, nearest first."""
        marks = likeness(problem)
        structure, sizes = told_apart(plain(problem), marks, live)
        found = []
        for number, trials in enumerate(clock.values()):
            if trials.kernel == kernel:
                other, theirs = told_apart(trials.problem, marks, trials.live)
                if other == structure and theirs.keys() == sizes.keys():
                    distance = sum(abs(math.log2(sizes[name] / theirs[name])) for name in sizes)
                    if distance <= FARTHEST:
                        found.append((distance, number, trials))
        return [trials for _, _, trials in sorted(found, key=lambda entry: entry[:2])]


class FixedRecords(Records):
    """Records that name one set of knobs for each (kernel, problem, live) of `knobs`, by `key_of`, and the defaults for
    the rest."""

    def __init__(self, target: Target, knobs: Mapping[tuple[str, str, int], Mapping[str, Any]]):
        super().__init__(target)
        self._knobs = knobs

    def for_target(self, target: Target) -> FixedRecords:
        return FixedRecords(target, self._knobs)

    def on(self, cpu: str) -> FixedRecords:
        return self

    def best(self, kernel: str, problem: Any, live: int, text: Callable[[Mapping[str, Any]], str | None]) -> Choice:
        found = self._knobs.get(key_of(kernel, problem, live))
        return Choice() if found is None else Choice(found, "exact")


def folder() -> Path:
    """Where the user's logs are."""
    return platformdirs.user_log_path("mest-compile") / "autotune"


def user_log(target: Target) -> Path:
    return folder() / f"{target.name}.jsonl"


def shipped(target: Target) -> Path:
    """The log that comes with the package; it need not exist."""
    return Path(str(resources.files("mest_compile.autotune_logs"))) / f"{target.name}.jsonl"


_facts = lru_cache(maxsize=8)(target_facts)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Of a log as it is: another one where anything was appended since. None: there is no log."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


@lru_cache(maxsize=8)
def _logged(
    path: Path, stamp: tuple[int, ...] | None, target: Target, cpu: str
) -> tuple[tuple[Record | Damaged, ...], int]:
    """(what a log holds beside foreign records, how many of these): read once while it is as `stamp` says, as a shipped
    log takes longer to read than a step to plan."""
    found = list(read_log(path))
    mine = tuple(one for one in found if isinstance(one, Damaged) or not is_foreign(one, target, cpu))
    return mine, len(found) - len(mine)


def is_foreign(record: Record, target: Target, cpu: str | None = None) -> bool:
    """Whether the record is of another device, machine or TVM version. A step's records are of every vector width, a
    model's of any CPU.

    cpu  as `Records` takes it
    """
    mine, theirs = dict(_facts(target)), dict(record.target)
    if record.kernel == STEP:
        mine.pop("vector"), theirs.pop("vector", None)
    here = cpu_of(target) if cpu is None else cpu
    elsewhere = record.measure is Measure.MEASURED and bool(here) and record.cpu != here
    return mine != theirs or elsewhere or record.tvm != tvm_version()


def cpu_of(target: Target) -> str:
    """Model of this machine where steps of the target run on its CPU; "" where they run on another or on a GPU, and a
    device must tell."""
    return host_model() if backend_of(target).processor and is_native(target) else ""

"""One trial of a kernel's knobs, and the file that trials are kept in. Needs no tvm.

A log is a file of JSON lines, only ever appended to. What is read is judged line by line, see `read_log`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from mest_compile.base.errors import StateError
from mest_compile.hardware.host import wait_exclusive
from mest_compile.hardware.target import Target

log = logging.getLogger(__name__)


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
    """Where a record's seconds come from. MEASURED beats MODELLED; EMULATED says nothing about a device and is never
    used to choose.
    UNMEASURED is what was never on a device: its build failed.
    """

    UNMEASURED = "unmeasured"
    MEASURED = "measured"
    MODELLED = "modelled"
    EMULATED = "emulated"


@dataclass(frozen=True, slots=True)
class Record:
    """One trial.

    kernel, problem  "gather.conv" and its sizes, as `plain` gives them
    live     live cells of the layer it was timed with, 0 where there are none
    target   `target_facts`
    cpu      model of the machine that it ran on, see `machine_model`; of a modelled record the model, of an emulated
             one what was behind the emulation: clocks of their own
    knobs    those that are not the schedule's defaults
    seconds  of each run, empty unless the outcome is OK
    text     digest of the kernel's text: a schedule that changed since gives another
    message  what went wrong
    limit_seconds  that it was given: one that timed out may end within a longer limit. None: not known
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
    limit_seconds: float | None = None

    def to_line(self) -> str:
        """One JSON line, its digest last."""
        facts = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        facts |= {"outcome": self.outcome.value, "measure": self.measure.value}
        if self.limit_seconds is None:  # as records from before it was noted
            del facts["limit_seconds"]
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
            facts["problem"] = _named_activation(facts["problem"])
            return cls(
                **facts
                | {
                    "outcome": Outcome(facts["outcome"]),
                    "measure": Measure(facts["measure"]),
                    "seconds": tuple(map(float, facts["seconds"])),
                    "knobs": knobs_from(facts["knobs"]),
                }
            )
        except (AttributeError, KeyError, TypeError) as problem:
            raise ValueError(f"it is no tuning record ({problem!r})") from problem

    @property
    def key(self) -> tuple[str, str, int]:
        return problem_key(self.kernel, self.problem, self.live)


VERDICTS = (
    Outcome.WRONG,
    Outcome.CRASHED,
)  # of knobs that must never win: written twice, so that no damage to one line loses them


@dataclass(frozen=True, slots=True)
class Damaged:
    """A line, or a part of one, that is no record.

    torn     the last line, without its end
    verdict  (kernel, knobs as `knobs_text`) of what it may have said that they failed; None where that cannot be read
    """

    number: int
    problem: str
    torn: bool
    verdict: tuple[str, str] | None


_BEGINS = re.compile(r'(?=\{"cpu": )')  # as every record does: two are on a line that has lost the end of its line
_READABLE = re.compile(r'"kernel": "([^"]*)", "knobs": (\{[^{}]*\})')


def read_log(path: Path) -> Iterator[Record | Damaged]:
    """What a log holds, in order; nothing where there is no log.

    A line that is no record, or whose digest is not that of its content, is damaged: its seconds are not believed, nor
    is it forgotten that it may have been a verdict. Of verdicts that stand there twice one is told.
    """
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    lines, before = content.split("\n"), None
    for number, line in enumerate(lines, 1):
        for part in filter(None, _BEGINS.split(line)):
            try:
                record = Record.from_line(part[: part.rfind("}") + 1] or part)
            except ValueError as problem:
                yield Damaged(number, str(problem), number == len(lines), _verdict_of(part))
                continue
            if record != before or record.outcome not in VERDICTS:
                yield record
            before = record


def _verdict_of(line: str) -> tuple[str, str] | None:
    found = _READABLE.search(line)
    if found is None or f'"outcome": "{Outcome.OK.value}"' in line:
        return None
    try:
        return found[1], knobs_text(json.loads(found[2]))
    except ValueError:
        return None


class LogFile:
    """Appends records to a log; several processes may. Each record is one write, on the disk before the next trial
    begins."""

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
                file.write(torn + (record.to_line().encode() + b"\n") * (2 if record.outcome in VERDICTS else 1))
                file.flush()
                os.fsync(file.fileno())
        except OSError as problem:
            raise StateError(
                f"the log {self.path} cannot be written: {problem.strerror}; pass another --log"
            ) from problem


USUAL = (("dtype", "float32"), ("epilogue", None), ("abreast", 1), ("combed", 1), ("gap", 0), ("adds", False))


def plain(value: Any) -> Any:
    """`value` as JSON gives it back. Images in float32, rows of one pixel a vector, channels without a gap, and
    kernels without an epilogue or that do not add, do not say so: records from before there was a choice are theirs."""
    if is_dataclass(value) and not isinstance(value, type):
        found = {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
        return {name: item for name, item in found.items() if (name, item) not in USUAL}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def _named_activation(problem: Mapping[str, Any]) -> Mapping[str, Any]:
    """A problem as today's are: batch_norm once knew one activation, `relu`, behind it or none."""
    if "relu" not in problem:
        return problem
    return {name: item for name, item in problem.items() if name != "relu"} | {
        "activation": "relu" if problem["relu"] else None
    }


def knobs_from(found: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs as schedules take them: lists are tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def knobs_text(knobs: Mapping[str, Any]) -> str:
    """Knobs as a key."""
    return json.dumps(plain(knobs), sort_keys=True)


def text_digest(text: str) -> str:
    return _digest(text)


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def key_of(kernel: str, problem: Any, live: int) -> tuple[str, str, int]:
    """What records of one problem have in common."""
    return problem_key(kernel, plain(problem), live)


def problem_key(kernel: str, problem: Mapping[str, Any], live: int) -> tuple[str, str, int]:
    return kernel, json.dumps(problem, sort_keys=True), live


IN_STEP = "in step"  # the message of records whose seconds are those of the calls within a whole step
STEP = "step"  # the "kernel" of records that time a whole training step
SECTIONS = (
    "sections.forward",
    "sections.grad_input",
)  # the "kernels" of records that time a layer whose index is cut otherwise
COUNTED = "instructions"  # begins the `cpu` of records that are ranked by executed instructions
MODEL_UNIT = 1e-9  # "seconds" of a modelled cycle or an executed instruction in records, as if the core ran at 1 GHz


@dataclass(frozen=True, slots=True)
class Choice:
    """Knobs for a kernel and where they are from: "exact" (this very problem was tuned), "nearest" (one like it) or
    "default".
    A step that is loaded keeps those of the step that was saved.

    seconds, default_seconds  as recorded for these knobs and for the default ones, where they are
    modelled  by records of a model instead of a clock, whose seconds are a scale
    """

    knobs: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "default"
    seconds: float | None = None
    default_seconds: float | None = None
    modelled: bool = False


def target_facts(target: Target) -> dict[str, Any]:
    """What of a target decides how fast a kernel's text runs; sizes of caches and the like are in the text."""
    return {"device": target.device, "llvm": plain(target.llvm), "vector": target.vector}


def unit_of(measure: Measure, cpu: str) -> tuple[str, float]:
    """(a unit for people, how many of it are in a second of records of that clock)."""
    if measure is not Measure.MODELLED:
        return "ms", 1e3
    return f"k{COUNTED if cpu.startswith(COUNTED) else 'cycles'}", 1e-3 / MODEL_UNIT

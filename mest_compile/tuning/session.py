"""A tuning session: tasks of a step, their default kernels, MetaSchedule's search, and a second look at the winners.

Everything it learns goes to the log at once, one record a trial, and it begins by reading that log: stopped anywhere,
even by kill -9, it goes on behind the last record.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Protocol

from mest_compile.hardware.target import Target
from mest_compile.ir.program import Program
from mest_compile.kernels.cache import Builder
from mest_compile.records.log import LogFile, Measure, Outcome, Record, Records, Trials, plain, text_digest
from mest_compile.records.record import IN_STEP, target_facts
from mest_compile.sparsity.layer import Layer
from mest_compile.tuning.deadline import Deadline
from mest_compile.tuning.runner import Runner, Timing
from mest_compile.tuning.search import search
from mest_compile.tuning.space import Space
from mest_compile.tuning.task import Task, prepare, tasks_of

FINALISTS = 3  # kernels of a task that are timed again beside the default one, in turns
ROUNDS = 5  # of these turns
STEP_FINALISTS = 6  # kernels of a task that are timed within whole steps
DRAWS = 3  # among as many draws of the other tasks' kernels
CONFIRMED = "confirmed"  # the message of records of a second look
SMALL_SHARE = 0.004  # of the step: kernels below are left on their defaults


InStep = Callable[[Sequence[Mapping[Task, Mapping[str, Any]]]], list[dict[Task, list[float]]]]


class Progress(Protocol):
    """What a session tells whoever watches. seconds are medians; None: not known yet."""

    def on_stage(self, stage: str, done: int, total: int) -> None: ...

    def on_trial(
        self, task: Task, record: Record, best: float | None, default: float | None, done: int, total: int
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class TaskResult:
    """calls: of the step; seconds of one call; knobs: of the fastest right kernel; outcomes: how many trials ended
    how."""

    name: str
    kernel: str
    live: int
    calls: int
    default_seconds: float | None
    best_seconds: float | None
    knobs: Mapping[str, Any]
    trials: int
    outcomes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionResult:
    """finished: whether every task had its trials; measured: trials of this session; cpu: of its records; log: where
    they are; left_out: what there was no time for.
    """

    tasks: tuple[TaskResult, ...]
    finished: bool
    measured: int
    seconds: float
    vector: int
    measure: str
    cpu: str
    log: str
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return plain(asdict(self))


class Session:
    """Tunes the kernels of one step for `target`, whose vector width is settled.

    records  what is known already, the log among it
    in_step  times choices of knobs within whole steps; None: winners are timed again by themselves
    """

    def __init__(
        self,
        program: Program,
        layers: Mapping[str, Layer],
        target: Target,
        runner: Runner,
        log: LogFile,
        records: Records,
        builder: Builder | None = None,
        progress: Progress | None = None,
        in_step: InStep | None = None,
    ):
        self.program, self.layers, self.target, self.runner = program, layers, target, runner
        self.log, self.records, self.progress, self.in_step = log, records, progress, in_step
        self.builder = builder or Builder()
        self._measured = 0
        self._trials = 0
        self._deadline = Deadline()

    def run(self, trials: int, deadline: Deadline | None = None, seed: int = 0) -> SessionResult:
        """At most `trials` of every task, until the deadline. Raises StateError, DeviceError."""
        started = time.monotonic()
        self._deadline = self.runner.deadline = deadline or Deadline()
        self._trials = trials
        with tempfile.TemporaryDirectory() as folder:
            tasks = tasks_of(self.program, self.layers, self.target, Path(folder))
            left_out = self._tune(tasks, trials, seed)
        results = tuple(self._result(task) for task in tasks)
        return SessionResult(
            results,
            not left_out,
            self._measured,
            time.monotonic() - started,
            self.target.vector,
            self.runner.measure.value,
            self.runner.cpu,
            str(self.log.path),
            tuple(left_out),
        )

    def _tune(self, tasks: list[Task], trials: int, seed: int) -> list[str]:
        """What there was no time for: defaults, trials, the winners' second look."""
        left_out: list[str] = []
        with self._deadline.noting("", left_out):
            self._time_defaults(tasks)
            self._search(self._large(tasks), trials, seed)
            self._look_again(self._large(tasks))
        if not left_out:
            return []
        untried = [task for task in tasks if not self._known(task).tried]
        unsearched = [task for task in self._large(tasks) if self._spent(task) < min(trials, _size(task))]
        lacking = {"the defaults": untried, "trials": unsearched}
        said = [f"{what} of {len(some)} of {len(tasks)} kernels" for what, some in lacking.items() if some]
        return [*said, "a second look at the winners"]

    def _large(self, tasks: list[Task]) -> list[Task]:
        least = SMALL_SHARE * sum(self._weight(task) for task in tasks)
        return [task for task in tasks if self._weight(task) >= least]

    def _time_defaults(self, tasks: list[Task]) -> None:
        untried = [task for task in tasks if not self._known(task).tried]
        for number, task in enumerate(untried):
            self._stage("timing the defaults", number, len(untried))
            self._prepare(task)
            self._attempt(task, {})

    def _search(self, tasks: list[Task], trials: int, seed: int) -> None:
        unsearched = [task for task in tasks if self._spent(task) < min(trials, _size(task))]
        for number, task in enumerate(unsearched):
            self._stage("preparing", number, len(unsearched))
            self._prepare(task)
        searched = [task for task in unsearched if _size(task) > trials]
        if searched:
            spaces = [Space(task, number) for number, task in enumerate(searched)]
            search(
                spaces,
                [self._weight(task) for task in searched],
                trials,
                [self._spent(task) for task in searched],
                [self._known(task).records for task in searched],
                self.runner,
                self._report,
                self._deadline,
                seed,
            )
        for task in unsearched:
            self._fill(task, trials, seed)

    def _look_again(self, tasks: list[Task]) -> None:
        if self.runner.measure is Measure.MODELLED:  # the same whenever it is asked for
            return
        wanted = CONFIRMED if self.in_step is None else IN_STEP
        unconfirmed = [
            task
            for task in tasks
            if self._known(task).records[-1].message != wanted
            and any(knobs for _, knobs, _ in self._known(task).ranking())
        ]
        if self.in_step is not None:
            if unconfirmed:
                self._stage("timing the winners in whole steps", 0, 1)
                self._confirm_in_step(tasks)
            return
        for number, task in enumerate(unconfirmed):
            self._stage("timing the winners again", number, len(unconfirmed))
            self._prepare(task)
            self._confirm(task)

    def _fill(self, task: Task, trials: int, seed: int) -> None:
        """Tries candidates that nobody tried, evenly drawn, until the task had its trials: a search may end early, a
        space be smaller."""
        space = task.space()
        untried = list(product(*space.values()))
        random.Random(f"{seed} {task.name}").shuffle(untried)
        for values in untried:
            known = self._known(task).tried
            if len(known) >= trials:
                return
            knobs = {name: value for (name, choices), value in zip(space.items(), values) if value != choices[0]}
            if json.dumps(plain(knobs), sort_keys=True) not in known:
                self._attempt(task, knobs)

    def _prepare(self, task: Task) -> None:
        if not task.arrays.exists():
            self._deadline.check()
            prepare(task, self.program, self.layers, self.builder)

    def _confirm(self, task: Task) -> None:
        """Times the finalists and the default kernel in turns: what looked fastest once may have been lucky."""
        best = [knobs for _, knobs, _ in self._known(task).ranking()[:FINALISTS]]
        if not best or (not best[0] and len(best) == 1):
            return
        knobs: list[dict[str, Any]] = [{}, *(one for one in best if one)]
        with tempfile.TemporaryDirectory() as folder:
            sources = [task.source(one) for one in knobs]
            built = [self.runner.build(source, Path(folder)) for source in sources]  # each was built before
            seconds: list[list[float]] = [[] for _ in knobs]
            for _ in range(ROUNDS):
                for place, (source, artifact) in enumerate(zip(sources, built)):
                    self._deadline.check()
                    timing = self.runner.run(task, artifact, source.symbol)
                    if timing.outcome is not Outcome.OK:  # it was right before: once wrong is wrong
                        self._note(task, knobs[place], timing)
                    seconds[place] += timing.seconds
        for one, found in zip(knobs, seconds):
            self._note(task, one, Timing(Outcome.OK, tuple(found), CONFIRMED))

    def _confirm_in_step(self, tasks: list[Task]) -> None:
        """Times the finalists of all tasks within whole steps, in turns; each step has one of every task's, drawn by
        lot.

        What a kernel finds in the caches depends on its neighbours' knobs, so each of its own is timed among several
        draws of those.
        """
        assert self.in_step is not None
        finalists = {
            task: [
                {},
                *[knobs for _, knobs, _ in self._known(task).ranking(by_themselves=True) if knobs][:STEP_FINALISTS],
            ]
            for task in tasks
        }
        for draw in range(DRAWS):
            rng = random.Random(draw)
            drawn: dict[Task, list[dict[str, Any]]] = {
                task: rng.sample(knobs, len(knobs)) for task, knobs in finalists.items()
            }
            chosen = [
                {task: knobs[place] for task, knobs in drawn.items() if place < len(knobs)}
                for place in range(STEP_FINALISTS + 1)
            ]
            for choice, found in zip(chosen, self.in_step([choice for choice in chosen if choice])):
                for task, knobs in choice.items():
                    self._note(task, knobs, Timing(Outcome.OK, tuple(found[task]), IN_STEP))

    def _attempt(self, task: Task, knobs: Mapping[str, Any]) -> None:
        self._deadline.check()
        with tempfile.TemporaryDirectory() as folder:
            self._tell(task, knobs, self.runner.attempt(task, task.source(knobs), Path(folder)))

    def _report(self, space: Space, knobs: Mapping[str, Any], timing: Timing) -> None:
        self._tell(space.task, knobs, timing)

    def _tell(self, task: Task, knobs: Mapping[str, Any], timing: Timing) -> None:
        record = self._note(task, knobs, timing)
        self._measured += 1
        if self.progress:
            ranking = self._known(task).ranking()
            default = next((seconds for seconds, found, _ in ranking if not found), None)
            self.progress.on_trial(
                task, record, ranking[0][0] if ranking else None, default, self._spent(task), self._trials
            )

    def _note(self, task: Task, knobs: Mapping[str, Any], timing: Timing) -> Record:
        """The log first: what is not on the disk did not happen."""
        measure = Measure.UNMEASURED if timing.outcome is Outcome.BUILD_FAILED else self.runner.measure
        limited = timing.outcome in (Outcome.OK, Outcome.TIMED_OUT) and timing.message != IN_STEP
        record = Record(
            task.kernel,
            plain(task.problem),
            task.live,
            target_facts(self.target),
            self.runner.cpu,
            dict(knobs),
            timing.outcome,
            measure,
            timing.seconds,
            text_digest(task.source(knobs).text),
            message=timing.message,
            limit_seconds=self.runner.options.timeout_seconds if limited else None,
        )
        self.log.append(record)
        self.records.add(record)
        return record

    def _known(self, task: Task) -> Trials:
        known = self.records.trials(task.kernel, task.problem, task.live, self.runner.measure, self.runner.cpu)
        return known.decided(self.runner.options.timeout_seconds)

    def _spent(self, task: Task) -> int:
        return len(self._known(task).tried)

    def _weight(self, task: Task) -> float:
        ranking = self._known(task).ranking()
        return task.calls * (ranking[0][0] if ranking else 0.0)

    def _stage(self, stage: str, done: int, total: int) -> None:
        self._deadline.check()
        if self.progress:
            self.progress.on_stage(stage, done, total)

    def _result(self, task: Task) -> TaskResult:
        known = self._known(task)
        ranking = known.ranking()
        default = next((seconds for seconds, knobs, _ in ranking if not knobs), None)
        outcomes: dict[str, int] = {}
        for record in known.records:
            if record.message not in (CONFIRMED, IN_STEP):
                outcomes[record.outcome.value] = outcomes.get(record.outcome.value, 0) + 1
        best = ranking[0] if ranking else (None, {}, "")
        return TaskResult(
            task.name, task.kernel, task.live, task.calls, default, best[0], best[1], len(known.tried), outcomes
        )


def _size(task: Task) -> int:
    size = 1
    for values in task.space().values():
        size *= len(values)
    return size

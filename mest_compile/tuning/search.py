"""MetaSchedule's search around a runner: its evolutionary search, XGBoost cost model, task scheduler and database."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from mest_compile.records.log import Outcome, Record
from mest_compile.tuning.deadline import Deadline, OutOfTime
from mest_compile.tuning.runner import Runner, Timing
from mest_compile.tuning.space import Space, feature_extractor, meta_schedule, mutator, places_in

ROUND = 8  # candidates between two trainings of the cost model
WARM_UP = 16  # trials, of all tasks together, before it is asked
FAILED_SECONDS = 1e10  # what MetaSchedule takes a failure for

Report = Callable[[Space, dict[str, Any], Timing], None]


def search(
    spaces: Sequence[Space],
    weights: Sequence[float],
    trials: int,
    done: Sequence[int],
    known: Sequence[Sequence[Record]],
    runner: Runner,
    report: Report,
    deadline: Deadline,
    seed: int = 0,
) -> Any:
    """Tries candidates until every task has had `trials` or time is up; returns MetaSchedule's database with all of
    them.

    weights  seconds of a step that each task takes
    done     trials that each had in sessions before; known: their records, with which database and cost model start
    report   is told of each trial as soon as it has ended
    """
    import tvm
    from tvm.ir.utils import derived_object

    ms = meta_schedule()
    builder_base: Any = ms.builder.PyBuilder
    future_base: Any = ms.runner.PyRunnerFuture
    runner_base: Any = ms.runner.PyRunner
    target = tvm.target.Target({"kind": "llvm", "num-cores": 1})  # of the stand-ins
    tokens = itertools.count()
    raised: list[BaseException] = []
    tried = {
        (space.number, repr(sorted(record.knobs.items()))): Timing(record.outcome, record.seconds)
        for space, records in zip(spaces, known, strict=True)
        for record in records
    }
    candidates: dict[str, tuple[Space, dict[str, int]]] = {}

    @derived_object
    class KnobBuilder(builder_base):
        """Hands the knobs on; the runner builds and runs in one go, so that what was tried is recorded one by one."""

        def build(self, inputs: Sequence[Any]) -> list[Any]:
            found = []
            for one in inputs:
                number, places = places_in(one.mod)
                token = str(next(tokens))
                candidates[token] = spaces[number], places
                found.append(ms.builder.BuilderResult(token, None))
            return found

    @derived_object
    class Done(future_base):
        def __init__(self, result: Any):
            super().__init__()
            self._result = result

        def done(self) -> bool:
            return True

        def result(self) -> Any:
            return self._result

    @derived_object
    class KnobRunner(runner_base):
        def run(self, inputs: Sequence[Any]) -> list[Any]:
            with ThreadPoolExecutor(runner.devices) as devices, tempfile.TemporaryDirectory() as folder:
                try:
                    timings = list(devices.map(lambda one: self._attempt(str(one.artifact_path), Path(folder)), inputs))
                except BaseException as problem:
                    raised.append(problem)
                    raise
            return [
                Done(
                    ms.runner.RunnerResult(list(timing.seconds), None)
                    if timing.outcome is Outcome.OK
                    else ms.runner.RunnerResult(None, timing.message or timing.outcome.value)
                )
                for timing in timings
            ]

        def _attempt(self, token: str, folder: Path) -> Timing:
            deadline.check()
            space, places = candidates.pop(token)
            knobs = space.knobs_at(places)
            key = (space.number, repr(sorted(knobs.items())))
            if key not in tried:  # the search proposes some twice
                tried[key] = runner.attempt(space.task, space.task.source(knobs), folder)
                report(space, knobs, tried[key])
            return tried[key]

    def context(space: Space) -> Any:
        many = max(min(64, space.size // 2), 2)
        generator = ms.space_generator.ScheduleFn(
            space.sample, sch_rules=[], postprocs=[], mutator_probs={mutator(seed): 1.0}
        )
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=many, init_measured_ratio=0.3, init_min_unmeasured=1, genetic_num_iters=3, eps_greedy=0.1
        )
        return ms.TuneContext(
            mod=space.module,
            target=target,
            space_generator=generator,
            search_strategy=strategy,
            num_threads=1,
            task_name=space.task.name,
            rand_state=seed + 1,
        )

    contexts = [context(space) for space in spaces]
    database = ms.database.MemoryDatabase()
    model = ms.cost_model.XGBModel(
        extractor=feature_extractor(spaces), num_tuning_cores=1, num_warmup_samples=WARM_UP, adaptive_training=True
    )
    for space, one, records in zip(spaces, contexts, known, strict=True):
        _start_from(database, model, one, space, records)
    left = sum(max(trials - spent, 0) for spent in done)
    try:
        ms.tune.tune_tasks(
            tasks=contexts,
            task_weights=list(weights),
            work_dir="",
            max_trials_global=left,
            max_trials_per_task=max(trials - spent for spent in done),
            num_trials_per_iter=ROUND,
            builder=KnobBuilder(),
            runner=KnobRunner(),
            database=database,
            cost_model=model,
            measure_callbacks=[ms.measure_callback.AddToDatabase(), ms.measure_callback.UpdateCostModel()],
        )
    except Exception:  # TVM gives another type to what a callback raises
        if not raised:
            raise
        if not isinstance(raised[0], OutOfTime):
            raise raised[0] from None
    return database


def to_database(space: Space, records: Sequence[Record], database: Any) -> list[tuple[Any, Any]]:
    """Commits records of a task to a MetaSchedule database; returns (candidate, result) of those whose knobs the space
    still has."""
    import tvm
    from tvm.s_tir import Schedule

    ms = meta_schedule()
    target = tvm.target.Target({"kind": "llvm", "num-cores": 1})
    workload, found = database.commit_workload(space.module), []
    for record in records:
        places = space.places(record.knobs)
        if places is None:
            continue
        schedule = Schedule(space.module)
        space.sample(schedule, places)
        right = record.outcome is Outcome.OK
        seconds = [median(record.seconds)] if right else [FAILED_SECONDS]
        database.commit_tuning_record(
            ms.database.TuningRecord(
                schedule.trace, workload, seconds, target, ms.arg_info.ArgInfo.from_entry_func(space.module)
            )
        )
        result = ms.runner.RunnerResult(seconds if right else None, None if right else record.outcome.value)
        found.append((ms.search_strategy.MeasureCandidate(schedule, []), result))
    return found


def _start_from(database: Any, model: Any, context: Any, space: Space, records: Sequence[Record]) -> None:
    known = to_database(space, records, database)
    if known:
        candidates, results = zip(*known)
        model.update(context, list(candidates), list(results))

"""Tuning sessions: right answers only, resumed after a kill, replayed without measuring, on this machine and over
RPC."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ship_log

import mest_compile as mest
from mest_compile import compiling
from mest_compile.frontend import import_model
from mest_compile.hardware.target import find_target
from mest_compile.kernels.choosing import choose_knobs
from mest_compile.kernels.source import SCHEDULES, Schedule, kernel_source, knob_space
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.planning.layout import CACHES
from mest_compile.planning.plan import plan_step
from mest_compile.records.knob import Knob
from mest_compile.records.log import LogFile, Measure, Outcome, Record, Records, plain, text_digest
from mest_compile.records.record import SECTIONS, target_facts
from mest_compile.tuning import command, session
from mest_compile.tuning.deadline import Deadline, OutOfTime, TimedBuilder
from mest_compile.tuning.layout import ROUNDS, time_sections, time_vectors
from mest_compile.tuning.runner import Runner, RunnerOptions, Timing, find_runner
from mest_compile.tuning.search import to_database
from mest_compile.tuning.session import Session
from mest_compile.tuning.space import Space, meta_schedule, places_in
from mest_compile.tuning.task import prepare, tasks_of

SHAPE = (8, 3, 8, 8)
MAIN = [sys.executable, "-c", "from mest_compile.cli import main; main()"]
TINY = ["tune", "--model", "mlp", "--width", "32", "--batch", "8", "--scheme", "block:4x1"]


@pytest.fixture(scope="module")
def target():
    return find_target("local").for_batch(SHAPE[0])


def planned(target, model="resnet20", width=8, scheme="block:4x1", sparsity=0.8):
    """(training program, prediction program, layers)."""
    graph, _ = import_model(build_model(model, SHAPE, 10, width, 0), SHAPE)
    plan = plan_step(graph, StepOptions(scheme, sparsity, target=target))
    return *plan.programs, plan.layers


@pytest.mark.parametrize(
    ("scheme", "sparsity"), [("block:4x1", 0.8), ("pattern", 0.8), ("filter", 0.6), ("channel", 0.6)]
)  # 3 of 8 live
def test_every_choice_of_every_knob_keeps_the_meaning(target, builder, tmp_path, scheme, sparsity):
    """Each value of the small knobs once, beside random ones of the others; answers of convolutions are whole numbers,
    so equal means equal."""
    import tvm

    train, _, layers = planned(target, scheme=scheme, sparsity=sparsity)
    rng = np.random.default_rng(0)
    tasks = tasks_of(train, layers, target, tmp_path)
    kinds = {}
    for task in tasks:
        kinds.setdefault(
            (task.kernel, len(getattr(task.problem, "passes", ())), getattr(task.problem, "accumulate", None)), task
        )
    assert {kernel.rpartition(".")[2] for kernel, _, _ in kinds} == {"conv", "grad", "forward", "backward"}
    for task in kinds.values():
        prepare(task, train, layers, builder)
        space, arrays = task.space(), task.load()
        assert arrays.wanted and (arrays.allowed == 0) == (not task.kernel.startswith("batch_norm."))
        rounds = min(max(len(values) for values in space.values()), 4)
        columns = {
            name: [*rng.permutation(len(values)), *rng.integers(0, len(values), rounds)]
            for name, values in space.items()
        }
        for turn in range(rounds):
            knobs = {name: space[name][column[turn]] for name, column in columns.items()}
            tensors = [tvm.runtime.tensor(array) for array in arrays.arguments]
            builder.function(task.source(knobs))(*tensors)
            assert arrays.check([tensor.numpy() for tensor in tensors]) is None, (task.name, knobs)


def test_the_check_notices_one_wrong_element_and_nan(target, builder, tmp_path):
    train, _, layers = planned(target, "mlp")
    task = tasks_of(train, layers, target, tmp_path)[0]
    prepare(task, train, layers, builder)
    place, wanted = next(iter(task.load().wanted.items()))
    for wrong in (wanted[3] + 1, np.nan):
        after = task.arguments()
        for known, array in task.load().wanted.items():
            after[known] = array.copy()
        assert task.check(after) is None
        after[place][3] = wrong
        assert "1 of" in task.check(after)
    assert task.check(task.arguments()) is not None  # nothing was computed


VARIANTS = ("right", "wrong", "crashing", "hanging", "broken")


def spoilt(text, variant):
    """A kernel's text that is fast and wrong, reads where nothing is, never ends, or is no program."""
    start = "for piece in T.parallel("
    at = text.index(start)
    if variant == "wrong":
        return text.replace("for unit in T.serial(", "for unit in T.serial(0 * ")
    if variant == "crashing":
        return text[:at] + "result[1 << 30] = T.float32(1)\n    " + text[at:]
    if variant == "hanging":
        loop = (
            "for never in T.serial(2000000000):\n        for ever in T.serial(2000000000):\n"
            "            result[0] = result[0] * T.float32(1.5)\n    "
        )
        return text[:at] + loop + text[at:]
    return text.replace(start, "for piece im T.parallel(") if variant == "broken" else text


def test_wrong_crashing_hanging_and_broken_kernels_are_recorded_and_never_win(target, builder, tmp_path, monkeypatch):
    train, _, layers = planned(target, "mlp")
    victim = next(call.problem for call in train.calls if call.kernel == "gather.conv")
    usual = SCHEDULES.find("cpu/gather.conv")

    def spoiling(problem, target, variant):
        return spoilt(usual(problem, target), variant)

    knob = Knob("variant", VARIANTS[0], "", lambda problem, target: VARIANTS[1:] if problem == victim else ())
    monkeypatch.setitem(SCHEDULES, "cpu/gather.conv", Schedule(spoiling, (knob,)))
    monkeypatch.setitem(SCHEDULES, "cpu/gather.grad", Schedule(SCHEDULES.find("cpu/gather.grad")))  # without knobs
    log = LogFile(tmp_path / "local.jsonl")
    runner = find_runner("local")(target, RunnerOptions(timeout_seconds=8))
    try:
        result = Session(train, layers, target, runner, log, Records(target, [log.path]), builder).run(
            trials=len(VARIANTS)
        )
    finally:
        runner.close()
    (task,) = result.tasks
    measures = {record.outcome: record.measure for record in map(Record.from_line, log.path.read_text().splitlines())}
    assert [outcome for outcome, measure in measures.items() if measure is Measure.UNMEASURED] == [Outcome.BUILD_FAILED]
    assert dict(task.outcomes) == {"ok": 1, "wrong-answer": 1, "crashed": 1, "timed-out": 1, "build-failed": 1}
    assert task.knobs == {} and result.finished
    choices = choose_knobs([train], layers, target, Records(target, [log.path]))["train"]
    assert all(not choice.knobs for choice in choices.values())


class Clock(Runner):
    """Modelled seconds that the knobs decide: for sessions without a device."""

    measure = Measure.MODELLED

    def build(self, source, folder):
        path = folder / source.symbol
        path.write_text(source.text)
        return path

    def run(self, task, artifact, symbol, repeats=None):
        return Timing(Outcome.OK, (1.0 + int(text_digest(artifact.read_text()), 16) % 1000 / 1000,) * 3)


def test_a_search_spends_its_trials_on_distinct_candidates_and_a_finished_one_none(target, builder, tmp_path):
    train, _, layers = planned(target, "mlp")
    log = LogFile(tmp_path / "local.jsonl")

    def run():
        return Session(
            train, layers, target, Clock(target, RunnerOptions()), log, Records(target, [log.path]), builder
        ).run(trials=12)

    first = run()
    lines = [Record.from_line(line) for line in log.path.read_text().splitlines()]
    trials = [(*line.key, repr(sorted(line.knobs.items()))) for line in lines if line.message != "confirmed"]
    assert len(trials) == len(set(trials)) == first.measured
    assert (
        first.finished
        and any(task.trials == 12 for task in first.tasks)
        and all(task.trials <= 12 for task in first.tasks)
    )
    assert all(task.best_seconds <= task.default_seconds for task in first.tasks)
    again = run()
    assert again.finished and again.measured == 0 and again.tasks == first.tasks


def test_the_final_times_every_finalist_among_several_draws_of_its_neighbours_and_decides(target, builder, tmp_path):
    class Watch(Clock):
        measure = Measure.MEASURED

    train, _, layers = planned(target, "mlp")
    log, finals = LogFile(tmp_path / "local.jsonl"), []

    def in_step(choices):
        finals.append(choices)
        return [{task: [2.0 if knobs else 1.0] * 3 for task, knobs in choice.items()} for choice in choices]

    records = Records(target, [log.path])
    done = Session(train, layers, target, Watch(target, RunnerOptions()), log, records, builder, in_step=in_step).run(
        12
    )
    assert len(finals) == session.DRAWS and all(not task.knobs for task in done.tasks), (
        "whole steps said that the defaults are fastest"
    )
    timed = [
        {task.name: sorted(repr(choice[task]) for choice in choices if task in choice) for task in choices[0]}
        for choices in finals
    ]
    assert all(found == timed[0] for found in timed)
    assert all("{}" in found and len(found) == len(set(found)) for found in timed[0].values())
    assert max(map(len, timed[0].values())) == session.STEP_FINALISTS + 1
    rows = [
        [[repr(knobs) for knobs in choice.values()] for choice in choices if {} in choice.values()]
        for choices in finals
    ]
    assert rows[0] != rows[1] and any(set(row) != {"{}"} for row in rows[0]), (
        "the defaults stood beside each other alone"
    )


def test_trials_that_a_search_leaves_are_drawn_from_the_space_and_repeat_with_their_seed(
    target, builder, tmp_path, monkeypatch
):
    train, _, layers = planned(target, "mlp")
    monkeypatch.setattr(session, "search", lambda *ignored: None)

    def knobs(name, seed):
        log = LogFile(tmp_path / name)
        done = Session(
            train, layers, target, Clock(target, RunnerOptions()), log, Records(target, [log.path]), builder
        ).run(12, seed=seed)
        assert done.finished and max(task.trials for task in done.tasks) == 12
        return [(line.key, line.knobs) for line in map(Record.from_line, log.path.read_text().splitlines())]

    first = knobs("a", 0)
    assert first == knobs("b", 0) != knobs("c", 1)


def test_records_become_meta_schedule_records_and_back(target, tmp_path):
    train, _, layers = planned(target, "mlp")
    task = tasks_of(train, layers, target, tmp_path)[0]
    space = Space(task, 0)
    knobs = {name: values[-1] for name, values in task.space().items()}
    common = (task.kernel, plain(task.problem), task.live, target_facts(target), "")
    records = [
        Record(*common, chosen, Outcome.OK, Measure.MEASURED, (seconds,), "")
        for chosen, seconds in (({}, 2.0), (knobs, 1.0), ({"no such knob": 1}, 0.1))
    ]
    ms = meta_schedule()
    database = ms.database.JSONDatabase(work_dir=str(tmp_path))
    to_database(space, records, database)
    again = ms.database.JSONDatabase(work_dir=str(tmp_path))
    from tvm.s_tir import Schedule

    top = again.get_top_k(again.commit_workload(space.module), 5)
    assert [float(record.run_secs[0]) for record in top] == [1.0, 2.0]
    schedule = Schedule(space.module)
    top[0].trace.apply_to_schedule(schedule, remove_postproc=False)
    assert space.knobs_at(places_in(schedule.mod)[1]) == knobs


def test_a_step_takes_the_best_records_says_so_and_keeps_them_in_its_checkpoint(target, builder, tmp_path):
    model = build_model("mlp", SHAPE, 10, 32, 0)
    log = LogFile(tmp_path / "local.jsonl")
    plain_step = mest.compile(model, SHAPE, sparsity=0.8, records=Records(target), builder=builder)
    call = next(call for call in plain_step.program.calls if call.name.endswith("fc1.forward"))
    space = knob_space(call.kernel, call.problem, target)

    def note(knobs, seconds):
        live = plain_step.live_weights()[call.buffers[0].name.partition(":")[0]] // 4
        log.append(
            Record(
                call.kernel,
                plain(call.problem),
                live,
                target_facts(target),
                Records(target).cpu,
                knobs,
                Outcome.OK,
                Measure.MEASURED,
                (seconds,),
                text_digest(kernel_source(call.kernel, call.problem, target, **knobs).text),
            )
        )

    def compiled():
        return mest.compile(model, SHAPE, sparsity=0.8, records=Records(target, [log.path]), builder=builder)

    first, second = {"tile": space["tile"][1]}, {"together": space["together"][1]}
    note(first, 1.0)
    step = compiled()
    choice = step.kernel_choices()[call.name]
    assert (choice.origin, choice.knobs) == ("exact", first) and step.describe()["kernels"]["exact"] == 1
    assert compiled().kernel_choices() == step.kernel_choices()
    images, labels = np.random.default_rng(0).standard_normal(SHAPE, np.float32), np.arange(8)
    step(images, labels)
    step.save(tmp_path / "step.safetensors")
    note(second, 0.5)
    assert compiled().kernel_choices()[call.name].knobs == second
    loaded = mest.load(tmp_path / "step.safetensors", builder=builder)
    assert (loaded.kernel_choices()[call.name].origin, loaded.kernel_choices()[call.name].knobs) == ("exact", first)
    assert loaded(images, labels).loss == step(images, labels).loss


def test_the_width_of_vectors_is_what_was_fastest_for_such_a_step(target, builder, tmp_path):
    from mest_compile.planning.layout import choose_vector, step_facts, widened

    _, _, layers = planned(target, "mlp")
    facts, log = plain(step_facts(layers)), LogFile(tmp_path / "local.jsonl")
    for vector, seconds in ((8, 2.0), (4, 1.0), (16, 0.1)):  # a batch of 8 does not fill 16
        log.append(
            Record(
                "step",
                facts,
                0,
                target_facts(target),
                Records(target).cpu,
                {"vector": vector},
                Outcome.OK,
                Measure.MEASURED,
                (seconds,),
                text_digest("step"),
            )
        )
    assert choose_vector(layers, target, Records(target, [log.path])) == widened(target, 4)
    assert choose_vector(layers, target, Records(target)) == target


def test_steps_of_every_width_take_turns_and_the_fastest_is_taken(target, tmp_path):
    from mest_compile.planning.layout import choose_vector, widened

    _, _, layers = planned(target, "mlp")
    log, called = LogFile(tmp_path / "local.jsonl"), []

    def compiled(target, records):
        def step():
            called.append(target.vector)
            time.sleep({4: 0.001, 8: 0.02}[target.vector])

        return step

    for _ in range(2):  # the second time everything is on record
        time_vectors([8, 4], layers, target, compiled, (), log, Records(target, [log.path]))
        assert called == [8, 4] * (ROUNDS + 1)
    assert choose_vector(layers, target, Records(target, [log.path])) == widened(target, 4)


def test_sections_are_cut_as_was_fastest_for_such_layers_and_a_step_stays_the_same(target, builder, tmp_path):
    """Timed in whole steps, noted once, replayed without timing; what a step computes, and what its checkpoint holds,
    does not change."""
    small = replace(target, l1_bytes=4096)  # so that sections make a difference to small layers
    log = LogFile(tmp_path / "local.jsonl")
    model = build_model("mlp", SHAPE, 10, 64, 0)
    images, labels = np.random.default_rng(0).standard_normal(SHAPE, np.float32), np.arange(8)

    def compiled(target, records):
        return mest.compile(model, SHAPE, sparsity=0.8, target=target, threads=1, records=records, builder=builder)

    train, _, layers = planned(small, "mlp", 64)
    time_sections(train, layers, "float32", small, compiled, (images, labels), log, Records(small, [log.path]))
    records = [Record.from_line(line) for line in log.path.read_text().splitlines()]
    assert {record.kernel for record in records} == set(SECTIONS)
    assert {record.knobs.get("caches", 1) for record in records} == set(CACHES.values(None, target))
    assert all(len(record.seconds) == ROUNDS and min(record.seconds) > 0 for record in records)
    time_sections(train, layers, "float32", small, compiled, (images, labels), log, Records(small, [log.path]))
    assert len(log.path.read_text().splitlines()) == len(records), "what is on record was timed again"

    forced = LogFile(
        tmp_path / "forced.jsonl"
    )  # as if the largest sections had been the fastest forward, and the smallest backward
    for record in records:
        quick = max(CACHES.values(None, target)) if record.kernel == SECTIONS[0] else 1
        forced.append(replace(record, seconds=(0.1,) if record.knobs.get("caches", 1) == quick else (1.0,)))
    usual, cut = compiled(small, Records(small)), compiled(small, Records(small, [forced.path]))
    sizes = {name: (layer.section_channels, cut.layers[name].section_channels) for name, layer in usual.layers.items()}
    assert any(before < after for before, after in sizes.values()) and all(
        before <= after for before, after in sizes.values()
    )
    assert all(
        layer.transposed_section_channels == cut.layers[name].transposed_section_channels
        for name, layer in usual.layers.items()
    )
    for step in (usual, cut):
        step(images, labels)
        step.mutate(0.82, 0.8, rng=np.random.default_rng(1))
    np.testing.assert_allclose(cut(images, labels).loss, usual(images, labels).loss, rtol=1e-5)
    usual.save(tmp_path / "usual.safetensors")
    cut.restore(tmp_path / "usual.safetensors")
    for name, array in usual.state_dict().items():
        np.testing.assert_array_equal(cut.state_dict()[name], array)
    np.testing.assert_allclose(cut(images, labels).loss, usual(images, labels).loss, rtol=1e-5)
    for name, array in usual.state_dict().items():  # momentum came along as well
        np.testing.assert_allclose(cut.state_dict()[name], array, rtol=1e-4, atol=1e-5)


def test_shipping_a_log_keeps_what_other_cpus_recorded(target, tmp_path):
    mine = Record(
        "gather.conv",
        {"channels": 32},
        100,
        target_facts(target),
        Records(target).cpu,
        {},
        Outcome.OK,
        Measure.MEASURED,
        (2.0,),
        "text",
    )
    better, other = replace(mine, knobs={"run": 8}, seconds=(1.0,)), replace(mine, cpu="another", seconds=(9.0,))
    slower = replace(mine, knobs={"run": 1}, seconds=(3.0,))
    LogFile(tmp_path / "local.jsonl").append(other)
    for record in (mine, better, slower):
        LogFile(tmp_path / "new.jsonl").append(record)
    for _ in range(2):  # the second time changes nothing
        assert ship_log.main([str(tmp_path / "new.jsonl"), "--folder", str(tmp_path)]) == 0
        kept = [Record.from_line(line) for line in (tmp_path / "local.jsonl").read_text().splitlines()]
        assert {(record.cpu, record.seconds) for record in kept} == {
            ("another", (9.0,)),
            (mine.cpu, (2.0,)),
            (mine.cpu, (1.0,)),
        }


def test_shipping_a_log_of_boards_keeps_the_best_of_each(tmp_path):
    phone = find_target("cortex-a76")
    facts = ("gather.conv", {"channels": 32}, 100, target_facts(phone))
    for cpu, seconds in (("a Pi 5", (2.0, 1.0, 3.0)), ("a phone", (0.2, 0.3, 0.1))):
        for run, second in enumerate(seconds):
            knobs = {"run": run} if run else {}
            LogFile(tmp_path / "new.jsonl").append(
                Record(*facts, cpu, knobs, Outcome.OK, Measure.MEASURED, (second,), "text")
            )
    for _ in range(2):
        assert ship_log.main([str(tmp_path / "new.jsonl"), "--target", "cortex-a76", "--folder", str(tmp_path)]) == 0
        kept = [Record.from_line(line) for line in (tmp_path / "cortex-a76.jsonl").read_text().splitlines()]
        found = sorted((record.cpu, *record.seconds) for record in kept)
        assert found == [("a Pi 5", 1.0), ("a Pi 5", 2.0), ("a phone", 0.1), ("a phone", 0.2)]


def test_a_step_for_a_device_has_the_records_of_that_device_which_is_asked_once_there_are_some(tmp_path, monkeypatch):
    target, device, asked = find_target("cortex-a76"), mest.rpc("127.0.0.1:9190", "phone"), []
    monkeypatch.setattr("mest_compile.devices.probe.machine_of", lambda *given: asked.append(given) or "a phone")
    log = LogFile(tmp_path / "log.jsonl")
    assert compiling.of_machine(Records(target, [log.path]), device).cpu == "" and not asked
    for cpu, knobs, seconds in (
        ("a Pi 5", {}, 1.0),
        ("a Pi 5", {"run": 4}, 2.0),
        ("a phone", {}, 3.0),
        ("a phone", {"run": 4}, 2.0),
    ):
        log.append(
            Record(
                "gather.conv",
                {"channels": 32},
                100,
                target_facts(target),
                cpu,
                knobs,
                Outcome.OK,
                Measure.MEASURED,
                (seconds,),
                "text",
            )
        )
    records = compiling.of_machine(Records(target, [log.path]), device)
    assert asked == [(device, target)] and records.cpu == "a phone"
    assert records.best("gather.conv", {"channels": 32}, 100, lambda knobs: "text").knobs == {"run": 4}
    here = Records(find_target("local"), [log.path])
    assert compiling.of_machine(here, None) is here and len(asked) == 1


@pytest.fixture
def clock(monkeypatch):
    """What deadlines go by here: its `now` is moved by candidates alone, however busy the machine is."""
    told = SimpleNamespace(now=0.0)
    told.monotonic = lambda: told.now
    monkeypatch.setattr("mest_compile.tuning.deadline.time", told)
    return told


class Sleeper(Clock):
    """Whose candidates take a fifth of a second of `clock`, or as long as there is."""

    clock: SimpleNamespace

    def run(self, task, artifact, symbol, repeats=None):
        self.clock.now += min(0.2, self.patience_seconds)
        self.deadline.check()
        return super().run(task, artifact, symbol, repeats)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, ["the defaults of 8 of 8 kernels"]), (0.5, ["the defaults of"]), (2.5, ["trials of"])]
)
def test_a_session_ends_at_its_deadline_says_what_it_left_out_and_goes_on_later(
    seconds, said, target, builder, tmp_path, clock
):
    train, _, layers = planned(target, "mlp")
    log = LogFile(tmp_path / "local.jsonl")

    def run(deadline, trials=12):
        runner = Sleeper(target, RunnerOptions())
        runner.clock = clock
        return Session(train, layers, target, runner, log, Records(target, [log.path]), builder).run(trials, deadline)

    done = run(Deadline.after(seconds))
    assert not done.finished and done.left_out[-1] == "a second look at the winners"
    assert all(any(one.startswith(what) for one in done.left_out) for what in said)
    assert clock.now <= seconds + 0.2
    assert done.measured == (len(log.path.read_text().splitlines()) if log.path.exists() else 0)
    again = run(Deadline(), 1)
    assert again.finished and again.left_out == () and all(task.trials for task in again.tasks)


def test_a_time_limit_holds_from_the_first_moment_whatever_stage_it_ends(mest_compile_command, tmp_path):
    """Compiling whole steps, which comes first, would take far longer. Of this process: others may use the machine."""
    began = time.process_time()
    ran = mest_compile_command(
        "tune",
        "--model",
        "resnet32",
        "--batch",
        16,
        "--scheme",
        "block:4x1",
        "--time-limit",
        0.5,
        "--log",
        tmp_path / "local.jsonl",
        "--json",
    )
    assert ran.code == 0, ran.err
    left_out = ran.document["left_out"]
    assert (
        not ran.document["finished"]
        and "comparing sizes of sections" in left_out
        and "a second look at the winners" in left_out
    )
    assert (
        not (tmp_path / "local.jsonl").exists() and time.process_time() - began < 30
    )  # most of it importing torch and the model


def test_no_kernel_is_compiled_after_the_deadline(target, tmp_path):
    builder = TimedBuilder(folder=tmp_path, deadline=Deadline.after(0))
    train, _, layers = planned(target, "mlp")
    task = tasks_of(train, layers, target, tmp_path)[0]
    with pytest.raises(OutOfTime):
        builder.build([task.source({})])
    assert builder.compiled == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--target", "cortex-a72"],
            "is not this machine .that is for aarch64.*give the --tracker and --key .*--measure model",
        ),
        (["--target", "cortex-a72", "--runner", "local"], "is not this machine"),
        (["--target", "opencl", "--runner", "local"], "leave out --runner"),
    ],
)
def test_what_cannot_be_measured_here_is_refused_before_anything_is_built(
    mest_compile_command, monkeypatch, tmp_path, arguments, said
):
    monkeypatch.setattr(command, "read_any", lambda *_: pytest.fail("it went on"))
    ran = mest_compile_command(*TINY, *arguments, "--log", tmp_path / "log.jsonl")
    assert ran.code == 2 and re.search(said, " ".join(ran.err.split())), ran.err
    assert not (tmp_path / "log.jsonl").exists()


def test_a_longer_limit_tries_again_what_timed_out_within_a_shorter_one(target, builder, tmp_path):
    class Slow(Clock):
        def run(self, task, artifact, symbol, repeats=None):
            late = self.patience_seconds < 5 and task.name == slow
            return Timing(Outcome.TIMED_OUT, message="late") if late else super().run(task, artifact, symbol, repeats)

    train, _, layers = planned(target, "mlp")
    log = LogFile(tmp_path / "local.jsonl")
    slow = tasks_of(train, layers, target, tmp_path)[0].name

    def run(limit):
        runner = Slow(target, RunnerOptions(timeout_seconds=limit))
        return Session(train, layers, target, runner, log, Records(target, [log.path]), builder).run(1)

    first, again, longer = run(1), run(1), run(9)
    assert again.measured == 0 and longer.measured == 1
    timed = [
        next(task for task in done.tasks if task.name == slow).best_seconds is not None
        for done in (first, again, longer)
    ]
    assert timed == [False, False, True]


def test_tune_goes_on_after_kill_9_and_loses_at_most_the_trial_in_flight(tmp_path):
    log = tmp_path / "local.jsonl"
    command = [*MAIN, *TINY, "--trials", "5", "--log", str(log), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not log.exists() or log.read_bytes().count(b"\n") < 12:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = log.read_bytes()
    whole = before[: before.rfind(b"\n") + 1].count(b"\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["finished"] and log.read_bytes().startswith(before)
    records = [Record.from_line(line) for line in log.read_text().splitlines()[:whole]] + [
        Record.from_line(line)
        for line in log.read_text().splitlines()[whole + (len(before) > before.rfind(b"\n") + 1) :]
    ]
    trials = [(*record.key, repr(sorted(record.knobs.items()))) for record in records if record.message != "in step"]
    assert len(trials) == len(set(trials)) == whole + result["measured"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tracker", "127.0.0.1:1"], "--tracker and --key go together"),
        (["--tracker", "nowhere", "--key", "a"], "wanted host:port"),
        (["--runner", "telepathy"], "no tuning runner 'telepathy'"),
        (["--vectors", "8;16"], "wanted whole numbers"),
        (["--vectors", "3"], "wanted powers of two"),
    ],
)
def test_misuse_is_said(mest_compile_command, arguments, said):
    ran = mest_compile_command(*TINY, *arguments)
    assert ran.code == 2 and said in ran.err

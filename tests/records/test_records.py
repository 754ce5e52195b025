"""Tuning records: what is trusted, what wins, and what a damaged or foreign log does."""

import json
import logging
import random
import sys
from dataclasses import dataclass, field, fields, is_dataclass, replace

import pytest

from mest_compile.base.errors import StateError
from mest_compile.hardware.cpu import host_machine, host_model, machine_model
from mest_compile.hardware.target import Target, find_target
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.problem import ASIDE, SIZE
from mest_compile.operators.batch_norm import BatchNormBackward, BatchNormForward
from mest_compile.operators.operator import OPERATORS
from mest_compile.operators.optimizers.optimizer import Optimizer
from mest_compile.records import log as logs
from mest_compile.records.log import LogFile, Measure, Outcome, Record, Records, plain, shipped, tvm_version
from mest_compile.records.record import read_log, target_facts, unit_of

TARGET = Target(
    "board",
    "cpu",
    (("kind", "llvm"), ("mcpu", "cortex-a55"), ("mtriple", "aarch64-linux-gnu")),
    4,
    32,
    32768,
    131072,
    4,
)


@dataclass(frozen=True)
class Problem:
    channels: int = field(metadata=SIZE)
    stride: int = 1
    eps: float = field(default=0.0, metadata=ASIDE)
    image: Image | None = None
    images: tuple[Image, ...] = ()


def record(knobs, *seconds, problem=Problem(32), live=100, outcome=Outcome.OK, measure=Measure.MEASURED, **changed):
    made = Record(
        "gather.conv", plain(problem), live, target_facts(TARGET), "", knobs, outcome, measure, seconds, text(knobs)
    )
    return replace(made, **changed)


def text(knobs):
    """What the schedule gives; it does not know the knob "gone"."""
    return None if "gone" in knobs else f"text of {sorted(knobs.items())}"


def read(path, target=TARGET):
    return Records(target, [path]).load()


def best(records, problem=Problem(32), live=100):
    return records.best("gather.conv", problem, live, text)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "logs" / "board.jsonl"
    for one in (record({}, 3.0, 3.2), record({"tile": (4, 2)}, 2.0, 2.1, 1.9), record({"tile": (1, 1)}, 4.0)):
        LogFile(path).append(one)
    return path


def test_the_fastest_right_knobs_win_and_come_back_as_they_were(path):
    choice = best(read(path))
    assert (choice.origin, choice.knobs, choice.seconds, choice.default_seconds) == (
        "exact",
        {"tile": (4, 2)},
        2.0,
        3.1,
    )


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.OK])
def test_knobs_that_once_failed_never_win(path, outcome):
    LogFile(path).append(record({"tile": (9, 9)}, 0.001))
    LogFile(path).append(record({"tile": (9, 9)}, outcome=outcome))
    LogFile(path).append(record({"tile": (9, 9)}, 0.001))
    assert best(read(path)).knobs == {"tile": (4, 2)}


def test_a_log_is_read_once_until_something_is_appended(path, monkeypatch):
    asked = []
    monkeypatch.setattr(logs, "read_log", lambda path: asked.append(path) or read_log(path))
    first = best(read(path))
    assert best(read(path)) == first and len(asked) == 1
    LogFile(path).append(record({"tile": (7, 7)}, 1e-9))
    assert best(read(path)).knobs == {"tile": (7, 7)} and len(asked) == 2


def test_an_edited_time_is_noticed_and_left_out(path, caplog):
    edited = path.read_text().replace("4.0", "0.5")
    assert edited != path.read_text()
    path.write_text(edited)
    with caplog.at_level(logging.WARNING):
        records = read(path)
    assert records.left_out == {"damaged": 1} and best(records).knobs == {"tile": (4, 2)}
    assert "line 3 is left out" in caplog.text


@pytest.mark.parametrize("line", ["{}", "[1, 2]", "not json", '{"digest": "0"}', "null"])
def test_lines_that_are_no_records_are_left_out(path, line):
    path.write_text(line + "\n" + path.read_text())
    assert read(path).left_out == {"damaged": 1} and best(read(path)).knobs == {"tile": (4, 2)}


@pytest.mark.parametrize("lost", [1, 2, 50])
def test_a_torn_last_line_costs_that_line_only_and_the_next_one_stands_alone(path, lost):
    path.write_bytes(path.read_bytes()[:-lost])
    records = read(path)
    assert records.left_out == ({"torn": 1} if lost > 1 else {})
    LogFile(path).append(record({"tile": (2, 2)}, 1.0))
    assert best(read(path)).knobs == {"tile": (2, 2)}
    assert sum(map(len, read(path).trials("gather.conv", Problem(32), 100).seconds.values())) == (7 if lost == 1 else 6)


@pytest.mark.parametrize("changed", [{"tvm": "0.1"}, {"target": target_facts(replace(TARGET, vector=8))}])
def test_records_of_another_tvm_or_target_are_foreign(path, changed):
    LogFile(path).append(record({"tile": (7, 7)}, 0.1, **changed))
    records = read(path)
    assert records.left_out == {"foreign": 1} and best(records).knobs == {"tile": (4, 2)}


HERE = replace(TARGET, llvm=(("kind", "llvm"), ("mtriple", f"{host_machine()}-linux-gnu")))


def at(cpu, knobs, seconds, **changed):
    return record(knobs, seconds, cpu=cpu, **changed)


@pytest.mark.parametrize("name", ["local", "avx2", "mine"])
def test_a_target_that_this_machine_is_has_the_records_of_this_machine(name, tmp_path):
    """Whatever its file is called."""
    here, path = replace(HERE, name=name), tmp_path / "log.jsonl"
    for cpu, knobs, seconds in (
        (host_model(), {"tile": (7, 7)}, 0.1),
        ("", {"tile": (8, 8)}, 0.01),
        ("another", {"tile": (9, 9)}, 0.001),
    ):
        LogFile(path).append(at(cpu, knobs, seconds, target=target_facts(here)))
    LogFile(path).append(at("a model", {}, 1e-9, target=target_facts(here), measure=Measure.MODELLED))
    records = read(path, here)
    assert best(records).knobs == {"tile": (7, 7)} and records.left_out == {"foreign": 2} and len(host_model()) > 5
    assert best(records.for_target(here)).knobs == {"tile": (7, 7)} and best(records.on("another")).knobs == {
        "tile": (9, 9)
    }


def test_two_boards_of_a_target_never_mix(tmp_path):
    """Where the device is known its own records decide, else those of the board with most of them: never the least of
    both."""
    path = tmp_path / "board.jsonl"
    for board, times in (("your Pi 5", (3.0, 2.0, 2.5)), ("a phone", (0.2, 0.3))):
        for tile, seconds in enumerate(times):
            LogFile(path).append(at(board, {"tile": tile} if tile else {}, seconds))
    records = read(path)
    assert (best(records.on("your Pi 5")).knobs, best(records.on("a phone")).knobs) == ({"tile": 1}, {})
    assert (best(records).knobs, best(records).default_seconds) == ({"tile": 1}, 3.0)
    assert best(records.on("a third")).origin == "default" and records.measured() == ["your Pi 5", "a phone"]
    LogFile(path).append(at("a phone", {"tile": 5}, 0.1, problem=Problem(64)))
    assert best(read(path).on("your Pi 5"), Problem(64)).knobs == {"tile": 1}  # nearest, of its own


@pytest.mark.parametrize(
    ("cpuinfo", "board", "wanted"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t: 1\n", "", "AMD EPYC, family 25, model 1"),
        (
            "CPU implementer\t: 0x41\nCPU part\t: 0xd0b\nCPU part\t: 0xd0b\n",
            "Raspberry Pi 5\0",
            "implementer 0x41, part 0xd0b, Raspberry Pi 5",
        ),
        (
            "CPU implementer\t: 0x41\nCPU part\t: 0xd05\nCPU part\t: 0xd0b\n",
            "",
            "implementer 0x41, part 0xd05 and 0xd0b",
        ),
        ("", "", ""),
    ],
)
def test_a_machine_is_its_cpu_and_its_board(cpuinfo, board, wanted):
    assert machine_model(cpuinfo, board) == wanted


# Verdicts.


def damages(content, rng):
    """Every kind of damage to one line, at random places: a byte, its end, the end of its line, all of it, a line
    twice."""
    lines = content.splitlines(keepends=True)
    while True:
        number = rng.randrange(len(lines))
        line = lines[number]
        place = rng.randrange(len(line))
        before, behind, end = line[:place], line[place + 1 :], b"\n" * (number + 1 < len(lines))
        spoilt = rng.choice(
            [
                before + bytes([rng.randrange(256)]) + behind,
                before + end,
                before + behind,
                before + b"\n" + line[place:],
                b"",
                line[:-1],
                line + line,
                line[:-1] + rng.choice([b"\r", b"\0", b"x", b"}", b" "]),
                line.replace(b'"digest": "', b'"digest": "0', 1),
            ]
        )
        yield b"".join([*lines[:number], spoilt, *lines[number + 1 :]])


@pytest.mark.parametrize("verdict", [Outcome.WRONG, Outcome.CRASHED])
@pytest.mark.parametrize("place", ["first", "between", "last"])
def test_no_damage_to_one_line_lets_a_wrong_kernel_win(verdict, place, tmp_path):
    path, wrong, rng = tmp_path / "board.jsonl", {"tile": (9, 9)}, random.Random(place + verdict.value)
    entries = [
        record({}, 3.0),
        record({}, 3.0),
        record(wrong, 0.1),
        record({"tile": (4, 2)}, 2.0),
        record(wrong, 0.2, message="in step"),
    ]
    entries.insert(
        {"first": 0, "between": 3, "last": len(entries)}[place], record(wrong, outcome=verdict, message="argument 1")
    )
    for one in entries:
        LogFile(path).append(one)
    whole = path.read_bytes()
    assert wrong not in [knobs for _, knobs, _ in read(path).trials("gather.conv", Problem(32), 100).ranking()]
    for _, damaged in zip(range(40), damages(whole, rng), strict=False):
        path.write_bytes(damaged)
        assert best(read(path)).knobs != wrong, damaged.decode(errors="replace")
    path.write_bytes(whole)
    known = [one.outcome for one in read(path).trials("gather.conv", Problem(32), 100).records]
    assert known.count(verdict) == 1, "it is one that was told twice"
    assert known.count(Outcome.OK) == len(entries) - 1, "two that took the same time are two"


def test_a_verdict_of_an_older_log_that_stands_there_once_is_believed_so_far_as_it_can_be_read(tmp_path):
    path, wrong = tmp_path / "board.jsonl", {"tile": (9, 9)}
    entries = record({}, 3.0), record(wrong, 0.1), record(wrong, outcome=Outcome.WRONG), record({"tile": (4, 2)}, 2.0)
    lines = [one.to_line() for one in entries]
    for spoil in (
        lambda line: line[:-4] + 'f"}',
        lambda line: line[: line.index('"outcome"')],
        lambda line: line.replace("wrong-", "w"),
    ):
        path.write_text("\n".join([*lines[:2], spoil(lines[2]), lines[3], ""]))
        assert best(read(path)).knobs == {"tile": (4, 2)}
    path.write_text("\n".join([*lines[:2], lines[3].replace("2.0", "9.0"), ""]))  # an edited time is no verdict
    assert best(read(path)).knobs == wrong


def test_two_lines_that_became_one_are_both_read(path):
    whole = path.read_text()
    path.write_text(whole.replace("\n", "?", 1))
    assert best(read(path)).seconds == 2.0 and best(read(path)).default_seconds == 3.1


def test_a_time_out_is_no_verdict_for_a_longer_limit(tmp_path):
    path, slow = tmp_path / "board.jsonl", {"tile": (9, 9)}
    LogFile(path).append(record({}, 3.0, limit_seconds=0.1))
    LogFile(path).append(record(slow, outcome=Outcome.TIMED_OUT, limit_seconds=0.1))

    def known(limit):
        return read(path).trials("gather.conv", Problem(32), 100).decided(limit)

    assert len(known(0.1).tried) == len(known(0.05).tried) == len(known(0.1).records) == 2
    assert len(known(0.2).tried) == len(known(0.2).records) == 1
    assert best(read(path)).knobs == {}
    LogFile(path).append(record(slow, 0.5, limit_seconds=0.2))
    assert best(read(path)).knobs == slow and len(known(0.5).tried) == 2
    LogFile(path).append(record(slow, outcome=Outcome.TIMED_OUT, limit_seconds=0.2))  # it may hang
    assert best(read(path)).knobs == {}


def test_what_did_not_build_is_no_measurement_and_is_not_built_again_by_any_clock(tmp_path):
    path, unbuilt = tmp_path / "board.jsonl", {"tile": (9, 9)}
    LogFile(path).append(record(unbuilt, outcome=Outcome.BUILD_FAILED, measure=Measure.UNMEASURED, cpu="this board"))
    records = read(path)
    assert records.measured() == [] and best(records).origin == "default"
    for clock in ((Measure.MEASURED, "another board"), (Measure.MODELLED, "a model")):
        assert len(records.trials("gather.conv", Problem(32), 100, *clock).tried) == 1
    records.add(record({}, 1.0, cpu="another board"))
    known = records.trials("gather.conv", Problem(32), 100, Measure.MEASURED, "another board")
    assert len(known.tried) == len(known.records) == 2 and known.records[-1].outcome is Outcome.OK
    LogFile(path).append(record({}, 1.0, cpu="another board"))
    LogFile(path).append(record(unbuilt, 0.1, cpu="another board"))
    choice = best(read(path).on("another board"))
    assert (choice.origin, choice.knobs) == ("exact", {})


def test_measured_beats_modelled_and_emulated_is_never_used(path):
    fast = {"tile": (5, 5)}
    LogFile(path).append(record(fast, 1e-9, measure=Measure.MODELLED))
    LogFile(path).append(record({"tile": (6, 6)}, 1e-9, measure=Measure.EMULATED))
    assert best(read(path)).knobs == {"tile": (4, 2)}
    other = Problem(32, stride=2)
    LogFile(path).append(record(fast, 1e-9, problem=other, measure=Measure.MODELLED))
    LogFile(path).append(record({"tile": (6, 6)}, 1e-9, problem=other, measure=Measure.EMULATED))
    assert best(read(path), other).knobs == fast


def test_modelled_cycles_beat_executed_instructions_and_the_two_are_never_compared(tmp_path):
    path = tmp_path / "board.jsonl"
    modelled = {"measure": Measure.MODELLED}
    for knobs, cycles, instructions in (
        ({}, 3e-6, 3e-5),
        ({"tile": (1, 2)}, 2e-6, 4e-5),
        ({"tile": (2, 1)}, 4e-6, 1e-9),
    ):
        LogFile(path).append(record(knobs, instructions, cpu="instructions under qemu", **modelled))
        assert best(read(path)).modelled
        LogFile(path).append(record(knobs, cycles, cpu="a model", **modelled))
    choice = best(read(path))
    assert (choice.knobs, choice.seconds, choice.default_seconds, choice.modelled) == (
        {"tile": (1, 2)},
        2e-6,
        3e-6,
        True,
    )
    LogFile(path).append(record({}, 1.0))
    assert (best(read(path)).knobs, best(read(path)).modelled) == ({}, False)
    clocks = (Measure.MEASURED, ""), (Measure.MODELLED, "a model"), (Measure.MODELLED, "instructions under qemu")
    assert [unit_of(*clock)[0] for clock in clocks] == ["ms", "kcycles", "kinstructions"]


def test_a_record_of_another_text_is_not_exact(path):
    LogFile(path).append(record({"tile": (3, 3)}, 0.1, text="what the schedule gave last year"))
    assert best(read(path)).knobs == {"tile": (4, 2)}
    LogFile(path).append(record({"gone": 1}, 0.1, text="of a knob that is no more"))
    assert best(read(path)).knobs == {"tile": (4, 2)}


def test_knobs_that_won_with_an_older_text_are_a_suggestion_without_seconds(tmp_path):
    path = tmp_path / "local.jsonl"
    for knobs, seconds in ({}, 2.0), ({"tile": (4, 2)}, 1.0):
        LogFile(path).append(record(knobs, seconds, text="what the schedule gave last year"))
    choice = best(read(path))
    assert (choice.origin, choice.knobs) == ("nearest", {"tile": (4, 2)})
    assert choice.seconds is None and choice.default_seconds is None


def test_the_nearest_problem_of_the_same_structure_else_the_default(path):
    LogFile(path).append(record({"tile": (1, 4)}, 1.0, problem=Problem(128)))
    records = read(path)
    near = best(records, Problem(64), 120)
    assert (near.origin, near.knobs) == ("nearest", {"tile": (4, 2)})
    assert best(records, Problem(100), 120).knobs == {"tile": (1, 4)}
    for problem, live in ((Problem(32, stride=2), 100), (Problem(32 * 128), 100), (Problem(32), 100 * 64)):
        assert (best(records, problem, live).origin, best(records, problem, live).knobs) == ("default", {})
    assert best(Records(TARGET)).origin == "default"


def test_fields_say_what_makes_problems_alike(path):
    """Sizes, those of what they hold too, and what stands aside; lists by their lengths."""
    image = Image(8, 4, 4, 16, (0, 0, 0, 0), 16)
    wider, fewer = replace(image, channels=16, halo=(1, 1, 1, 1)), replace(image, batch=8)
    known = Problem(32, 1, 0.1, image, (image, image))
    LogFile(path).append(record({"tile": (5, 5)}, 0.1, problem=known))
    near = [replace(known, eps=0.2), replace(known, image=wider), replace(known, images=(image, fewer))]
    other = [
        replace(known, image=replace(image, vector=8)),
        replace(known, image=None),
        replace(known, images=(image,)),
    ]
    for problem in near:
        assert (best(read(path), problem).origin, best(read(path), problem).knobs) == ("nearest", {"tile": (5, 5)})
    for problem in (*other, replace(known, images=()), plain(replace(known, channels=33))):
        assert best(read(path), problem).knobs != {"tile": (5, 5)}, problem


def test_numbers_that_a_kernel_only_reckons_with_stand_aside_in_every_problem():
    """So that what was tuned for one norm serves one with another eps."""
    OPERATORS.load()
    problems = [
        one
        for name, module in sys.modules.items()
        if name.startswith("mest_compile.operators.")
        for one in vars(module).values()
        if isinstance(one, type) and is_dataclass(one) and one.__module__ == name and not issubclass(one, Optimizer)
    ]
    marks = {
        one.__name__: held.metadata for one in problems for held in fields(one) if held.name in ("eps", "momentum")
    }
    assert len(marks) >= 5 and all(mark.get("likeness") == "aside" for mark in marks.values()), marks


def test_a_line_tells_cpu_and_tvm_and_is_json(path):
    facts = json.loads(path.read_text().splitlines()[1])
    assert facts["tvm"] == tvm_version() and facts["knobs"] == {"tile": [4, 2]} and facts["outcome"] == "ok"
    assert Record.from_line(path.read_text().splitlines()[1]) == record({"tile": (4, 2)}, 2.0, 2.1, 1.9)


def test_a_log_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"local.jsonl cannot be written: .*; pass another --log"):
        LogFile(tmp_path / "file" / "local.jsonl").append(record({"tile": (2, 2)}, 1.0))


def test_records_from_before_batch_norm_knew_activations_are_of_todays_problems(tmp_path):
    """They said `relu`, true or false, in its place."""
    image = Image(8, 4, 4, 16, (0, 0, 0, 0), 16)
    for activation in (None, "relu"):
        problem = BatchNormForward(image, image, activation)
        older = {
            **{name: item for name, item in plain(problem).items() if name != "activation"},
            "relu": activation == "relu",
        }
        LogFile(tmp_path / "log").append(record({"tile": 3}, 0.1, kernel="batch_norm.forward", problem=older))
        found = read(tmp_path / "log").best("batch_norm.forward", problem, 100, text)
        assert (found.origin, found.knobs) == ("exact", {"tile": 3})


def test_shipped_records_are_of_todays_problems():
    kinds = {"batch_norm.forward": BatchNormForward, "batch_norm.backward": BatchNormBackward}
    found = [
        each for each in read_log(shipped(find_target("local"))) if isinstance(each, Record) and each.kernel in kinds
    ]
    assert len(found) > 100 and {each.problem["activation"] for each in found} == {None, "relu"}
    assert all(set(each.problem) == {entry.name for entry in fields(kinds[each.kernel])} for each in found)

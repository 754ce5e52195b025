"""Tuning records: what is trusted, what wins, and what a damaged or foreign log does."""

import json
import logging
from dataclasses import dataclass, replace

import pytest

from mest_compile.errors import StateError
from mest_compile.hardware import Target
from mest_compile.records import LogFile, Measure, Outcome, Record, Records, host_model, plain, target_facts, tvm_version, unit_of

TARGET = Target("board", "cpu", (("kind", "llvm"), ("mcpu", "cortex-a55")), 4, 32, 32768, 131072, 4)


@dataclass(frozen=True)
class Problem:
    channels: int
    stride: int = 1


def record(knobs, *seconds, problem=Problem(32), live=100, outcome=Outcome.OK, measure=Measure.MEASURED, **changed):
    made = Record("gather.conv", plain(problem), live, target_facts(TARGET), "", knobs, outcome, measure, seconds, text(knobs))
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
    assert (choice.origin, choice.knobs, choice.seconds, choice.default_seconds) == ("exact", {"tile": (4, 2)}, 2.0, 3.1)


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.OK])
def test_knobs_that_once_failed_never_win(path, outcome):
    LogFile(path).append(record({"tile": (9, 9)}, 0.001))
    LogFile(path).append(record({"tile": (9, 9)}, outcome=outcome))
    LogFile(path).append(record({"tile": (9, 9)}, 0.001))
    assert best(read(path)).knobs == {"tile": (4, 2)}


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


@pytest.mark.parametrize("changed", [{"tvm": "0.1"}, {"cpu": "another"}, {"target": target_facts(replace(TARGET, vector=8))}])
def test_records_of_another_tvm_cpu_or_target_are_foreign(path, changed):
    LogFile(path).append(record({"tile": (7, 7)}, 0.1, **changed))
    records = read(path)
    assert records.left_out == {"foreign": 1} and best(records).knobs == {"tile": (4, 2)}


def test_a_local_target_is_this_cpu_only(tmp_path):
    local = replace(TARGET, name="local")
    path = tmp_path / "local.jsonl"
    LogFile(path).append(record({"tile": (7, 7)}, 0.1, cpu=host_model()))
    LogFile(path).append(record({"tile": (8, 8)}, 0.01))
    assert best(read(path, local)).knobs == {"tile": (7, 7)} and len(host_model()) > 5


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
    for knobs, cycles, instructions in (({}, 3e-6, 3e-5), ({"tile": (1, 2)}, 2e-6, 4e-5), ({"tile": (2, 1)}, 4e-6, 1e-9)):
        LogFile(path).append(record(knobs, instructions, cpu="instructions under qemu", **modelled))
        assert best(read(path)).modelled
        LogFile(path).append(record(knobs, cycles, cpu="a model", **modelled))
    choice = best(read(path))
    assert (choice.knobs, choice.seconds, choice.default_seconds, choice.modelled) == ({"tile": (1, 2)}, 2e-6, 3e-6, True)
    LogFile(path).append(record({}, 1.0))
    assert (best(read(path)).knobs, best(read(path)).modelled) == ({}, False)
    clocks = (Measure.MEASURED, ""), (Measure.MODELLED, "a model"), (Measure.MODELLED, "instructions under qemu")
    assert [unit_of(*clock)[0] for clock in clocks] == ["ms", "kcycles", "kinstructions"]


def test_a_record_of_another_text_is_not_exact(path):
    LogFile(path).append(record({"tile": (3, 3)}, 0.1, text="what the schedule gave last year"))
    assert best(read(path)).knobs == {"tile": (4, 2)}
    LogFile(path).append(record({"gone": 1}, 0.1, text="of a knob that is no more"))
    assert best(read(path)).knobs == {"tile": (4, 2)}


def test_the_nearest_problem_of_the_same_structure_else_the_default(path):
    LogFile(path).append(record({"tile": (1, 4)}, 1.0, problem=Problem(128)))
    records = read(path)
    near = best(records, Problem(64), 120)
    assert (near.origin, near.knobs) == ("nearest", {"tile": (4, 2)})
    assert best(records, Problem(100), 120).knobs == {"tile": (1, 4)}
    for problem, live in ((Problem(32, stride=2), 100), (Problem(32 * 128), 100), (Problem(32), 100 * 64)):
        assert (best(records, problem, live).origin, best(records, problem, live).knobs) == ("default", {})
    assert best(Records(TARGET)).origin == "default"


def test_a_line_tells_cpu_and_tvm_and_is_json(path):
    facts = json.loads(path.read_text().splitlines()[1])
    assert facts["tvm"] == tvm_version() and facts["knobs"] == {"tile": [4, 2]} and facts["outcome"] == "ok"
    assert Record.from_line(path.read_text().splitlines()[1]) == record({"tile": (4, 2)}, 2.0, 2.1, 1.9)


def test_a_log_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"local.jsonl cannot be written: .*; pass another --log"):
        LogFile(tmp_path / "file" / "local.jsonl").append(record({"tile": (2, 2)}, 1.0))

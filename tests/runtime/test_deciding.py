"""activations="auto": what is fastest here, timed once, or what a target's features tell; and the step keeps it."""

from dataclasses import replace

import numpy as np
import pytest

import mest_compile as mest
from mest_compile import deciding
from mest_compile.base.errors import UsageError
from mest_compile.cli.doctor import _timed
from mest_compile.deciding import Way, choose, decided, fastest, known
from mest_compile.frontend import import_model
from mest_compile.hardware.target import find_target
from mest_compile.options import StepOptions
from mest_compile.planning.plan import plan_step

USUAL, WIDE, HALF = Way("float32", 8), Way("float32", 16), Way("bfloat16", 8)


@pytest.fixture
def little(monkeypatch, tmp_path):
    """A small net in the place of the timed one, and a cache of this test's own, but for kernels."""
    for name, value in {"SHAPE": (3, 8, 8), "WIDTH": 8, "ROUNDS": 1}.items():
        monkeypatch.setattr(deciding, name, value)
    monkeypatch.setattr(deciding, "cache_folder", lambda: tmp_path)


def timed_as(seconds, monkeypatch):
    """Lets every way take so long, and the usual one a second."""
    usual = deciding.in_turns
    taken = []

    def told(steps):
        taken.append(usual(steps))
        return {way: [seconds.get(way.activations, 1.0)] for way in steps}

    monkeypatch.setattr(deciding, "in_turns", told)
    return taken


def test_the_fastest_is_chosen_where_it_is_faster_by_enough():
    seconds = {USUAL: [1.0, 2.0, 3.0], WIDE: [0.5, 2.0, 3.0], HALF: [0.5, 1.0, 6.0]}
    assert choose(seconds) == (HALF, {USUAL: 1.0, WIDE: 1.0, HALF: 2.0})
    assert choose({USUAL: [1.0], WIDE: [0.96]})[0] == USUAL and choose({USUAL: [1.0], WIDE: [0.94]})[0] == WIDE


def test_what_was_chosen_is_the_steps_and_its_checkpoints(little, monkeypatch, tmp_path, builder):
    taken = timed_as({"bfloat16": 0.6}, monkeypatch)
    step = mest.compile("mlp", (8, 64), activations="auto", threads=1, builder=builder)
    assert step.describe()["activations"] == "bfloat16" and len(taken) == 1
    assert all(len(each) == 1 and each[0] > 0 for each in taken[0].values())
    monkeypatch.setattr(deciding, "in_turns", lambda steps: pytest.fail("timed again"))
    images, labels = np.ones((8, 64), np.float32), np.arange(8)
    assert step(images, labels).loss > 0
    step.save(tmp_path / "kept")
    monkeypatch.setattr(deciding, "fastest", lambda *_: pytest.fail("decided again"))
    assert mest.load(tmp_path / "kept", builder=builder).describe()["activations"] == "bfloat16"


def test_what_was_timed_is_kept_and_told(little, monkeypatch, builder):
    target = find_target("local")
    timed_as({"float16": 0.9}, monkeypatch)
    assert _timed().detail.startswith("not timed yet")
    found = fastest(target, 4, builder)
    assert found.chosen.activations == ("float16" if target.float16 else "float32")
    assert list(found.seconds) == [str(way) for way in deciding.ways(target)]
    monkeypatch.setattr(deciding, "in_turns", lambda steps: pytest.fail("timed again"))
    assert fastest(target, 4, builder) == found and known() == [found]
    with pytest.raises(pytest.fail.Exception):
        fastest(target, 8, builder)
    assert f"4 examples: {found.chosen} of float32" in _timed().detail
    monkeypatch.setattr(deciding, "host_model", lambda: "another machine")
    assert known() == []


def test_another_vector_is_the_targets(little, monkeypatch):
    target = replace(find_target("local"), vector=8)
    options = StepOptions(activations="auto", target=target)
    chosen = {"activations": "float32", "vector": 4}
    monkeypatch.setattr(deciding, "fastest", lambda *_: replace(TIMED, chosen=Way(**chosen)))
    assert decided(options, 64) == replace(options, activations="float32", target=replace(target, vector=4))


TIMED = deciding.Timed("", [], "", 64, {}, {}, USUAL)


@pytest.mark.parametrize(("target", "kind"), [("cortex-a76", "float32"), ("mali-g78", "float32")])
def test_elsewhere_features_tell(target, kind, monkeypatch):
    monkeypatch.setattr(deciding, "fastest", lambda *_: pytest.fail("timed here"))
    assert decided(StepOptions(activations="auto", target=target), 64).activations == kind


def test_a_device_is_told_by_its_targets_features(monkeypatch):
    monkeypatch.setattr(deciding, "fastest", lambda *_: pytest.fail("timed here"))
    for able in (True, False):
        options = StepOptions(activations="auto", target=replace(find_target("avx2"), bfloat16=able))
        assert decided(options, 64, device=object()).activations == ("bfloat16" if able else "float32")


def test_a_plan_alone_refuses_what_is_not_decided():
    graph, _ = import_model("mlp", (8, 64))
    with pytest.raises(UsageError, match="activations 'auto' is decided where a step is compiled"):
        plan_step(graph, StepOptions(activations="auto"))

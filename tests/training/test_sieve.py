"""The data sieve: counts as by hand, what is dropped, and training that goes on with less."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import LEARNABLE, RECIPE, TEST, TRAIN, Interrupter, SoftmaxStep, interrupt, without_clock

from mest_compile.base.errors import StateError, UsageError
from mest_compile.training.loop import Trainer
from mest_compile.training.sieve import LAST_BIN, Sieve, SieveRule

RULE = SieveRule(drop=0.3, after_epoch=2)


def sieve_of(answers: list[list[int]]) -> Sieve:
    """A sieve that saw these answers, one row an epoch, one column an example."""
    sieve = Sieve(len(answers[0]))
    for row in answers:
        order = np.random.default_rng(0).permutation(len(row))
        for half in np.array_split(order, 2):
            sieve.count(half, np.array(row, bool)[half])
    return sieve


def test_forgetting_events_are_counted_as_by_hand():
    sieve = sieve_of([[0, 1, 1, 0, 1], [0, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 1, 0, 1, 0]])
    assert sieve.forgets.tolist() == [0, 0, 2, 0, 2]  # from right to wrong; example 3 was learned once and kept
    assert sieve.learned.tolist() == [False, True, True, True, True]
    assert (
        sieve.histogram() | {"never learned": 1, "0": 2, "1": 0, "2": 2} == sieve.histogram()
        and sum(sieve.histogram().values()) == 5
    )


def test_the_least_forgotten_go_and_what_was_never_right_stays():
    sieve = sieve_of([[0, 1, 1, 0, 1], [0, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
    said = sieve.drop(SieveRule(drop=0.4), np.random.default_rng(0))
    assert sieve.kept.tolist() == [True, False, True, False, True]
    assert {name: said[name] for name in ("dropped", "returned", "kept")} == {"dropped": 2, "returned": 0, "kept": 3}


def test_a_threshold_drops_all_at_or_below_it():
    sieve = sieve_of([[0, 1, 1, 0, 1], [0, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
    sieve.drop(SieveRule(forgets_at_most=0), np.random.default_rng(0))
    assert sieve.kept.tolist() == [True, False, True, False, True]
    sieve.drop(SieveRule(forgets_at_most=1), np.random.default_rng(0))  # 1 and 3 were not trained on and come back
    assert sieve.kept.tolist() == [True, True, False, True, False]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.floats(0.01, 0.5), st.integers(0, 2**32 - 1))
def test_a_share_is_dropped_exactly_and_never_an_unlearned_or_more_forgotten_example(examples, epochs, share, seed):
    rng = np.random.default_rng(seed)
    sieve = sieve_of(rng.integers(0, 2, (epochs, examples)).tolist())
    before = sieve.forgets.copy()
    for turn in range(3):
        there = sieve.kept.copy()
        said = sieve.drop(SieveRule(drop=share, every=1), np.random.default_rng(turn))
        dropped = ~sieve.kept
        assert dropped.sum() == said["dropped"] == min(round(share * examples), int((there & sieve.learned).sum()))
        assert sieve.learned[dropped].all() and there[dropped].all() and said["returned"] == (~there).sum()
        stayed = there & sieve.learned & sieve.kept
        assert not dropped.any() or not stayed.any() or sieve.forgets[dropped].max() <= sieve.forgets[stayed].min()
    assert np.array_equal(sieve.forgets, before)


def test_equally_forgotten_examples_are_chosen_by_the_generator_not_by_their_place():
    sieve = sieve_of([[1] * 400])
    sieve.drop(SieveRule(drop=0.5), np.random.default_rng(3))
    first_half = int((~sieve.kept[:200]).sum())
    assert abs(first_half - 100) < 5 * np.sqrt(400) / 4 and first_half != 200
    again = sieve_of([[1] * 400])
    again.drop(SieveRule(drop=0.5), np.random.default_rng(3))
    assert np.array_equal(again.kept, sieve.kept)


def test_many_events_share_the_last_bin():
    sieve = Sieve(3)
    for turn in range(2 * LAST_BIN + 6):
        sieve.count(np.array([0, 1]), np.array([turn % 2 == 0, True]))
    assert sieve.forgets[0] == LAST_BIN + 3 and sieve.histogram()[f"{LAST_BIN} or more"] == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either drop"),
        ({"drop": 0.1, "forgets_at_most": 1}, "either drop"),
        ({"drop": 0}, "share between 0 and 1"),
        ({"drop": True}, "share between 0 and 1"),
        ({"drop": 0.6, "every": 2}, "at most half"),
        ({"forgets_at_most": -1}, "forgets_at_most"),
        ({"drop": 0.1, "after_epoch": 0}, "after_epoch"),
        ({"drop": 0.1, "every": 0.5}, "every"),
    ],
)
def test_rules_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        SieveRule(**fields)


def test_rounds_come_at_their_interval():
    rule = SieveRule(drop=0.2, after_epoch=3, every=2)
    assert [epoch for epoch in range(10) if rule.due(epoch, 10)] == [3, 5, 7, 9]
    assert [epoch for epoch in range(10) if RULE.due(epoch, 10)] == [2]


def sieving(rule=RULE):
    return replace(LEARNABLE, sieve=rule)


def test_epochs_shrink_and_the_run_says_by_how_much(tmp_path):
    run = Trainer(SoftmaxStep(), sieving(), tmp_path / "run").fit(TRAIN, TEST)
    assert [metrics["sieve"] is not None for metrics in run.history] == [False, False, True, False, False, False]
    said = run.history[2]["sieve"]
    assert said["dropped"] == 60 and said["kept"] == 140 and sum(said["counts"].values()) == 200
    assert [metrics["iterations"] for metrics in run.history] == [12, 12, 8, 8, 8, 8]
    assert [metrics["iterations_saved"] for metrics in run.history] == [0, 0, 4, 4, 4, 4]
    assert run.history[3]["examples"] == 128


def test_dropped_examples_are_not_trained_on_until_they_return():
    trainer = Trainer(SoftmaxStep(), sieving(SieveRule(drop=0.3, after_epoch=2, every=2)))
    seen = []
    count = Sieve.count

    def watch(self, indices, correct):
        assert self.kept[indices].all()
        seen.append((indices, self.kept.copy()))
        count(self, indices, correct)

    Sieve.count = watch
    try:
        run = trainer.fit(TRAIN, TEST)
    finally:
        Sieve.count = count
    first, second = seen[12 + 12][1], seen[-1][1]  # the masks after the first and the second drop
    assert (~first).sum() == (~second).sum() == 60 and (first | second).all()
    assert [metrics["sieve"] and metrics["sieve"]["returned"] for metrics in run.history] == [
        None,
        None,
        0,
        None,
        60,
        None,
    ]


@pytest.mark.parametrize("stop", [(2, 3), (3, 4), (5, 8)])
def test_a_resumed_sieve_goes_on_with_its_counts(tmp_path, stop):
    recipe = sieving(SieveRule(drop=0.3, after_epoch=2, every=2))
    wanted = Trainer(SoftmaxStep(), recipe, tmp_path / "whole").fit(TRAIN, TEST)
    with pytest.raises(KeyboardInterrupt):
        Trainer(SoftmaxStep(), recipe, tmp_path / "run", Interrupter(*stop, interrupt)).fit(TRAIN, TEST)
    run = Trainer.resume(tmp_path / "run", SoftmaxStep(seed=5)).fit(TRAIN, TEST)
    assert without_clock(run.history) == without_clock(wanted.history)


def test_a_sieve_of_other_data_is_refused():
    sieve = Sieve(5)
    with pytest.raises(StateError, match="not one of 5 examples"):
        sieve.restore(Sieve(4).arrays())
    assert RECIPE.sieve is None


@pytest.mark.parametrize("rule", [SieveRule(forgets_at_most=9), SieveRule(drop=0.99)])
def test_a_rule_that_leaves_less_than_a_batch_spares_those_forgotten_most(rule):
    sieve = sieve_of([[1] * 50, [1] * 40 + [0] * 10, [1] * 50])  # the last ten were forgotten once
    said = sieve.drop(rule, np.random.default_rng(0), at_least=8)
    assert said["kept"] == 8 and said["spared"] in (7, 8) and said["dropped"] == 42
    assert np.flatnonzero(sieve.kept).min() >= 40


def test_a_run_whose_sieve_would_leave_too_little_goes_on_with_a_batch_and_says_so(caplog):
    step = SoftmaxStep(shape=(64, 1, 8, 8))
    run = Trainer(step, sieving(SieveRule(forgets_at_most=100, after_epoch=5))).fit(TRAIN, TEST)
    said = run.history[5]["sieve"]
    assert len(run.history) == 6 and run.history[5]["iterations"] == 1 and said["kept"] == 64 and said["spared"] > 0
    assert f"would have left {64 - said['spared']} examples, less than a batch of 64" in caplog.text

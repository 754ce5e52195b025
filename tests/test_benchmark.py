"""The side-by-side harness: figures are computed as documented, and a failing side is an error, never a number."""

import json
import math
import time

import pytest

from mest_compile import benchmark
from mest_compile.benchmark import Case, Comparison, Side, compare
from mest_compile.errors import MestError, UnknownName, UsageError

SMALL = Case("mlp", input_shape=(8, 3, 32, 32))


def side(name: str, *seconds: float) -> Side:
    return Side(name, seconds, setup_seconds=1.0, last_loss=2.3, import_bytes=100, setup_peak_bytes=20, training_peak_bytes=10)


def test_ratio_is_the_median_of_the_rounds_ratios():
    comparison = Comparison(SMALL, side("mest", 1.0, 2.0, 4.0), side("torch", 2.0, 12.0, 4.0), {}, {}, "")
    assert comparison.ratios == (2.0, 6.0, 1.0)
    assert comparison.ratio == 2.0                             # the ratio of the medians would be 4 / 2, their mean 3
    document = json.loads(json.dumps(comparison.to_dict()))
    assert document["ours"]["median_seconds"] == 2.0 and document["rival"]["max_seconds"] == 12.0
    assert (document["ratio"], document["ratio_min"], document["ratio_max"]) == (2.0, 1.0, 6.0)


def test_both_sides_take_turns_and_are_measured():
    seen = []
    comparison = compare(SMALL, ours="torch", rival="torch", repeats=2, warmup=1, progress=lambda *now: seen.append(now))
    for figures in (comparison.ours, comparison.rival):
        assert len(figures.round_seconds) == 2 and 0 < min(figures.round_seconds) and max(figures.round_seconds) < 10
        assert math.isfinite(figures.last_loss) and figures.import_bytes > 50 * 2**20
        # At the least the weights, gradients and momentum of a first layer with 3 * 32 * 32 inputs.
        assert figures.training_peak_bytes > 3 * 4 * 3 * 32 * 32 * 64
    assert 0.1 < comparison.ratio < 10                         # the same program on both sides
    assert comparison.machine["cores"] >= 1 and "torch" in comparison.versions
    assert seen[-1] == ("measuring", 2, 2)


@pytest.mark.parametrize(("options", "error", "said"), [
    ({"rival": "abacus"}, UnknownName, "abacus"),
    ({"repeats": 0}, UsageError, "repeats"),
    ({"warmup": 0}, UsageError, "warmup"),
])
def test_misuse_is_noticed_before_a_process_starts(options, error, said):
    began = time.perf_counter()
    with pytest.raises(error, match=said):
        compare(SMALL, **options)
    assert time.perf_counter() - began < 0.5


def test_an_error_of_one_side_names_it():
    with pytest.raises(MestError, match=r"the torch side .*no model 'abacus'"):
        compare(Case("abacus"), ours="torch", rival="torch")


def test_a_process_that_dies_is_an_error_and_not_a_hang():
    runner = benchmark._Runner("torch", SMALL)
    try:
        runner._process.kill()
        with pytest.raises(MestError, match="torch process of the benchmark died"):
            runner.setup()
    finally:
        runner.close()


def test_batches_are_the_same_in_every_process():
    images, labels = SMALL.batch()
    again, _ = SMALL.batch()
    assert images.shape == SMALL.input_shape and images.dtype == "float32" and (images == again).all()
    assert labels.shape == (8,) and labels.dtype == "int64" and 0 <= labels.min() <= labels.max() < SMALL.classes


def test_the_command_refuses_an_unknown_rival_in_one_line(mest_compile_command):
    ran = mest_compile_command("bench", "--vs", "abacus", "--json")
    assert ran.code == 2 and ran.out == "" and ran.err.count("\n") == 1 and "torch" in ran.err

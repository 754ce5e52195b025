"""The side-by-side harness: figures are computed as documented, and a failing side is an error, never a number."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import cold
import pytest
import threads

import mest_compile as mest
from mest_compile import compiling
from mest_compile.base.errors import MestError, NotInstalled, UnknownName, UsageError
from mest_compile.measuring import benchmark
from mest_compile.measuring.benchmark import Comparison, Side, compare, median_interval
from mest_compile.measuring.case import Case
from mest_compile.measuring.contestants import CONTESTANTS, ENVIRONMENTS, find_interpreter
from mest_compile.measuring.dense_torch import TORCHS, torch_model
from mest_compile.measuring.rivals import unstructured_masks
from mest_compile.models.catalog import build_model

SMALL = Case("mlp", input_shape=(8, 3, 32, 32))


def side(name: str, *seconds: float) -> Side:
    return Side(
        name,
        seconds,
        setup_seconds=1.0,
        last_loss=2.3,
        import_bytes=100,
        warm_bytes=200,
        setup_peak_bytes=20,
        ready_bytes=5,
        training_peak_bytes=10,
    )


def test_ratio_is_the_median_of_the_rounds_ratios():
    comparison = Comparison(SMALL, side("mest", 1.0, 2.0, 4.0), side("torch", 2.0, 12.0, 4.0), {}, {}, "")
    assert comparison.ratios == (2.0, 6.0, 1.0)
    assert comparison.ratio == 2.0  # the ratio of the medians would be 4 / 2, their mean 3
    document = json.loads(json.dumps(comparison.to_dict()))
    assert document["ours"]["median_seconds"] == 2.0 and document["rival"]["max_seconds"] == 12.0
    assert (document["ratio"], document["ratio_min"], document["ratio_max"]) == (2.0, 1.0, 6.0)


def test_both_sides_take_turns_and_are_measured():
    seen = []
    comparison = compare(
        SMALL, ours="torch", rival="torch", repeats=2, warmup=1, progress=lambda *now: seen.append(now)
    )
    for figures in (comparison.ours, comparison.rival):
        assert len(figures.round_seconds) == 2 and min(figures.round_seconds) > 0
        assert math.isfinite(figures.last_loss) and 50 * 2**20 < figures.import_bytes < figures.warm_bytes
        # At the least the weights, gradients and momentum of a first layer with 3 * 32 * 32 inputs.
        assert figures.training_peak_bytes > 3 * 4 * 3 * 32 * 32 * 64
    assert 0.1 < comparison.ratio < 10  # the same program on both sides
    assert comparison.machine["cores"] >= 1 and "torch" in comparison.versions
    assert seen[-1] == ("measuring", 2, 2)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"rival": "abacus"}, UnknownName, "abacus"),
        ({"repeats": 0}, UsageError, "repeats"),
        ({"warmup": 0}, UsageError, "warmup"),
    ],
)
def test_misuse_is_noticed_before_a_process_starts(options, error, said, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(error, match=said):
        compare(SMALL, **options)


def test_an_error_of_one_side_names_it():
    with pytest.raises(MestError, match=r"the torch side .*no model 'abacus'"):
        compare(Case("abacus"), ours="torch", rival="torch")


def test_a_process_that_dies_is_an_error_and_not_a_hang():
    runner = benchmark._Runner("torch", SMALL)
    try:
        runner.process.kill()
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


@pytest.mark.parametrize(
    ("count", "places", "confidence"),
    [
        (1, (0, 0), 0.0),
        (5, (0, 4), 1 - 2 / 32),
        (7, (0, 6), 1 - 2 / 128),
        (9, (1, 7), 1 - 2 * 10 / 512),
        (20, (5, 14), None),
    ],
)
def test_interval_of_the_median_from_order_statistics(count, places, confidence):
    low, high, found = median_interval(list(range(count))[::-1])
    assert (low, high) == places  # 20 values: the 6th and 15th, as in tables of the sign test
    assert found == pytest.approx(confidence) if confidence is not None else 0.95 <= found < 0.96


def test_interval_of_the_median_covers_it_as_often_as_it_says():
    import numpy as np

    rng, trials, hits, said = np.random.default_rng(0), 2000, 0, 0.0
    for _ in range(trials):
        low, high, said = median_interval(rng.exponential(size=9))
        hits += low <= math.log(2) <= high
    assert abs(hits / trials - said) < 4 * math.sqrt(said * (1 - said) / trials)


def test_a_rival_without_its_environment_says_how_to_install_it(tmp_path, mest_compile_command):
    with pytest.raises(NotInstalled, match="benchmarks/environments.sh sparseprop"):
        compare(SMALL, rival="sparseprop", rival_python=tmp_path / "python")
    ran = mest_compile_command("bench", "--vs", "onnxruntime-training", "--rival-python", tmp_path / "python")
    assert (
        ran.code == 1
        and ran.out == ""
        and "environments.sh onnxruntime-training" in ran.err
        and ran.err.count("\n") == 1
    )


def test_only_rivals_with_an_environment_run_under_another_python(tmp_path):
    assert find_interpreter("torch", "here", tmp_path / "elsewhere") == "here"
    assert find_interpreter("sparseprop", "here", sys.executable) == sys.executable


def test_another_environment_sees_our_package_and_nothing_beside_it(tmp_path):
    """The rival's Python finds mest_compile without being able to import what is installed next to it."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nls -a "$PYTHONPATH" > {tmp_path}/listing\nls "$PYTHONPATH/mest_compile" > {tmp_path}/inside\n'
    )
    python.chmod(0o755)
    runner = benchmark._Runner("sparseprop", SMALL, str(python))
    with pytest.raises(MestError, match="died"):
        runner.setup()
    runner.close()
    assert (tmp_path / "listing").read_text().split() == [".", "..", "mest_compile"]
    assert {"measuring", "options.py"} <= set((tmp_path / "inside").read_text().split())


def test_environments_script_makes_what_contestants_ask_for(repository):
    script = (repository / "benchmarks" / "environments.sh").read_text()
    assert repository / "benchmarks" / "environments" == ENVIRONMENTS
    wanted = {contestant.environment for contestant in CONTESTANTS.values()} - {None}
    assert wanted and all(f"$folder/{name}/bin/python" in script for name in wanted)
    (torch,) = re.findall("^TORCH := (.*)$", (repository / "Makefile").read_text(), re.MULTILINE)
    assert f'torch="{torch}"' in script


def test_our_own_rivals_are_the_same_step_but_for_what_they_are_named_for(monkeypatch):
    class Asked(Exception):
        pass

    def asked(name):
        def compile_step(model, input_shape, options, *, builder, records):
            raise Asked(options, records is None or bool(records.paths))

        monkeypatch.setattr(compiling, "compile_step", compile_step)
        with pytest.raises(Asked) as caught:
            CONTESTANTS[name].build(Case("mlp", (8, 3, 8, 8)).but(threads=2, activations="float16"))
        return caught.value.args

    ours, tuned = asked("mest")
    assert tuned and ours.target == "local"
    named = {
        "mest-untuned": (False, {}),
        "mest-avx2": (False, {"target": "avx2"}),
        "mest-one-thread": (True, {"threads": 1}),
        "mest-float32": (True, {"activations": "float32"}),
        "mest-dense": (True, {"scheme": "dense", "sparsity": 0.0}),
    }
    for name, (tuned, differs) in named.items():
        assert asked(name) == (replace(ours, **differs), tuned), name


def test_the_best_torch_is_one_of_its_ways():
    plain, half = (CONTESTANTS[name].build(SMALL).step() for name in ("torch", "torch-bf16"))
    assert plain != half == pytest.approx(plain, rel=0.02)
    best = CONTESTANTS["torch-best"].build(SMALL)
    (note,) = best.notes
    assert note.partition(": ")[2] in TORCHS and best.step() == pytest.approx(plain, rel=0.02)


def test_a_rival_that_has_another_optimizer_or_loss_is_refused():
    for option in ({"optimizer": mest.AdamW()}, {"loss": mest.CrossEntropy(0.1)}):
        with pytest.raises(UsageError, match="rivals are built with mest.SGD and cross-entropy"):
            CONTESTANTS["torch"].build(SMALL.but(**option))


def test_a_case_goes_to_its_process_and_into_files_whole():
    options = {"scheme": "block:8x1", "optimizer": mest.SGD(0.1, nesterov=True), "memory_budget": 10**9, "threads": 2}
    case = Case("mlp", (8, 3, 8, 8), width=16).but(**options, dense_layers=["fc1"], loss=mest.CrossEntropy(0.1))
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case != SMALL
    early = {
        name: SMALL.to_json()[name] for name in ("model", "input_shape", "width", "classes", "optimizer", "threads")
    }
    assert Case.from_json(early) == SMALL  # what was measured before an option came was measured without it


def test_rivals_get_the_masks_that_our_step_starts_with():
    import mest_compile as mest

    case = Case("resnet20", (8, 3, 16, 16), width=8).but(scheme="unstructured", distribution="erk", sparsity=0.85)
    model = torch_model(case)
    ours = mest.compile(
        model, case.input_shape, scheme="unstructured", sparsity=0.85, distribution="erk", threads=1
    ).masks()
    theirs = unstructured_masks(model, case)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


LOADED = """
import sys
import mest_compile as mest
from mest_compile.measuring import benchmark
from mest_compile.measuring.case import Case
from mest_compile.measuring.contestants import find_contestant, run_miniature
import mest_compile as mest

contestant = find_contestant("mest")
contestant.load()
compiled = run_miniature(contestant, 1)
before = benchmark._settle_memory()
step = mest.load(sys.argv[1])
images, labels = Case("resnet20").batch()
benchmark._settle_memory()
benchmark.host.forget_peak()
for _ in range(3):
    step(images, labels)
print(int(compiled), step.memory()["total"], benchmark._memory_bytes(peak=True) - before)
"""


@pytest.mark.parametrize(
    ("model", "width", "budget"), [("resnet20", 16, None), ("resnet20", 48, 130_000_000), ("mlp", 6144, None)]
)
def test_planned_memory_is_what_a_process_that_loads_the_step_needs(model, width, budget, tmp_path):
    case = Case(model, width=width)
    mest.compile(
        build_model(model, case.input_shape, width=width),
        case.input_shape,
        scheme="block",
        sparsity=0.9,
        threads=1,
        memory_budget=budget,
    ).save(tmp_path / "step")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "step")]
    compiled = True
    while compiled:  # a compiler leaves memory behind, which the step then takes
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        compiled, planned, peak = map(int, told.stdout.split()[-3:])
    assert abs(peak - planned) <= max(0.1 * planned, 4 * 2**20)


def test_what_a_second_thread_gains_is_measured_by_operator(monkeypatch):
    monkeypatch.setattr(threads, "WIDE", Case("resnet20", (8, 3, 32, 32), width=8))
    found = threads.measure("block:4x1", rounds=1)
    assert all(seconds > 0 for seconds in found["step"])
    for side in range(2):
        assert sum(seconds[side] for seconds in found["operators"].values()) == pytest.approx(found["step"][side])
    made_up = {"step": [0.1, 0.05], "operators": {"a": [0.0995, 0.0497], "b": [0.0005, 0.0003]}}
    lines = threads.table({"schemes": {"block:4x1": made_up}}).splitlines()
    assert lines[2:] == [
        "| block:4x1 | whole step | 100.0 | 50.0 | 2.00 |",
        "| block:4x1 | a | 99.5 | 49.7 | 2.00 |",
        "| block:4x1 | all others | 0.5 | 0.3 | 1.67 |",
    ]


def test_what_kernels_wait_for_memory_is_measured(monkeypatch):
    monkeypatch.setattr(cold, "CASE", Case("resnet20", (8, 3, 32, 32), width=8))
    found = cold.measure("block:4x1", rounds=2)
    assert {"gather.conv forward", "gather.conv grad_input", "gather.grad grad_weight"} <= set(found)
    assert all(set(times) == set(cold.STATES) and min(times.values()) > 0 for times in found.values())


@pytest.mark.parametrize("batch", [1, 12, 63])
def test_sparseprop_refuses_batches_whose_end_it_would_leave_out(batch):
    with pytest.raises(
        UsageError, match=f"would leave out the last {batch % 8} of {batch}, without a word; give .* multiple of 8"
    ):
        CONTESTANTS["sparseprop"].build(replace(SMALL, input_shape=(batch, 3, 8, 8)))


def test_a_contestant_that_does_not_answer_is_ended(monkeypatch):
    monkeypatch.setattr(benchmark, "ANSWER_SECONDS", 0.05)
    runner = benchmark._Runner("torch", SMALL, sys.executable)
    try:
        with pytest.raises(MestError, match="the torch process of the benchmark has not answered for 0.05 s"):
            runner.setup()
    finally:
        runner.close()

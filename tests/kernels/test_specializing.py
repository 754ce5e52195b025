"""Kernels with a layer's structure baked in: the choice, the bits, the exchange, and what happens when compiling
fails."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nets import short_resnet

import mest_compile as mest
from mest_compile.backends.cpu.runner import PREFIX
from mest_compile.base.errors import BuildError
from mest_compile.hardware.target import find_target
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.reader import parse
from mest_compile.kernels.source import KernelSource, kernel_source
from mest_compile.kernels.specializing import Structure, specialized, structure_of
from mest_compile.kernels.workers import Workers
from mest_compile.lowering.emitting import kernel_name
from mest_compile.operators.frozen_norm import CopyPart
from mest_compile.operators.layers.gather import GatherConv, GatherGrad
from mest_compile.runtime.variants import Choice, Times, choose

SHAPE = (8, 3, 8, 8)


@pytest.mark.parametrize(
    ("times", "steps", "variant", "said"),
    [
        (Times(1e-3, 0.9e-3, 0.2), 3000, "specialized", "paid back in 2000 steps of 3000"),
        (Times(1e-3, 0.9e-3, 0.2), 1000, "indexed", "paid back in 2000 steps of 1000"),
        (Times(1e-3, 0.9e-3, 0.2), None, "specialized", "2000 steps"),
        (Times(1e-3, 0.9e-3, 0.0), 1, "specialized", "compiled already"),
        (Times(1e-3, 0.99e-3, 0.0), None, "indexed", "no gain"),
        (Times(1e-3, 1.5e-3, 0.1), 10**9, "indexed", "no gain"),
    ],
)
def test_the_variant_is_the_one_of_least_time_until_the_next_mutation(times, steps, variant, said):
    found = choose(times, steps)
    assert isinstance(found, Choice) and found.variant == variant and said in found.why


def small_step(scheme, folder, sparsity=0.8):
    return mest.compile(
        short_resnet(SHAPE),
        SHAPE,
        scheme=scheme,
        sparsity=sparsity,
        threads=1,
        builder=Builder(folder),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def always(monkeypatch):
    """Everything that can be specialized is, whatever it gains: on small layers times differ by chance."""
    monkeypatch.setattr("mest_compile.kernels.workers.SHARE", 1.0)  # nobody minds a slower step here
    monkeypatch.setattr("mest_compile.runtime.specializer.choose", lambda times, steps: Choice("specialized", "always"))
    monkeypatch.setattr(
        "mest_compile.runtime.specializer.Specializer._measure", lambda *arguments: Times(2.0, 1.0, 0.0)
    )


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(SHAPE).astype(np.float32), rng.integers(0, 10, SHAPE[0])


def until(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.05)


def exchanged(step):
    """Names of the programs in which some kernel is not the indexed one."""
    compiled, runner = step._compiled, step._runner
    return {
        program.name
        for program in (compiled.train, compiled.predict)
        for call in program.calls
        if runner._functions[kernel_name(PREFIX, program, call.name)]
        is not compiled.builder.function(compiled.sources[program.name, call.name])
    }


def same(one, other):
    state = other.state_dict()
    for name, value in one.state_dict().items():
        np.testing.assert_array_equal(value, state[name], name)


@pytest.mark.parametrize("scheme", ["filter", "channel", "pattern"])
def test_specialized_kernels_give_the_same_bits_before_during_and_after_an_exchange(scheme, folder, always):
    plain, special = small_step(scheme, folder), small_step(scheme, folder)
    special.specialize()
    running = {name for name in special.layers if special._specializer.running(name) == "specialized"}
    assert len(running) > 3
    assert exchanged(special) == {"train"}
    fates = set()
    for turn, grow_to in enumerate((0.8, 0.7, 0.7, 0.8)):
        assert plain(*batch(turn)).loss == special(*batch(turn)).loss
        same(plain, special)
        np.testing.assert_array_equal(plain.predict(batch()[0]), special.predict(batch()[0]))
        for step in (plain, special):
            report = step.mutate(prune_to=0.82, grow_to=grow_to, rng=np.random.default_rng(turn))
        fates |= set(report.layers.values())
        assert plain(*batch(turn)).loss == special(*batch(turn)).loss  # perhaps still on indexed kernels
        until(lambda: special._specializer.poll() is not None and not special._specializer.waiting())
    assert "recompiled" in fates
    same(plain, special)
    times = special.kernel_times()
    assert times and all(one.exchange_seconds > 0 for one in times.values())
    special._specializer.workers.close()


def channels_of(step, name, distance):
    """A mask of scheme channel in which every so many-th input channel lives, so that every section has some."""
    mask = np.zeros_like(step.masks()[name])
    mask[:, ::distance] = True
    return mask


def test_a_mutation_of_three_layers_recompiles_three_and_the_cache_serves_the_next_time(folder, always):
    step = small_step("channel", folder)
    step.specialize()
    names = list(step.masks())[2:5]
    report = step.set_masks({name: channels_of(step, name, 3) for name in names})
    assert {name for name, fate in report.layers.items() if fate != "unchanged"} == set(names)
    assert {report.layers[name] for name in names} == {"recompiled"}
    until(lambda: step._specializer.poll() is not None and not step._specializer.waiting())
    assert set(step.kernel_times()) >= set(names) and all(
        step._specializer.running(name) == "specialized" for name in names
    )

    again = small_step("channel", folder)
    again.specialize()
    compiled = again._compiled.builder.compiled
    again.set_masks({name: channels_of(again, name, 3) for name in names})
    again(*batch())
    times = again.kernel_times()
    assert all(again._specializer.running(name) == "specialized" for name in names) and not again._specializer.waiting()
    assert again._compiled.builder.compiled == compiled and not any(one.compile_seconds for one in times.values())
    assert not again._specializer.workers.started
    step._specializer.workers.close()


def test_a_layer_with_nothing_to_bake_at_first_gets_its_kernels_from_the_workers_once_there_is(tmp_path, monkeypatch):
    """As when a run is resumed under masks of unequal rows; what was never measured is, when it is compiled."""
    monkeypatch.setattr("mest_compile.kernels.workers.SHARE", 1.0)
    measured = []
    monkeypatch.setattr(
        "mest_compile.runtime.specializer.Specializer._measure",
        lambda self, place, source, seconds: (
            measured.append(place.call.phase) or Times(1.0, 2.0 if place.call.phase == "grad_weight" else 0.1, seconds)
        ),
    )
    step = small_step("unstructured", tmp_path)
    name = list(step.masks())[-1]
    equal = np.zeros_like(step.masks()[name])
    equal.reshape(len(equal), -1)[:, ::6] = True
    assert all(planned.source is None for planned in step.plan() if planned.layer == name)
    step.specialize()
    compiled = step._compiled.builder.compiled
    measured.clear()
    report = step.set_masks({name: equal})
    assert report.layers[name] == "recompiled" and not measured
    until(lambda: step._specializer.poll() is not None and not step._specializer.waiting())
    assert measured and step._compiled.builder.compiled == compiled
    assert step._specializer.running(name) == "specialized"
    assert not any(
        call.endswith("grad_weight") for call in step._specializer._states[name].running
    )  # measured to be slower
    step._specializer.workers.close()


def test_a_damaged_cache_entry_is_compiled_by_workers_and_not_by_the_training_thread(folder, always, caplog):
    step = small_step("channel", folder)
    step.specialize()
    name = next(name for name in step.masks() if name.startswith("layer3"))
    step.set_masks({name: channels_of(step, name, 5)})
    wanted = step._specializer._states[name].wanted.values()
    until(lambda: all(step._compiled.builder.has(source) for source in wanted))
    damaged = {source.key for source in wanted} - step._compiled.builder._ready.keys()
    for path in folder.rglob("*.so"):
        if path.name.partition(".")[0] in damaged:
            path.write_bytes(path.read_bytes()[:1000])
    compiled, expected = step._compiled.builder.compiled, small_step("channel", folder)
    expected.set_masks({name: channels_of(expected, name, 5)})
    assert damaged
    with caplog.at_level(logging.WARNING):
        assert step(*batch()).loss == expected(*batch()).loss
    assert "damaged" in caplog.text and step._compiled.builder.compiled == compiled
    until(lambda: step._specializer.poll() is not None and not step._specializer.waiting())
    assert step._specializer.running(name) == "specialized" and step._compiled.builder.compiled == compiled
    step._specializer.workers.close()


ABANDONED = """
import sys, time
from pathlib import Path
from mest_compile.kernels.reader import parse
from mest_compile.kernels.source import KernelSource
from mest_compile.hardware.target import find_target
from mest_compile.kernels.workers import Workers
workers = Workers(Path(sys.argv[1]), count=1, share=0.01)
workers.ask([KernelSource("none", "@T.prim_func", find_target("local"))])
print(workers.processes[0].pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal at a parent's death")
def test_a_worker_that_rests_dies_with_a_trainer_that_is_killed(tmp_path):
    trainer = subprocess.Popen([sys.executable, "-c", ABANDONED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(trainer.stdout.readline())

    def state():
        try:
            return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return "gone"

    until(lambda: state() == "T")
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    until(lambda: state() in ("gone", "Z"))


FORKS = """
import os, sys
from pathlib import Path
import numpy as np
import mest_compile as mest
from mest_compile.kernels.cache import Builder
from mest_compile.models.catalog import build_model
shape = (8, 3, 8, 8)
builder = Builder(Path(sys.argv[1]))
step = mest.compile(build_model("mlp", shape, 10, 64), shape, scheme="filter", sparsity=0.8, threads=2, builder=builder)
rng = np.random.default_rng(0)
images, labels = rng.standard_normal((32, *shape[1:])).astype(np.float32), rng.integers(0, 10, 32)
step(images[:8], labels[:8])  # TVM's pool is there
forks = []
os.register_at_fork(before=lambda: forks.append("fork"))
sys.addaudithook(lambda event, arguments: forks.append(event) if event in ("os.fork", "os.forkpty") else None)
recipe = mest.Recipe(epochs=4, method="em", mutate_every=1, drop_last=True)
mest.Trainer(step, recipe, out=sys.argv[2], specialize=True).fit((images, labels), (images, labels))
assert step._specializer.workers.started, "no kernel was compiled beside training"
assert not forks, forks
print("fine")
"""


def test_nothing_forks_once_threads_are_there(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FORKS, str(tmp_path / "kernels"), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.endswith("fine\n"), done.stderr[-3000:]


def test_a_worker_that_dies_leaves_training_on_indexed_kernels_and_says_so(tmp_path, always, caplog):
    step = small_step("channel", tmp_path)
    step.specialize()
    workers = step._specializer.workers
    for process in workers.processes:
        os.kill(process.pid, signal.SIGKILL)
    name = next(name for name in step.masks() if name.startswith("layer3"))
    with caplog.at_level(logging.WARNING):
        step.set_masks({name: channels_of(step, name, 3)})
        until(lambda: step._specializer.poll() is not None and not step._specializer.waiting())
        assert np.isfinite(step(*batch()).loss)
    assert step._specializer.running(name) == "indexed"
    assert "compile worker ended with code -9" in caplog.text and f"{name} stays on its indexed kernels" in caplog.text


def test_a_kernel_that_does_not_compile_is_a_problem_of_its_own(tmp_path, folder):
    step = small_step("channel", folder)
    source = next(iter(step._compiled.sources.values()))
    broken = KernelSource(source.kernel, source.text.replace("T.", "Abacus.", 1), source.target)
    fine = KernelSource(source.kernel, source.text + "\n", source.target)
    workers = Workers(tmp_path, count=1)
    built = {one.key: one for one in workers.wait([broken, fine])}
    workers.close()
    assert "does not compile" in built[broken.key].problem and built[fine.key].problem is None
    assert Builder(tmp_path).has(fine) and not Builder(tmp_path).has(broken)
    with pytest.raises(BuildError):
        Builder(tmp_path).function(broken)


def test_workers_that_are_dismissed_end_when_they_have_done_what_they_were_asked(tmp_path):
    workers = Workers(tmp_path, count=2, share=1.0)
    source = kernel_source("values.part", CopyPart(8, 0, 8, 0, 8), find_target("local"))
    workers.ask([source])
    started = list(workers.processes)
    workers.dismiss()
    until(lambda: not workers.processes)
    assert Builder(tmp_path).has(source) and [process.poll() for process in started] == [0, 0]


def test_workers_know_no_torch(tmp_path, folder):
    workers = Workers(tmp_path, count=1)
    step = small_step("channel", folder)
    source = next(iter(step._compiled.sources.values()))
    workers.wait([KernelSource(source.kernel, source.text + "\n", source.target)])
    if sys.platform == "linux":
        with open(f"/proc/{workers.processes[0].pid}/maps") as maps:
            assert "libtorch" not in maps.read()
    workers.close()


def test_what_has_no_common_length_is_named(folder):
    step = small_step("block", folder)
    reasons = {one.choice.why for one in step.plan() if one.layer in step.masks()}
    assert all(one.choice.variant == "indexed" for one in step.plan() if one.layer in step.masks())
    assert any("groups have" in reason for reason in reasons) and any("several passes" in reason for reason in reasons)
    problem = next(call.problem for call in step.program.calls if call.kernel == "gather.conv")
    assert structure_of(problem, np.arange(problem.cells + 1) * 3) == Structure((3,) * problem.sections)


def read(source: KernelSource) -> str:
    """As TVM writes the function."""
    return parse(source.text, source.symbol).script()


def test_every_structure_of_a_layer_compiles(folder):
    rng = np.random.default_rng(0)
    step = small_step("filter", folder)
    places = [
        place
        for each in step._new_specializer(None)._places.values()
        for place in each
        if isinstance(place.call.problem, GatherGrad) or len(place.call.problem.passes) == 1
    ]
    for _ in range(30):
        place = places[rng.integers(len(places))]
        problem = place.call.problem
        counts = rng.choice([1, 2, 3, 5, 7, 9, 18, 36], problem.sections)
        structure = Structure(
            tuple(map(int, counts)), int(rng.integers(1, problem.groups + 1)) if problem.rows_live else 0
        )
        source = specialized(place.indexed, problem, structure)
        assert "pointers[" not in read(source), structure
        assert callable(Builder.compile_here(source)), structure


def test_rounds_and_batches_that_a_known_length_makes_superfluous_go_and_the_bits_stay(folder):
    import tvm

    step, rng = small_step("channel", folder), np.random.default_rng(0)
    specializer, left, compared = step._new_specializer(None), set(), set()
    for name, places in specializer._places.items():
        for place in places:
            call, (knob, several) = (
                place.call,
                ("together", 4) if isinstance(place.call.problem, GatherConv) else ("several", 5),
            )
            indexed = kernel_source(call.kernel, call.problem, place.indexed.target, **{knob: several})
            special = specializer._source(name, replace(place, indexed=indexed))
            if isinstance(special, str) or special.key in compared:
                continue
            compared.add(special.key)
            left |= {(knob, int(count) % several > 0) for count in np.diff(step._state.get(call.buffers[0].name))}
            assert not re.search(r"for round in|for unit in range\(0\)|for several in range\(0\)", read(special)), name
            arrays = [
                step._state.get(buffer.name)
                if buffer.held and buffer.role != "transposed"
                else rng.standard_normal(step._state.get(buffer.name).size if buffer.held else buffer.elems).astype(
                    buffer.dtype
                )
                for buffer in call.buffers
            ]
            results = []
            for source in (indexed, special):
                tensors = [tvm.runtime.tensor(array) for array in arrays]
                Builder.compile_here(source)(*tensors)
                results.append([tensor.numpy() for tensor in tensors])
            for one, other in zip(*results, strict=True):
                np.testing.assert_array_equal(one, other, name)
            assert any((one != array).any() for one, array in zip(results[0], arrays, strict=True)), name
    assert left >= {("together", True), ("several", True)}, left  # of some a rest is left over


def test_a_run_that_is_loaded_goes_on_bit_for_bit_on_whichever_kernels(folder, tmp_path, always):
    """A checkpoint is taken while new kernels are missing: the one goes on with them as they come, the other begins
    with its own."""
    step = small_step("filter", folder)
    step.specialize()
    step(*batch(0))
    step.mutate(prune_to=0.82, grow_to=0.75, rng=np.random.default_rng(0))
    step.save(tmp_path / "checkpoint")
    loaded = mest.load(tmp_path / "checkpoint", builder=Builder(folder))
    loaded.specialize()
    for turn in range(1, 4):
        assert step(*batch(turn)).loss == loaded(*batch(turn)).loss
        for each in (step, loaded):
            each.mutate(prune_to=0.82, grow_to=0.7, rng=np.random.default_rng(turn))
    same(step, loaded)
    for each in (step, loaded):
        each._specializer.workers.close()

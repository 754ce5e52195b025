"""Ctrl-C in the middle of a change of a step: afterwards all is old or all is new, bit for bit, or a MestError says so;
restoring heals.

MEST_INTERRUPTIONS sets the number of places that are tried (default 80);
`MEST_INTERRUPTIONS=1000 pytest tests/runtime/test_interruptions.py` takes
a minute.
"""

import os
import random
import signal
import sys

import numpy as np
import pytest
import torch
from device import emulated
from test_specializing import always  # noqa: F401
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import DeviceLost

PLACES = int(os.environ.get("MEST_INTERRUPTIONS", "80"))
SHAPE = (4, 1, 8, 8)
OURS = f"{os.sep}mest_compile{os.sep}"


def compiled(**options):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    )
    return mest.compile(
        net, SHAPE, **{"scheme": "unstructured", "sparsity": 0.5, "dense_layers": [], "threads": 1} | options
    )


@pytest.fixture(scope="module")
def batch():
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32), np.array([0, 1, 2, 0])


@pytest.fixture(scope="module")
def step(batch):
    step = compiled()
    step(*batch, lr=0.1)
    return step


@pytest.fixture(scope="module")
def files(step, batch, tmp_path_factory):
    """Checkpoints of two states whose arrays differ in values and sizes; the first is the step's."""
    folder = tmp_path_factory.mktemp("checkpoints")
    step.save(folder / "first")
    step.mutate(0.7, 0.6)
    step(*batch, lr=0.1)
    step.save(folder / "second")
    step.restore(folder / "first")
    return folder / "first", folder / "second"


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C, which is ignored in what a shell runs in the background."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


class Interruption:
    """Presses Ctrl-C when a call comes to the `place`-th line of our own code."""

    def __init__(self, place):
        self.left = place

    def __call__(self, frame, event, argument):
        if OURS not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self

    def of(self, call):
        """Whether the call was interrupted."""
        sys.settrace(self)
        try:
            call()
            return False
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)


def lines_of(call):
    counter = Interruption(10**9)
    assert not counter.of(call)
    return 10**9 - counter.left


class Exchanges(Interruption):
    """Presses nothing, and notes the places that are within an exchange of packets with a device."""

    def __init__(self):
        super().__init__(10**9)
        self.places = []

    def __call__(self, frame, event, argument):
        found = super().__call__(frame, event, argument)
        if found and event == "line" and frame.f_code.co_name == "_told":
            self.places.append(10**9 - self.left)
        return found


def outcome(step, batch):
    """All that a step holds and what it computes from it, as bytes; moves it on by a training step."""
    before = [
        *step.masks().values(),
        *step.state_dict().values(),
        *step._state.collect(":momentum").values(),
        step.predict(batch[0]),
    ]
    drawn = str(step._rng.bit_generator.state).encode()
    loss = step(*batch, lr=0.1).loss
    return drawn + b"".join(
        np.ascontiguousarray(array).tobytes() for array in (*before, np.float32(loss), *step.state_dict().values())
    )


def rolled(step):
    return {name: np.roll(mask, 1, 0) for name, mask in step.masks().items()}


def fewer(step):
    masks = step.masks()
    for mask in masks.values():
        mask.reshape(-1)[np.flatnonzero(mask)[::3]] = False
    return masks


CHANGES = {
    "mutate": lambda step, files: step.mutate(0.6, 0.5),
    "mutate to other sizes": lambda step, files: step.mutate(0.7, 0.6, importance_lambda=0.1),
    "set_masks": lambda step, files: step.set_masks(rolled(step)),
    "set_masks of fewer": lambda step, files: step.set_masks(fewer(step)),
    "load_state_dict": lambda step, files: step.load_state_dict(
        {name: array * 2 for name, array in step.state_dict().items()}
    ),
    "restore": lambda step, files: step.restore(files[1]),
}


def spread(lines, count, seed):
    """So many random places of a call's lines, one in every stretch of them, so that both ends are among them."""
    draw = random.Random(seed).random
    return [1 + int((stretch + draw()) * lines / count) for stretch in range(count)]


def interrupt(step, batch, change, files, places, seed=0):
    """Interrupts a change at so many random places; (how many calls were stopped, outcomes that are neither old nor
    new)."""
    step.restore(files[0])
    old = outcome(step, batch)
    step.restore(files[0])
    lines = lines_of(lambda: change(step, files))
    new = outcome(step, batch)
    assert old != new
    stopped, odd, seen = 0, [], set()
    for place in spread(lines, places, seed):
        step.restore(files[0])
        stopped += Interruption(place).of(lambda: change(step, files))
        found = outcome(step, batch)
        seen.add(found == new)
        if found not in (old, new):
            odd.append(place)
        Interruption(place).of(lambda: step.restore(files[0]))  # which is as likely to be interrupted
        step.restore(files[0])
        if outcome(step, batch) != old:
            odd.append(-place)
    assert seen == {False, True} or places < 10
    return stopped, odd


@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupted_change_is_not_begun_or_finished(change, step, batch, files):
    places = max(1, PLACES // len(CHANGES))
    stopped, odd = interrupt(step, batch, CHANGES[change], files, places)
    assert not odd and stopped > places / 2


def test_an_interrupted_freeze_is_not_begun_or_finished(step, batch, files):
    """What is pruned and exchanged goes together; so does thawing it, by restoring."""
    places = max(4, PLACES // 16)

    def freeze(step, files):
        step.freeze("0.*,1.*", prune_to=0.7)

    freeze(step, files)  # compiles, which later calls do not: their lines are what places are among
    stopped, odd = interrupt(step, batch, freeze, files, places, seed=2)
    assert not odd and stopped > places / 3


def test_an_interrupted_profile_gives_the_state_back(step, batch, files):
    step.restore(files[0])
    old = outcome(step, batch)
    for place in random.Random(1).choices(
        range(1, lines_of(lambda: step.profile(*batch, repeats=1)) + 1), k=max(1, PLACES // 8)
    ):
        step.restore(files[0])
        Interruption(place).of(lambda: step.profile(*batch, repeats=1))
        assert outcome(step, batch) == old, place


def test_an_interrupted_clipped_step_is_a_step_or_none(step, batch, files):
    def clipped():
        return step(*batch, lr=0.1, clip_norm=0.01)

    step.restore(files[0])
    old = outcome(step, batch)
    clipped()
    step.restore(files[0])
    lines = lines_of(clipped)
    new = outcome(step, batch)
    for place in random.Random(1).choices(range(1, lines + 1), k=max(1, PLACES // 4)):
        step.restore(files[0])
        assert Interruption(place).of(clipped), "Ctrl-C may wait, but is never lost"
        assert outcome(step, batch) in (old, new), place


def test_a_mutation_that_is_refused_draws_no_random_numbers(step, files):
    step.restore(files[0])
    before, rng = step._rng.bit_generator.state, np.random.default_rng(5)
    full = {name: np.ones(mask.shape) for name, mask in step.masks().items()}
    for given in (None, rng):
        with pytest.raises(mest.MestError, match="gradients of 3.weight"):
            step.mutate(0.6, 0.5, rng=given, gradients=full | {"3.weight": full["3.weight"] * np.nan})
        with pytest.raises(mest.MestError, match="grow_to"):
            step.mutate(0.5, 0.6, rng=given)
    assert (
        step._rng.bit_generator.state == before
        and rng.bit_generator.state == np.random.default_rng(5).bit_generator.state
    )


@pytest.mark.parametrize("problem", [MemoryError, KeyboardInterrupt])
def test_what_a_device_refuses_in_the_middle_is_finished_by_the_next_call(problem, step, batch, files, monkeypatch):
    """As with Ctrl-C: nothing asks why a change stopped."""
    step.restore(files[0])
    step.mutate(0.7, 0.6, rng=np.random.default_rng(1))
    new = outcome(step, batch)
    step.restore(files[0])
    put, left = step._runner.put, [5]

    def fails(name, array):
        left[0] -= 1
        if left[0] == 0:
            raise problem
        put(name, array)

    monkeypatch.setattr(step._runner, "put", fails)
    with pytest.raises(problem):
        step.mutate(0.7, 0.6, rng=np.random.default_rng(1))
    assert outcome(step, batch) == new


def test_an_interrupted_change_leaves_no_specialized_kernel_of_another_mask(batch, always, tmp_path):  # noqa: F811
    """What runs afterwards, specialized or not, gives what indexed kernels give."""
    step, plain = compiled(scheme="filter"), compiled(scheme="filter")
    step.specialize()
    for name in ("first", "second"):
        step(*batch, lr=0.1)
        step.save(tmp_path / name)
        step.mutate(0.6, 0.4, rng=np.random.default_rng(0))
    wanted = {}
    for name in ("first", "second"):
        plain.restore(tmp_path / name)
        wanted[name] = outcome(plain, batch)
    step.restore(tmp_path / "first")
    lines = lines_of(lambda: step.restore(tmp_path / "second"))
    for place in random.Random(3).choices(range(1, lines + 1), k=max(1, PLACES // 4)):
        step.restore(tmp_path / "first")
        Interruption(place).of(lambda: step.restore(tmp_path / "second"))
        assert outcome(step, batch) in wanted.values(), place
        Interruption(place // 20).of(lambda: step(*batch, lr=0.0))  # which puts in place what has been compiled since
        step.restore(tmp_path / "second")
        assert outcome(step, batch) == wanted["second"], place
    assert any(step._specializer.running(name) == "specialized" for name in step.layers)
    step._specializer.workers.close()


@pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
def test_an_interrupted_change_on_a_device_is_finished_or_the_device_is_lost_and_restoring_heals(
    folder, port, batch, tmp_path
):
    with emulated.device(folder, port):
        step = compiled(target="arm_cpu", device=mest.rpc(f"127.0.0.1:{port}", "emulated", wait_seconds=30))
        step(*batch, lr=0.1)
        step.save(tmp_path / "first")
        old = outcome(step, batch)
        step.mutate(0.7, 0.6)  # what is remembered of the first one would shift the lines
        step.restore(tmp_path / "first")
        exchanges = Exchanges()
        exchanges.of(lambda: step.mutate(0.7, 0.6))
        new, told, lines = outcome(step, batch), 0, 10**9 - exchanges.left
        for place in [*spread(lines, max(3, PLACES // 13), seed=2), *random.Random(2).sample(exchanges.places, 4)]:
            step.restore(tmp_path / "first")
            Interruption(place).of(lambda: step.mutate(0.7, 0.6))
            try:
                assert outcome(step, batch) in (old, new), place
            except DeviceLost:
                told += 1
                step.reconnect()
                with pytest.raises(mest.MestError, match="no state yet"):
                    step.predict(batch[0])
            step.restore(tmp_path / "first")
            assert outcome(step, batch) == old, place
        assert told
        step.close()

"""What is read from disk is what was written, or it is refused: artifacts, checkpoints, and the library that runs.

MEST_DAMAGES sets how often each file is damaged at random (default 60);
`MEST_DAMAGES=500 pytest tests/runtime/test_believed.py` takes minutes.
"""

import json
import os
import random
import re
import shutil
import struct
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.nn as nn

import mest_compile as mest
from mest_compile.base import tensorfile
from mest_compile.runtime import artifact, checkpoint, library

DAMAGES = int(os.environ.get("MEST_DAMAGES", "60"))
X, Y = np.random.default_rng(0).standard_normal((4, 16)).astype("f"), np.array([0, 1, 2, 0])


def compiled(**options):
    return mest.compile(
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)),
        (4, 16),
        scheme="unstructured",
        sparsity=0.5,
        dense_layers=["2"],
        threads=1,
        **options,
    )


@pytest.fixture(scope="module")
def step():
    made = compiled()
    made(X, Y)
    return made


@pytest.fixture(scope="module")
def made(step, tmp_path_factory):
    """An artifact, which nobody changes."""
    folder = tmp_path_factory.mktemp("believed") / "made"
    step.export(folder)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Damage.


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Changed at a random place in a random way."""
    found = bytearray(whole)
    start, size = rng.randrange(len(whole)), rng.choice((1, 1, 4, 64))
    other = rng.randrange(len(whole))
    numbers = list(re.finditer(rb"\d+", whole[:20_000]))
    way = rng.choice(("flip", "cut", "lose", "twice", "other", "zero", "number", "longer"))
    if way == "flip":
        found[start] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del found[start:]
    elif way == "lose":
        del found[start : start + size]
    elif way == "twice":
        found[start:start] = whole[start : start + size]
    elif way == "other":
        found[start : start + size] = whole[other : other + size]
    elif way == "zero":
        found[start : start + 512] = bytes(len(found[start : start + 512]))
    elif way == "number" and numbers:
        place = rng.choice(numbers)
        found[place.start() : place.end()] = str(rng.choice((0, 1, -1, 2, 7, 0.5, 10**20, int(place[0]) + 1))).encode()
    elif way == "longer":
        found += rng.randbytes(size)
    return bytes(found)


def outcome(step):
    """All that tells two steps apart: what they say of themselves, predict, and make of a batch."""
    found = {
        "described": (step.describe(), step.optimizer),
        "logits": step.predict(X).tobytes(),
        "loss": step(X, Y).loss,
    }
    return found | {name: array.tobytes() for name, array in step.state_dict().items()}


@pytest.mark.parametrize("name", [artifact.MANIFEST, artifact.STATE, artifact.LIBRARY])
def test_a_damaged_artifact_is_refused_or_does_what_the_whole_one_does(name, copy):
    whole, wanted, refused = (copy / name).read_bytes(), outcome(mest.open_artifact(copy)), 0
    for seed in range(DAMAGES):
        (copy / name).write_bytes(damaged(whole, random.Random(seed)))
        try:
            assert outcome(mest.open_artifact(copy)) == wanted, f"seed {seed}"
        except mest.MestError as error:
            refused += 1
            assert "\n" not in str(error) and str(copy) in str(error), f"seed {seed}"
    assert refused > DAMAGES // 2


def test_a_damaged_checkpoint_is_refused_or_read_as_it_was_written(step, tmp_path):
    step.save(tmp_path / "a")
    whole, refused = (tmp_path / "a").read_bytes(), 0
    (header,) = struct.unpack_from("<Q", whole)
    arrays, facts = checkpoint.read(tmp_path / "a")
    for seed in range(2 * DAMAGES):
        rng = random.Random(seed)  # every other time in the header, which says what the rest is
        said = (
            damaged(whole, rng) if seed % 2 else whole[:8] + damaged(whole[8 : 8 + header], rng) + whole[8 + header :]
        )
        (tmp_path / "a").write_bytes(said)
        try:
            got, also = checkpoint.read(tmp_path / "a")
        except mest.MestError as error:
            refused += 1
            assert "\n" not in str(error), f"seed {seed}"
            continue
        assert also == facts and got.keys() == arrays.keys(), f"seed {seed}"
        for key, array in arrays.items():
            assert (got[key].dtype, got[key].shape, got[key].tobytes()) == (
                array.dtype,
                array.shape,
                array.tobytes(),
            ), f"seed {seed}"
    assert refused > DAMAGES


def rewritten(whole: bytes, change) -> bytes:
    """A checkpoint with another header before the same content."""
    (size,) = struct.unpack_from("<Q", whole)
    header = json.loads(whole[8 : 8 + size])
    name = next(name for name in header if name.endswith("0.weight"))
    header[name] = change(header[name])
    said = json.dumps(header).encode()
    return struct.pack("<Q", len(said)) + said + whole[8 + size :]


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts | {"dtype": "I32"},
        lambda facts: facts | {"shape": [2, facts["shape"][0] // 2]},
        lambda facts: facts | {"shape": [float(facts["shape"][0])]},
        lambda facts: facts | {"shape": "64"},
        lambda facts: facts | {"shape": 64},
        lambda facts: facts | {"shape": [0, 2**64]},
        lambda facts: facts | {"shape": [-1, -facts["shape"][0]]},
        lambda facts: facts | {"data_offsets": ["0", "4"]},
        lambda facts: facts | {"dtype": ["F32"]},
        lambda facts: [facts],
        lambda facts: None,
    ],
)
def test_a_header_that_says_something_else_of_the_same_bytes_is_refused(change, step, tmp_path):
    step.save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(rewritten(whole, lambda facts: facts))
    assert checkpoint.read(tmp_path / "a")  # the rewriting itself does no harm
    (tmp_path / "a").write_bytes(rewritten(whole, change))
    with pytest.raises(mest.MestError, match="is damaged or cut short"):
        checkpoint.read(tmp_path / "a")


@pytest.mark.parametrize(
    "texts", [[], {"format": 3}, {"format": checkpoint.FORMAT, "facts": "{}"}, {"format": "another"}]
)
def test_texts_that_are_no_checkpoints_are_refused(texts, tmp_path):
    said = json.dumps({"__metadata__": texts}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(said)) + said)
    with pytest.raises(mest.MestError):
        checkpoint.read(tmp_path / "a")


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["optimizer"].update(lr=0.9),
        lambda facts: facts["optimizer"].update(momentum=0.1),
        lambda facts: facts["optimizer"].update(nesterov=True),
        lambda facts: facts.update(threads=2),
        lambda facts: facts.update(seed=1),
        lambda facts: facts["target"].update(llvm=[["kind", "llvm"], ["mcpu", "x86-64"]]),
        lambda facts: facts["describe"].update(cpu="x"),
        lambda facts: facts["knobs"].update(train={}) or facts.update(label_smoothing=0.5),
    ],
)
def test_a_manifest_that_decides_something_else_is_refused(change, copy):
    manifest = json.loads((copy / artifact.MANIFEST).read_text())
    (copy / artifact.MANIFEST).write_text(json.dumps(manifest))  # another layout of the same is no damage
    mest.open_artifact(copy)
    change(manifest["facts"])
    (copy / artifact.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(mest.MestError, match="manifest.json is damaged"):
        mest.open_artifact(copy)


# The library that runs is the one that was checked.


def test_an_artifact_written_anew_runs_its_own_library_and_the_open_one_goes_on(tmp_path):
    path = tmp_path / "artifact"
    steps = [compiled(label_smoothing=share) for share in (0.0, 0.5)]  # part of the code, not of the arrays
    opened = []
    for step in steps:
        step.export(path)
        opened.append(mest.open_artifact(path))
    losses = [[each(X, Y).loss for each in (step, there)] for step, there in zip(steps, opened)]
    assert losses[0][0] == losses[0][1] != losses[1][0] == losses[1][1]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of what a process has mapped")
def test_nothing_runs_from_a_file_that_others_know(made):
    step = mest.open_artifact(made)
    mapped = Path("/proc/self/maps").read_text()
    assert str(made) not in mapped and "library.so (deleted)" in mapped
    assert content(made).keys() == {artifact.LIBRARY, artifact.STATE, artifact.MANIFEST}
    assert np.isfinite(step(X, Y).loss)


def test_a_process_that_has_tvms_runtime_loads_no_second_one(made, tmp_path):
    (tmp_path / library.RUNTIME).write_text("no library")  # there is one in this process: the compiler's
    assert np.isfinite(mest.open_artifact(made, runtime=tmp_path / library.RUNTIME)(X, Y).loss)


# Writing: the old one or the new one.


def stopping(number, late, problem, calls, real=os.replace):
    """os.replace that raises `problem` at its call `number`, before or after it does its work."""

    def named(source, target):
        calls.append(target)
        if len(calls) != number:
            return real(source, target)
        if late:
            real(source, target)
        raise problem

    return named


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("late", [False, True])
def test_an_export_that_is_stopped_leaves_the_old_artifact_or_the_new_one(problem, late, step, tmp_path, monkeypatch):
    path, library, stopped = tmp_path / "here" / "artifact", step._compiled.library(), 0
    monkeypatch.setattr(step, "_compiled", replace(step._compiled, library=lambda coming: library))
    step.export(path)
    for number in range(1, 8):
        step(X, Y)
        before, calls = content(path), []
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping(number, late, problem, calls))
            try:
                step.export(path)
            except (mest.MestError, KeyboardInterrupt):
                stopped += 1
        after = content(path)
        mest.open_artifact(path)
        assert after == before or (len(calls) > 3 and after[artifact.STATE] != before[artifact.STATE])
        assert [file.name for file in path.parent.iterdir()] == ["artifact"], number
    assert stopped >= 4  # checkpoint, manifest, the first try, the old one's turn, the new one's


def test_threads_that_export_one_step_leave_one_of_their_artifacts(step, tmp_path):
    problems, path, begin = [], tmp_path / "here" / "artifact", threading.Barrier(4)

    def export():
        begin.wait()
        try:
            for _ in range(3):
                step.export(path)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=export) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        problems == []
        and outcome(mest.open_artifact(path))
        and [file.name for file in path.parent.iterdir()] == ["artifact"]
    )


def test_a_link_to_an_artifact_stays_one(step, tmp_path):
    step.export(tmp_path / "there")
    (tmp_path / "link").symlink_to("there")
    step.export(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and mest.open_artifact(tmp_path / "there")


def test_threads_that_write_one_checkpoint_leave_one_of_theirs(tmp_path):
    problems, begin = [], threading.Barrier(8)

    def write(number):
        begin.wait()
        try:
            for _ in range(10):
                checkpoint.write(tmp_path / "a", {"x": np.full(50_000, number)}, {"number": number})
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    arrays, facts = checkpoint.read(tmp_path / "a")
    assert (
        problems == []
        and (arrays["x"] == facts["number"]).all()
        and [file.name for file in tmp_path.iterdir()] == ["a"]
    )


def test_an_array_file_says_what_it_lacks():
    whole = tensorfile.pack({"x": np.zeros(3, np.float32)}, {})
    with pytest.raises(ValueError, match="x is not all there"):
        tensorfile.unpack(whole[:-1])

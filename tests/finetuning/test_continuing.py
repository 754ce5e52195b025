"""A fine-tuning that continues another: classes are added, what is replayed is not forgotten, nothing sparse is
compiled again."""

import json

import numpy as np
import pytest
from PIL import Image
from test_finetune import Stops
from tiny import INPUTS, pictures, tiny

import mest_compile as mest
from mest_compile import ondevice
from mest_compile.base.errors import BudgetError, DataError, StateError, UsageError
from mest_compile.data import Dataset, Split
from mest_compile.data.pictures import read_pictures
from mest_compile.finetuning.continuing import read_before
from mest_compile.finetuning.replay import Examples, Replay, herded, kept, mixed, told_of
from mest_compile.kernels.cache import Builder
from mest_compile.runtime import checkpoint


def of(labels, count, seed=0):
    """Pictures of those classes only."""
    images, there = pictures(count, seed)
    chosen = np.isin(there, labels)
    return images[chosen], there[chosen]


@pytest.fixture(scope="module")
def first(tmp_path_factory, builder):
    """Two of the three classes."""
    given = {"inputs": INPUTS, "batch": 8, "epochs": 3, "threads": 1, "sparsity": 0.5, "trainable": "last:1"}
    given["optimizer"] = "adamw:lr=0.001"
    out = tmp_path_factory.mktemp("continued") / "first"
    return mest.finetune(tiny(), of([0, 1], 72), test=of([0, 1], 45, 1), out=out, builder=builder, **given)


def go_on(first, out, builder, **given):
    usual = {"test": of([2], 45, 1), "epochs": 3, "builder": builder}
    return mest.finetune(data=of([2], 72), continue_from=first.folder, out=out, **{**usual, **given})


@pytest.fixture(scope="module")
def second(first, tmp_path_factory, builder):
    """The third class. Its kernels that were compiled are noted."""
    compiled = []

    class Notes(Builder):
        def _new_library(self, source):
            compiled.append(source.kernel)
            return super()._new_library(source)

    fresh = Notes(folder=builder.folder)
    return go_on(first, tmp_path_factory.mktemp("continued") / "second", fresh), compiled


def test_a_class_is_added_without_compiling_a_sparse_layer(first, second):
    found, compiled = second
    assert first.classes == ("0", "1") and found.classes == ("0", "1", "2")
    assert found.step.graph.trainable() == first.step.graph.trainable()
    assert found.step.sparsity() == first.step.sparsity() == {"blocks.2.0.weight": 0.5, "blocks.2.3.weight": 0.5}
    inner = [name for name in compiled if "conv" in name or "batch_norm" in name]
    assert set(inner) <= {"gather.conv"} and len(inner) <= 2, compiled  # the classifier's own, forward and back
    before, after = first.step.state_dict(), found.step.state_dict()
    assert np.array_equal(before["stem.0.weight"], after["stem.0.weight"])
    assert after["fc.weight"].shape == (3, 8) and np.abs(after["fc.weight"][2]).max() > 0


def test_what_was_learnt_is_replayed_and_told_by_task(first, second):
    found, _ = second
    result = json.loads((found.folder / "result.json").read_text())
    assert result["tasks"] == list(found.tasks) and [task["classes"] for task in found.tasks] == [["0", "1"], ["2"]]
    assert found.tasks[0]["learnt"] == first.accuracy
    lines = (found.folder / "blocks" / "metrics.jsonl").read_text().splitlines()
    sieved = [json.loads(line)["sieve"] for line in lines]
    assert sieved[0] is None and 0 < sieved[1]["dropped"] < sieved[1]["kept"]  # of what is known by heart a quarter
    assert found.tasks[0]["forgotten"] == pytest.approx(first.accuracy - found.tasks[0]["accuracy"])
    images, labels = pictures(45, 1)
    answers = found.step.predict(images).argmax(1)
    assert found.accuracy == (answers == labels).mean() > 0.75  # of old and new test examples alike
    assert found.tasks[0]["accuracy"] == (answers == labels)[labels < 2].mean() > 0.6
    replay = Replay.read(found.folder / "replay.safetensors")
    assert np.bincount(replay.train.labels).tolist() == [22] * 3 and replay.train.images.shape[1:] == (8, 6, 6)
    assert "task 1 (0, 1)" in (found.folder / "report.html").read_text()


def test_what_the_old_task_needs_lives(first, second):
    found, _ = second
    needed = checkpoint.read(found.folder / "protected.safetensors")[0]
    before, after = first.step.masks(), found.step.masks()
    assert needed.keys() == before.keys()
    for name, mask in needed.items():
        assert mask.sum() == round(0.5 * before[name].sum()) and not (mask & ~before[name]).any()
        assert not (mask & ~after[name]).any()


def test_it_goes_on_where_it_was_stopped_bit_for_bit(first, second, tmp_path, builder):
    for number, stop in enumerate((("training the classifier", 2), ("training the last blocks", 1))):
        with pytest.raises(KeyboardInterrupt):
            go_on(first, tmp_path / "out", builder, resume=number > 0, watch=Stops(*stop))
    found, wanted = go_on(first, tmp_path / "out", builder, resume=True), second[0].step.state_dict()
    assert all(np.array_equal(value, wanted[name]) for name, value in found.step.state_dict().items())


def test_a_device_learns_a_class_from_an_artifact_without_a_compiler(mest_compile_command, tmp_path, builder):
    given = {"inputs": INPUTS, "batch": 8, "epochs": 3, "threads": 1, "sparsity": 0.5, "trainable": "last:1"}
    given["optimizer"] = "adamw:lr=0.001"
    given |= {"artifact": True, "spare_classes": 1, "test": of([0, 1], 45, 1), "builder": builder}
    begun = mest.finetune(tiny(), of([0, 1], 72), out=tmp_path / "begun", **given)
    photos = [Image.fromarray(image) for image in of([0, 1], 30)[0].transpose(0, 2, 3, 1)]
    assert begun.classes == ("0", "1", "(spare 1)") and {name for name, _ in begun.predict(photos)} == {"0", "1"}
    artifact = begun.folder / "artifact"
    found = mest.learn(artifact, of([2], 72), tmp_path / "more", test=of([2], 45, 1), lr=0.01)
    assert found.classes == ("0", "1", "2") and [task["classes"] for task in found.tasks] == [["0", "1"], ["2"]]
    images, labels = pictures(45, 1)
    right = found.step.predict(images).argmax(1) == labels
    assert right[labels == 2].mean() > 0.6 and right[labels < 2].mean() > 0.6
    assert found.tasks[1]["accuracy"] == right[labels == 2].mean() and found.step.reading.classes == found.classes
    more = tmp_path / "more" / "artifact"
    replay = Replay.read(more / "replay.safetensors")
    assert replay.train.images.dtype == np.uint8 and np.bincount(replay.train.labels).tolist() == [22] * 3
    assert found.accuracy == right.mean() and np.array_equal(
        mest.open_artifact(more).predict(images).argmax(1) == labels, right
    )
    fourth = of([0], 9)[0], np.full(3, 3)
    for begun in more, tmp_path / "more":
        with pytest.raises(UsageError, match="no output is left for the class '3'"):
            mest.learn(begun, fourth, tmp_path / "fourth", test=fourth)
    for name in "2", "0":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number, image in enumerate(of([int(name)], 30)[0]):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "photos" / name / f"{number}.png")
    said = ["finetune", "--continue", tmp_path / "more", "--data-folder", tmp_path / "photos", "--epochs", 1, "--json"]
    told = mest_compile_command(*said, "--out", tmp_path / "again")
    assert told.document["classes"] == ["0", "1", "2"] and len(told.document["tasks"]) == 3, told.err
    assert ondevice.main([*map(str, said), "--out", str(tmp_path / "small")]) == 0  # where there is no typer
    assert mest.learn(tmp_path / "again", of([2], 9), tmp_path / "last", epochs=1).tasks[2]["classes"] == ["0", "2"]
    refused = mest_compile_command(*said, "--out", tmp_path / "no", "--sparsity", 0.5)
    assert (
        refused.code == 2
        and "what continues an artifact keeps its net and settings; leave out --sparsity" in refused.err
    )
    with pytest.raises(UsageError, match="already holds something"):
        mest.learn(artifact, of([2], 72), tmp_path / "more")
    with pytest.raises(StateError, match=r"holds no inputs\.json"):
        mest.learn(tmp_path, of([2], 9), tmp_path / "none")


def test_a_buffer_is_bounded_and_herding_chooses_it():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((50, 6))
    order = herded(features, 10)
    assert len(set(order)) == 10 and np.array_equal(herded(features, 4), order[:4]) and len(herded(features, 99)) == 50
    assert np.abs(features[order].mean(0) - features.mean(0)).max() < 0.2 * np.abs(features[:10].mean(0)).max()
    plain = np.zeros(1, np.float32), np.ones(1, np.float32)
    data = Dataset(rng.standard_normal((40, 1, 2, 2)).astype(np.float32), np.arange(40) % 2, 2, *plain, "new")
    train, val, test = kept(None, Split(data, data), 2, 16 * 7, 0, 0)
    assert np.bincount(train.labels).tolist() == np.bincount(test.labels).tolist() == [3, 3]
    assert np.array_equal(np.sort(train.first(5).labels), [0, 0, 1, 1]) and not len(
        val.labels
    )  # there was no such part
    again, vals, _ = kept(
        Replay(train, val, test, ({},)), Split(data, data, data), 3, 16 * 3, 1, 0
    )  # room for one each
    assert np.bincount(vals.labels).tolist() == [1, 1]
    assert np.bincount(again.labels).tolist() == [1, 1] and again.images.nbytes <= 16 * 3
    with pytest.raises(BudgetError, match="15 bytes do not hold an example of each of 2 classes"):
        kept(None, Split(data, data), 2, 15, 0, 0)
    assert not len(kept(None, Split(data, data), 2, 0, 0, 0)[0].labels)


def test_half_of_what_is_trained_on_is_replayed():
    plain = np.zeros(1, np.float32), np.ones(1, np.float32)
    data = Dataset(np.zeros((10, 1, 2, 2), np.float32), np.full(10, 1), 2, *plain, "new")
    old = Examples(np.ones((3, 1, 2, 2), np.float32), np.zeros(3, np.int64), np.zeros(3, np.int64))
    both = mixed(Split(data, data, data), Replay(old, old, old, ({},)))
    assert np.bincount(both.train.labels).tolist() == [10, 10]
    assert np.bincount(both.test.labels).tolist() == np.bincount(both.val.labels).tolist() == [3, 10]
    without = mixed(Split(data, data), Replay(old, old, old, ({},)))
    assert (
        without.val.labels.tolist() == [0] * 3
        and mixed(Split(data, data), Replay(old, old.at([]), old, ({},))).val is None
    )


def test_tasks_are_told_with_what_was_forgotten():
    told = told_of([{"classes": ["a"], "learnt": 1.0}, {"classes": ["b"]}], np.array([1, 0, 1]), np.array([0, 0, 1]))
    assert [task["forgotten"] for task in told] == [0.5, 0.0] and told[0]["accuracy"] == 0.5


def test_classes_that_are_known_need_no_examples():
    train, test = of([1, 2], 30), of([2], 9, 1)
    found = read_pictures(train, INPUTS, test, known=("0", "2"))
    assert found.classes == ("0", "2", "1") and set(found.split.train.labels) == {1, 2}
    assert set(found.split.test.labels) == {1}
    with pytest.raises(DataError, match="has the class '1'"):
        read_pictures(of([2], 30), INPUTS, of([1], 30), known=("0", "2"))


def test_a_step_protects_units(first, builder):
    def loaded():
        """With every second live unit small: of each row some, as a row keeps one whatever it is."""
        step = mest.load(first.folder / "checkpoint.safetensors", builder=builder)
        step.load_state_dict({**step.state_dict(), name: np.where(small, 0.01, 1).astype(np.float32) * mask})
        return step

    name = "blocks.2.0.weight"
    mask = first.step.masks()[name]
    few = np.zeros((4, 8), bool)  # blocks of 4 output channels
    few.ravel()[np.flatnonzero(mask.reshape(4, 4, 8).any(1))[::2]] = True
    small = np.repeat(few, 4, axis=0).reshape(mask.shape)  # what magnitude alone would prune
    step = loaded()
    step.mutate(prune_to=0.75, grow_to=0.75)
    assert not (small & step.masks()[name]).any()
    step = loaded()
    step.protect({name: small})
    step.mutate(prune_to=0.75, grow_to=0.75)
    assert not (small & ~step.masks()[name]).any()
    with pytest.raises(StateError, match="no sparse layer 'fc.weight'"):
        step.protect({"fc.weight": np.ones((2, 8), bool)})


def test_what_cannot_be_continued_is_refused(first, tmp_path, builder):
    with pytest.raises(UsageError, match="keeps its net and settings"):
        go_on(first, tmp_path / "out", builder, sparsity=0.9)
    with pytest.raises(UsageError, match="give data"):
        mest.finetune(continue_from=first.folder)
    with pytest.raises(StateError, match="holds no fine-tuning"):
        mest.finetune(data=of([2], 9), continue_from=tmp_path, out=tmp_path / "out", builder=builder)
    (first.folder / "replay.safetensors").rename(tmp_path / "aside")
    with pytest.raises(StateError, match="is not done"):
        read_before(first.folder)
    (tmp_path / "aside").rename(first.folder / "replay.safetensors")

"""What a Trainer is given: loaders, no test set, a validation set that chooses; who watches, and who stops it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_training import TEST as PIXELS_TO_TEST
from test_training import TRAIN as PIXELS
from test_training import SoftmaxStep

import mest_compile as mest
from mest_compile.base.errors import DataError, InputError, StateError, UsageError
from mest_compile.models.inputs import Inputs, Reading
from mest_compile.training.loop import Trainer
from mest_compile.training.recipe import Recipe
from mest_compile.training.sieve import SieveRule

TRAIN, TEST = (((part[0] / 60 - 2).astype(np.float32), part[1]) for part in (PIXELS, PIXELS_TO_TEST))
PLAIN = Recipe(3, "static", lr=0.05)


def loader(batch=10, data=TRAIN, **options):
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(data[0]), torch.from_numpy(data[1]))
    return torch.utils.data.DataLoader(pairs, batch, **options)


def test_a_loader_trains_as_its_examples_in_its_order():
    runs = []
    for train in (loader(), loader(200), [(TRAIN[0][i : i + 50], TRAIN[1][i : i + 50]) for i in range(0, 200, 50)]):
        step = SoftmaxStep()
        run = Trainer(step, PLAIN).fit(train, loader(7, TEST))
        assert len(step.rates) == 3 * 12 and [epoch["iterations"] for epoch in run.history] == [12] * 3
        runs.append((run.test_accuracy, step.state["weight"].tolist()))
    assert runs[0] == runs[1] == runs[2] and runs[0][0] > 0.4
    step = SoftmaxStep()
    Trainer(step, PLAIN).fit(loader(), TEST)
    assert step.state["weight"].tolist() == runs[0][1]


def test_a_loader_is_neither_augmented_nor_sieved_and_says_so():
    assert "images as the loader gives them, not augmented here" in Trainer(SoftmaxStep(), PLAIN).about(loader(), TEST)
    for recipe, said in (
        (replace(PLAIN, augment="shift"), "whose own transforms augment it; leave augment and mirror out"),
        (replace(PLAIN, sieve=SieveRule(0.1)), "comes in batches without saying which are in them"),
    ):
        with pytest.raises(UsageError, match=said):
            Trainer(SoftmaxStep(), recipe).fit(loader(), TEST)
    with pytest.raises(DataError, match="can be gone through once"):
        Trainer(SoftmaxStep(), PLAIN).fit(iter(loader()), TEST)
    with pytest.raises(InputError, match="has .3, 8, 8."):
        Trainer(SoftmaxStep(), PLAIN).fit(loader(data=(np.zeros((20, 3, 8, 8), np.float32), TRAIN[1][:20])), TEST)


def test_without_a_test_set_a_run_trains_and_tells_none(tmp_path):
    run = Trainer(SoftmaxStep(), PLAIN, tmp_path / "run").fit(TRAIN)
    assert run.test_accuracy is None and run.best is None and len(run.history) == 3
    assert not (tmp_path / "run" / "best.safetensors").exists()
    assert Trainer(SoftmaxStep(), PLAIN).about(TRAIN).startswith("training set: 200 examples to train; images not")


class Answering(SoftmaxStep):
    """Right about the validation set in its second epoch alone, about the test set ever more."""

    epoch = 0

    def predict(self, images):
        logits = super().predict(images)
        if len(images) in (8, 4):  # validation, test
            right = {8: [2, 8, 4], 4: [1, 2, 3]}[len(images)][self.epoch]
            labels = np.zeros(len(images), int)
            labels[right:] = 1
            self.epoch += len(images) == 4
            return np.eye(10, dtype=np.float32)[labels]
        return logits


def held(count):
    return TRAIN[0][:count], np.zeros(count, np.int64)


def test_the_validation_set_chooses_the_best_model_and_the_test_set_never(tmp_path):
    run = Trainer(Answering(), PLAIN, tmp_path / "run").fit(TRAIN, held(4), held(8))
    assert [epoch["val_accuracy"] for epoch in run.history] == [0.25, 1.0, 0.5]
    assert [epoch["test_accuracy"] for epoch in run.history] == [0.25, 0.5, 0.75]
    assert run.best == {"epoch": 2, "val_accuracy": 1.0} and run.test_accuracy == 0.75
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["val_accuracy"] == 1.0
    trainer = Trainer.resume(tmp_path / "run", Answering(), epochs=5)
    with pytest.raises(StateError, match="the run had a val set; a run resumes on its own data"):
        trainer.fit(TRAIN, held(4))


def test_training_ends_when_nothing_gets_better():
    run = Trainer(Answering(), replace(PLAIN, patience=1)).fit(TRAIN, held(4), held(8))
    assert len(run.history) == 3
    run = Trainer(Answering(), replace(PLAIN, epochs=3, patience=2)).fit(TRAIN, held(4), held(8))
    assert len(run.history) == 3

    class Worse(Answering):
        epoch = 1

    run = Trainer(Worse(), replace(PLAIN, epochs=9, patience=1)).fit(TRAIN, held(4), held(8))
    assert len(run.history) == 2 and run.best == {"epoch": 1, "val_accuracy": 1.0}


class Told:
    def __init__(self):
        self.events, self.trainer = [], None

    def on_batch(self, epoch, epochs, batch, batches, loss, correct):
        self.events.append(("batch", epoch, batch))

    def on_epoch(self, metrics):
        self.events.append(("epoch", metrics["epoch"]))
        if metrics["epoch"] == 2:
            self.trainer.stop()

    def on_mutation(self, epoch, mutation):
        self.events.append(("mutation", epoch, mutation["layers"]))


def test_callbacks_are_told_and_may_stop_a_run_that_then_goes_on(tmp_path):
    told, epochs = Told(), []
    only_epochs = type("Only", (), {"on_epoch": lambda self, metrics: epochs.append(metrics["epoch"])})()
    recipe = Recipe(4, "em", lr=0.05, mutate_every=1)
    told.trainer = trainer = Trainer(SoftmaxStep(), recipe, tmp_path / "run", callbacks=[told, only_epochs])
    run = trainer.fit(TRAIN, TEST)
    assert len(run.history) == 2 and epochs == [1, 2]
    assert [event for event in told.events if event[0] != "batch"] == [
        ("epoch", 1),
        ("mutation", 2, {"re-indexed": 1}),
        ("epoch", 2),
    ]
    assert sum(event[0] == "batch" for event in told.events) == 24
    with pytest.raises(UsageError, match="a callback is a int, which has none of the methods on_batch"):
        Trainer(SoftmaxStep(), recipe, callbacks=[3])


def test_what_was_said_of_pictures_stays_where_the_data_do_not_say_it():
    step = SoftmaxStep()
    step.reading = mine = Reading(tuple("abcdefghij"), Inputs((8, 8), mean=(0.5,), std=(2.0,)))
    Trainer(step, PLAIN).fit(TRAIN)
    assert step.reading == mine
    seen = []
    step.predict, before = lambda images: seen.append(images) or np.zeros((len(images), 10), np.float32), step.predict
    Trainer(step, replace(PLAIN, epochs=1)).fit(PIXELS, PIXELS_TO_TEST)
    assert step.reading == mine  # pixels are scaled as the model's were before
    np.testing.assert_array_equal(np.concatenate(seen[-4:]), (PIXELS_TO_TEST[0].astype(np.float32) - 0.5) / 2)
    step.predict = before
    for step.reading in (None, Reading(mine.classes)):  # of which nobody said how pixels are scaled
        Trainer(step, PLAIN).fit(PIXELS)
        assert step.reading.inputs.mean[0] == pytest.approx(PIXELS[0].mean(), rel=1e-4)


def test_augmentation_by_name():
    found = {
        said: mest.Recipe(2, augment=said).augmentation(True, False)
        for said in (None, True, False, "none", "shift", "mirror", "shift,mirror")
    }
    assert found == {
        None: (True, False),
        True: (True, False),
        False: (False, False),
        "none": (False, False),
        "shift": (True, False),
        "mirror": (False, True),
        "shift,mirror": (True, True),
    }
    with pytest.raises(mest.MestError, match="no augment 'mirorr'; .* did you mean 'mirror'"):
        mest.Recipe(2, augment="mirorr")
    with pytest.raises(UsageError, match="leave mirror out"):
        mest.Recipe(2, augment="shift", mirror=True)

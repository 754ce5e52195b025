"""The epoch loop and its run folder, on a small numpy step that has the interface of a compiled one."""

import json
import math
import os
import signal
import types
from dataclasses import dataclass, replace
from io import StringIO

import numpy as np
import pytest
from masks import grow, prune
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import save_file

from mest_compile import opening
from mest_compile.base.errors import DeviceLost, InputError, MestError, SparsityError, StateError, UsageError
from mest_compile.data import Dataset, as_dataset
from mest_compile.operators.optimizers.sgd import SGD
from mest_compile.runtime import checkpoint
from mest_compile.sparsity.mutation import Phase, importance
from mest_compile.training import loop
from mest_compile.training.evaluating import evaluate
from mest_compile.training.fitting import target_sparsity
from mest_compile.training.loop import Trainer
from mest_compile.training.metrics import METRICS
from mest_compile.training.recipe import Recipe
from mest_compile.training.recovery import MOST_LOSSES
from mest_compile.training.runfolder import RunFolder
from mest_compile.training.showing import TrainingProgress
from mest_compile.training.sieve import SieveRule

CLOCKED = {"images_per_second", "train_seconds", "step_seconds", "evaluation_seconds"}


@dataclass
class Result:
    loss: float
    correct: np.ndarray


@dataclass
class Report:
    layers: dict
    seconds: float
    reindex_seconds: float
    uploaded_bytes: int = 0


class SoftmaxStep:
    """Masked softmax regression with momentum on (batch, channels, height, width) images."""

    def __init__(self, shape=(16, 1, 8, 8), classes=10, sparsity=0.9, seed=0):
        self.input_shape, self.batch, self.classes, self.target_sparsity = shape, shape[0], classes, sparsity
        units = math.prod(shape[1:]) * classes
        weight = np.random.default_rng(seed).standard_normal(units).astype(np.float32) * 0.01
        keep = prune(np.ones(units, bool), abs(weight), self._live(sparsity), np.random.default_rng(seed))
        self.state = {"weight": weight * keep, "momentum": np.zeros(units, np.float32), "keep": keep}
        self.rates, self.mutations = [], []
        self.optimizer, self.asked_lr, self.whole_batches, self.reading = SGD(), None, True, None

    def _live(self, sparsity):
        return round(math.prod(self.input_shape[1:]) * self.classes * (1 - sparsity))

    def predict(self, images):
        return images.reshape(len(images), -1) @ self.state["weight"].reshape(-1, self.classes)

    def __call__(self, images, labels, lr=0.1, ahead=None):
        assert images.shape[1:] == self.input_shape[1:] and images.dtype == np.float32
        assert len(images) == self.batch or not self.whole_batches
        self.rates.append(lr)
        logits = self.predict(images)
        share = np.exp(logits - logits.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        rows = np.arange(len(images))
        loss, correct = -np.log(share[rows, labels]).mean(), logits.argmax(1) == labels
        share[rows, labels] -= 1
        gradient = (images.reshape(len(images), -1).T @ share / len(images)).ravel() * self.state["keep"]
        self.state["momentum"] = (0.9 * self.state["momentum"] + gradient).astype(np.float32)
        self.state["weight"] = (self.state["weight"] - lr * self.state["momentum"]).astype(np.float32)
        return Result(float(loss), correct)

    def mutate(self, prune_to=0.9, grow_to=0.85, importance_lambda=0.0, rng=None):
        self.mutations.append((prune_to, grow_to))
        scores = importance(self.state["weight"], self.state["momentum"], importance_lambda)
        pruned = prune(self.state["keep"], scores, self._live(prune_to), rng)
        keep = grow(pruned, self._live(grow_to), rng)
        fate = "unchanged" if (keep == self.state["keep"]).all() else "re-indexed"
        self.state = {
            "weight": self.state["weight"] * pruned,
            "momentum": self.state["momentum"] * pruned,
            "keep": keep,
        }
        return Report({"weight": fate}, 0.25, 0.125)

    def sparsity(self):
        return {"weight": 1 - float(self.state["keep"].mean())}

    def memory(self):
        return {"values": int(self.state["keep"].sum()) * 4, "total": 4096}

    def not_finite(self):
        return [name for name, array in self.state.items() if not np.isfinite(array).all()]

    def describe(self):
        return {
            "target": "local",
            "threads": 1,
            "seed": 0,
            "schemes": {"weight": "unstructured"},
            "sparsity": {"weight": self.target_sparsity},
            "sparsity_of_all": self.target_sparsity,
            "weights": math.prod(self.input_shape[1:]) * self.classes,
            "versions": {},
        }

    def check_room(self, grow_to):
        assert 0 <= grow_to <= self.target_sparsity

    def masks(self):
        return {"weight": self.state["keep"]}

    def save(self, path, extra, arrays=None):
        part = path.with_suffix(".part")
        save_file({**self.state, **(arrays or {})}, part, metadata={"extra": json.dumps(extra)})
        os.replace(part, path)

    def restore(self, path):
        with safe_open(path, "numpy") as file:
            self.state = {name: file.get_tensor(name) for name in self.state}
            return json.loads(file.metadata()["extra"]), {
                name: file.get_tensor(name) for name in set(file.keys()) - set(self.state)
            }


def sample(count, seed=0):
    """Ten noisy prototypes, (count, 1, 8, 8) uint8."""
    prototypes = np.random.default_rng(99).integers(0, 200, (10, 1, 8, 8))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    return (prototypes[labels] + rng.integers(0, 56, (count, 1, 8, 8))).astype(np.uint8), labels


TRAIN, TEST = sample(200), sample(50, seed=1)
RECIPE = Recipe(6, "em_s", lr=0.05, mutate_every=1, phases=(Phase(4, 0.9, 0.8), Phase(6, 0.9, 0.9)))
LEARNABLE = replace(RECIPE, augment=False)  # a linear model cannot tell shifted and mirrored noise apart

CHANCE = 0.1 + 5 * math.sqrt(
    0.1 * 0.9 / 50
)  # what guessing 50 labels of 10 classes does not pass: five standard deviations


class Interrupter:
    """Stops training at one batch, as Ctrl-C does."""

    def __init__(self, epoch, batch, action):
        self.at, self.action = (epoch, batch), action

    def on_batch(self, epoch, epochs, batch, batches, loss, correct):
        if (epoch, batch) == self.at:
            self.action()

    def on_epoch(self, metrics):
        pass


def interrupt():
    raise KeyboardInterrupt


def without_clock(history):
    return [{key: value for key, value in metrics.items() if key not in CLOCKED} for metrics in history]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def extra_of(path):
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["extra"])


def test_training_learns_and_reports(tmp_path):
    step = SoftmaxStep()
    run = Trainer(step, LEARNABLE, tmp_path / "run").fit(TRAIN, TEST)
    assert [metrics["epoch"] for metrics in run.history] == [1, 2, 3, 4, 5, 6]
    assert run.history[-1]["loss"] < 0.5 * run.history[0]["loss"]
    assert run.test_accuracy == run.history[-1]["test_accuracy"] > CHANCE
    last = run.history[-1]
    assert last["examples"] == 192 and last["images_per_second"] == pytest.approx(192 / last["train_seconds"])
    assert 0 < last["step_seconds"] * 12 <= last["train_seconds"]
    assert last["memory_bytes"] == {"values": 256, "total": 4096}
    assert last["sparsity"] == {"weight": pytest.approx(0.9, abs=1e-6)}
    assert run.history[0]["mutation"] is None
    assert run.history[1]["mutation"] == {
        "prune_to": 0.9,
        "grow_to": 0.8,
        "layers": {"re-indexed": 1},
        "moved": pytest.approx(0.5, abs=0.01),  # from 64 live weights to 128
        "seconds": 0.25,
        "reindex_seconds": 0.125,
        "uploaded_bytes": 0,
    }
    assert run.history[5]["mutation"]["layers"] == {"unchanged": 1}


def test_the_step_gets_the_recipes_rates_and_mutations():
    step = SoftmaxStep()
    recipe = replace(RECIPE, warmup_epochs=1)
    Trainer(step, recipe).fit(TRAIN, TEST)
    assert step.rates == [recipe.lr_at(epoch, index, 12) for epoch in range(6) for index in range(12)]
    assert step.mutations == [(0.9, 0.8)] * 3 + [(0.9, 0.9)] * 2


def test_the_run_folder_holds_everything_needed_to_repeat_the_run(tmp_path):
    folder = tmp_path / "deep" / "run"
    run = Trainer(SoftmaxStep(), RECIPE, folder).fit(TRAIN, TEST)
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.safetensors",
        "checkpoint.previous.safetensors",
        "checkpoint.safetensors",
        "lock",
        "metrics.jsonl",
        "recipe.json",
        "run.json",
        "verdict.json",
    ]
    assert Recipe.from_dict(json.loads((folder / "recipe.json").read_text())) == run.recipe
    facts = json.loads((folder / "run.json").read_text())
    assert (
        facts["seed"] == 0
        and facts["step"]["target"] == "local"
        and set(facts["versions"]) == {"mest-compile", "numpy"}
    )
    assert facts["data"]["train"]["examples"] == 200 and facts["machine"]["machine"]
    assert lines(folder) == run.history
    assert extra_of(folder / "checkpoint.safetensors")["epoch"] == 6


def test_best_is_never_a_model_denser_than_its_target(tmp_path, monkeypatch):
    recipe = Recipe(4, "em_s", lr=0.05, mutate_every=1, phases=(Phase(3, 0.9, 0.5), Phase(4, 0.9, 0.9)))
    step = SoftmaxStep()
    accuracies = iter([0.5, 0.9, 1.0, 0.7])
    monkeypatch.setattr(loop, "judge_all", lambda *_: {"test_accuracy": next(accuracies), "evaluation_seconds": 0.0})
    run = Trainer(step, recipe, tmp_path / "run").fit(TRAIN, TEST)
    assert run.best == {"epoch": 4, "test_accuracy": 0.7}
    assert extra_of(tmp_path / "run" / "best.safetensors")["epoch"] == 4


@pytest.mark.parametrize(("latest", "epoch"), [(False, 2), (True, 3)])
def test_of_equally_good_models_the_first_or_where_it_is_wanted_the_last_is_the_best(
    latest, epoch, tmp_path, monkeypatch
):
    accuracies = iter([0.5, 0.9, 0.9, 0.7])
    monkeypatch.setattr(loop, "judge_all", lambda *_: {"test_accuracy": next(accuracies), "evaluation_seconds": 0.0})
    trainer = Trainer(SoftmaxStep(), Recipe(4, "static", lr=0.05), tmp_path / "run")
    trainer.judge.latest = latest
    assert trainer.fit(TRAIN, TEST).best == {"epoch": epoch, "test_accuracy": 0.9}
    assert extra_of(trainer.folder.best)["epoch"] == epoch


def test_a_last_epoch_that_is_the_best_is_written_once(tmp_path, monkeypatch):
    accuracies, written = iter([0.5, 0.9, 0.7]), []
    monkeypatch.setattr(loop, "judge_all", lambda *_: {"test_accuracy": next(accuracies), "evaluation_seconds": 0.0})
    step = SoftmaxStep()
    save = step.save
    step.save = lambda path, *others: written.append(path.name) or save(path, *others)
    trainer = Trainer(step, Recipe(3, "static", lr=0.05), tmp_path / "run")
    trainer.fit(TRAIN, TEST)
    best, last = "best.safetensors", "checkpoint.safetensors"
    assert written == [last, best, best, last]  # before training, after each epoch
    assert extra_of(trainer.folder.best)["epoch"] == extra_of(trainer.folder.previous)["epoch"] == 2
    assert extra_of(trainer.folder.checkpoint)["epoch"] == 3


def test_evaluation_counts_every_test_example_and_can_be_rarer():
    step = SoftmaxStep()
    run = Trainer(step, replace(RECIPE, eval_every=4)).fit(TRAIN, TEST)
    assert [metrics["test_accuracy"] is None for metrics in run.history] == [True, True, True, False, True, False]
    images = (TEST[0] - TRAIN[0].mean()) / TRAIN[0].std()
    assert run.test_accuracy == (step.predict(images).argmax(1) == TEST[1]).mean()


@pytest.mark.parametrize("stop", [(1, 1), (3, 5), (4, 12), (6, 12)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stop):
    whole = SoftmaxStep()
    wanted = Trainer(whole, RECIPE, tmp_path / "whole").fit(TRAIN, TEST)
    with pytest.raises(KeyboardInterrupt):
        Trainer(SoftmaxStep(), RECIPE, tmp_path / "run", Interrupter(*stop, interrupt)).fit(TRAIN, TEST)
    assert extra_of(tmp_path / "run" / "checkpoint.safetensors")["epoch"] == stop[0] - 1
    step = SoftmaxStep(seed=5)
    run = Trainer.resume(tmp_path / "run", step).fit(TRAIN, TEST)
    assert without_clock(run.history) == without_clock(wanted.history) and run.best == wanted.best
    assert lines(tmp_path / "run") == run.history
    for name, array in whole.state.items():
        assert (step.state[name] == array).all(), name
    best = [SoftmaxStep(), SoftmaxStep()]
    for one, folder in zip(best, ("whole", "run"), strict=True):
        one.restore(tmp_path / folder / "best.safetensors")
    assert all((best[0].state[name] == best[1].state[name]).all() for name in whole.state)


def test_a_real_signal_leaves_the_last_whole_epoch(tmp_path):
    stop = Interrupter(2, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job inherits that the signal is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            Trainer(SoftmaxStep(), RECIPE, tmp_path / "run", stop).fit(TRAIN, TEST)
    finally:
        signal.signal(signal.SIGINT, before)
    assert extra_of(tmp_path / "run" / "checkpoint.safetensors")["epoch"] == 1


def test_lines_after_the_checkpoint_go_when_a_run_resumes(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Trainer(SoftmaxStep(), RECIPE, tmp_path / "run", Interrupter(3, 1, interrupt)).fit(TRAIN, TEST)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "loss": 1.0}\n{"epo')
    run = Trainer.resume(tmp_path / "run", SoftmaxStep()).fit(TRAIN, TEST)
    assert lines(tmp_path / "run") == run.history


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    wanted = Trainer(SoftmaxStep(), RECIPE, tmp_path / "run").fit(TRAIN, TEST)
    step = SoftmaxStep()
    run = Trainer.resume(tmp_path / "run", step).fit(TRAIN, TEST)
    assert run.history == wanted.history and not step.rates


def test_a_finished_run_goes_on_for_more_epochs(tmp_path):
    for folder in ("whole", "run"):
        ended = Trainer(SoftmaxStep(), RECIPE, tmp_path / folder).fit(TRAIN, TEST)
    step = SoftmaxStep(seed=5)
    wanted = Trainer.resume(tmp_path / "whole", step, epochs=9).fit(TRAIN, TEST)
    assert without_clock(wanted.history[:6]) == without_clock(ended.history) and len(wanted.history) == 9
    longer = replace(RECIPE, epochs=9, phases=(Phase(4, 0.9, 0.8), Phase(9, 0.9, 0.9)))
    assert step.rates == [longer.lr_at(epoch, index, 12) for epoch in (6, 7, 8) for index in range(12)]
    assert step.mutations == [(0.9, 0.9)] * 3
    assert lines(tmp_path / "whole") == wanted.history
    assert wanted.recipe.epochs == 9 and extra_of(tmp_path / "whole" / "checkpoint.safetensors")["continued"] == [
        {"after_epoch": 6, "epochs": 9, "batch": 16, "target": "local"}
    ]
    # One that is stopped on the way, even in its first epoch, still knows that it goes on.
    for stop in ((7, 1), (8, 5)):
        trainer = Trainer.resume(tmp_path / "run", SoftmaxStep(), Interrupter(*stop, interrupt), epochs=stop[0] + 1)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(TRAIN, TEST)
        assert Trainer.resume(tmp_path / "run", SoftmaxStep()).recipe.epochs == stop[0] + 1
    again = SoftmaxStep(seed=7)
    run = Trainer.resume(tmp_path / "run", again).fit(TRAIN, TEST)
    assert len(run.history) == 9
    run = Trainer.resume(tmp_path / "run", SoftmaxStep(), epochs=10).fit(TRAIN, TEST)
    assert len(run.history) == len(lines(tmp_path / "run")) == 10 and run.recipe.epochs == 10


def test_a_longer_run_that_is_stopped_goes_on_bit_for_bit(tmp_path):
    for folder in ("whole", "run"):
        Trainer(SoftmaxStep(), RECIPE, tmp_path / folder).fit(TRAIN, TEST)
    whole, step = SoftmaxStep(), SoftmaxStep(seed=5)
    wanted = Trainer.resume(tmp_path / "whole", whole, epochs=9).fit(TRAIN, TEST)
    trainer = Trainer.resume(tmp_path / "run", SoftmaxStep(), Interrupter(8, 3, interrupt), epochs=9)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(TRAIN, TEST)
    run = Trainer.resume(tmp_path / "run", step).fit(TRAIN, TEST)
    assert without_clock(run.history) == without_clock(wanted.history)
    assert all((step.state[name] == array).all() for name, array in whole.state.items())


def test_a_run_is_not_made_shorter_and_needs_something_left_to_train(tmp_path):
    Trainer(SoftmaxStep(), RECIPE, tmp_path / "run").fit(TRAIN, TEST)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for epochs in (3, 6):
        with pytest.raises(UsageError, match=f"the run has 6 epochs, of which 6 are made; .* not {epochs}"):
            Trainer.resume(tmp_path / "run", SoftmaxStep(), epochs=epochs)
    with pytest.raises(UsageError, match="epochs is 0"):
        Trainer.resume(tmp_path / "run", SoftmaxStep(), epochs=0)
    with pytest.raises(UsageError, match="the step that is given has its batch already"):
        Trainer.resume(tmp_path / "run", SoftmaxStep(), epochs=9, batch=8)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_sieve_acts_in_a_longer_run_when_it_would_have(tmp_path):
    recipe = replace(LEARNABLE, sieve=SieveRule(drop=0.2)).resolved(0.9)
    assert [recipe.longer(60).sieve.due(epoch, 60) for epoch in range(6)] == [
        recipe.sieve.due(epoch, 6) for epoch in range(6)
    ]
    assert not any(recipe.longer(60).sieve.due(epoch, 60) for epoch in range(6, 60))


def test_a_step_is_rebuilt_from_the_checkpoint_when_none_is_given(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        Trainer(SoftmaxStep(), RECIPE, tmp_path / "run", Interrupter(2, 1, interrupt)).fit(TRAIN, TEST)
    monkeypatch.setattr(opening, "load", lambda path: SoftmaxStep(seed=path.stat().st_size))
    assert len(Trainer.resume(tmp_path / "run").fit(TRAIN, TEST).history) == 6


def test_a_folder_with_a_run_is_never_overwritten(tmp_path):
    Trainer(SoftmaxStep(), RECIPE, tmp_path / "run").fit(TRAIN, TEST)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    step = SoftmaxStep()
    with pytest.raises(UsageError, match="pass --resume or another --out"):
        Trainer(step, RECIPE, tmp_path / "run").fit(TRAIN, TEST)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} and not step.rates


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the run"):
        Trainer(SoftmaxStep(), RECIPE, tmp_path / "file" / "run").fit(TRAIN, TEST)


def test_what_cannot_be_resumed_says_why(tmp_path):
    with pytest.raises(StateError, match="holds no run: recipe.json cannot be read"):
        Trainer.resume(tmp_path, SoftmaxStep())
    Trainer(SoftmaxStep(), RECIPE, tmp_path / "run").fit(TRAIN, TEST)
    with pytest.raises(StateError, match="this is other data"):
        Trainer.resume(tmp_path / "run", SoftmaxStep()).fit(sample(200, seed=8), TEST)
    order = np.random.default_rng(0).permutation(50)
    with pytest.raises(StateError, match="trained on test set; this is other data: test set, 50 examples"):
        Trainer.resume(tmp_path / "run", SoftmaxStep()).fit(TRAIN, (TEST[0], TEST[1][order]))
    with pytest.raises(StateError, match="its own data, labels and order included"):
        Trainer.resume(tmp_path / "run", SoftmaxStep()).fit((TRAIN[0], TRAIN[1][::-1]), TEST)
    path = tmp_path / "run" / "recipe.json"
    text = path.read_text()
    path.write_text(text.replace('"lr": 0.05', '"lr": 0.06'))
    with pytest.raises(StateError, match="undo the edit"):
        Trainer.resume(tmp_path / "run", SoftmaxStep())
    path.write_text(text[:40])
    with pytest.raises(StateError, match="is damaged"):
        Trainer.resume(tmp_path / "run", SoftmaxStep())


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_with_its_place(tmp_path, loss):
    class Diverging(SoftmaxStep):
        def __call__(self, images, labels, lr=0.1, ahead=None):
            result = super().__call__(images, labels, lr)
            return replace(result, loss=loss) if len(self.rates) == 17 else result

    with pytest.raises(MestError, match=r"at epoch 2, batch 5, learning rate .*; lower lr"):
        Trainer(Diverging(), RECIPE, tmp_path / "run").fit(TRAIN, TEST)
    assert extra_of(tmp_path / "run" / "checkpoint.safetensors")["epoch"] == 1
    assert len(lines(tmp_path / "run")) == 1


class Poisoned(SoftmaxStep):
    """Its losses stay finite while one weight or one momentum does not, after some batch."""

    def __init__(self, batch, name, value):
        super().__init__()
        self.at, self.name, self.value = batch, name, value

    def __call__(self, images, labels, lr=0.1, ahead=None):
        result = super().__call__(images, labels, lr)
        if len(self.rates) == self.at:
            self.state[self.name][0] = self.value
        return replace(result, loss=1.0)


@pytest.mark.parametrize(("name", "value"), [("weight", math.nan), ("weight", -math.inf), ("momentum", math.inf)])
@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (24, "Epoch 1 is the last whole one, .*checkpoint.safetensors holds the model after it"),
        (12, "No epoch is whole, .*checkpoint.safetensors holds the model before training"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_whose_weights_are_no_numbers_is_no_success_however_good_its_loss(tmp_path, name, value, batch, said):
    with pytest.raises(MestError, match=f"{name} is not finite after epoch .*, learning rate .*; lower lr .*{said}"):
        Trainer(Poisoned(batch, name, value), LEARNABLE, tmp_path / "run").fit(TRAIN, TEST)
    for path in (tmp_path / "run").glob("*.safetensors"):
        step = SoftmaxStep()
        step.restore(path)
        assert not step.not_finite(), path
    run = Trainer.resume(tmp_path / "run", SoftmaxStep()).fit(TRAIN, TEST)
    assert len(run.history) == 6


def test_a_model_that_holds_nan_is_not_trained(tmp_path):
    step = SoftmaxStep()
    step.state["weight"][3] = math.nan
    with pytest.raises(MestError, match="weight is not finite before training"):
        Trainer(step, RECIPE, tmp_path / "run").fit(TRAIN, TEST)
    assert not step.rates and not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_every_array_that_a_checkpoint_holds_is_looked_at(compiled):
    arrays = {name: compiled._state.get(name) for name in compiled._state.own()}
    assert compiled.not_finite() == [] and len(arrays) > 6
    for name, array in arrays.items():
        compiled._state.put(name, np.where(np.arange(array.size) == array.size - 1, np.inf, array).astype(array.dtype))
        assert compiled.not_finite() == [name]
        compiled._state.put(name, array)


def test_an_answer_that_is_no_number_is_no_right_one():
    class Lost(SoftmaxStep):
        def predict(self, images):
            return np.full((len(images), 10), np.nan, np.float32)

    trainer = Trainer(Lost(), RECIPE)
    data = as_dataset((TEST[0], np.zeros(len(TEST[1]), int)), classes=10)
    assert evaluate(trainer.step, trainer.judge, data)["test_accuracy"] == 0.0


@pytest.fixture(scope="module")
def compiled():
    """A small compiled step whose optimizer was given a rate."""
    import mest_compile as mest
    from mest_compile.models.catalog import build_model

    return mest.compile(
        build_model("mlp", (16, 1, 8, 8), 10, 16, 0),
        (16, 1, 8, 8),
        scheme="unstructured",
        sparsity=0.5,
        threads=1,
        optimizer=SGD(lr=1e-4, momentum=0.8),
    )


def test_the_rate_is_the_optimizers_where_the_recipe_has_none(compiled, tmp_path):
    import mest_compile as mest

    plain = Recipe(1, "static", lr_schedule="constant")
    run = Trainer(compiled, plain).fit(TRAIN, TEST)
    assert run.history[0]["lr"] == run.recipe.lr == 1e-4
    assert Trainer(compiled, replace(plain, lr=1e-4)).recipe.lr == 1e-4
    with pytest.raises(
        UsageError, match="the recipe's lr is 0.05, that of the optimizer .* 0.0001; leave one of the two out"
    ):
        Trainer(compiled, replace(plain, lr=0.05))
    compiled.save(tmp_path / "step.safetensors")  # a step from a file can be trained on at another rate
    assert Trainer(mest.load(tmp_path / "step.safetensors"), replace(plain, lr=0.05)).recipe.lr == 0.05
    assert Trainer(mest.load(tmp_path / "step.safetensors"), plain).recipe.lr == 1e-4
    assert Trainer(SoftmaxStep(), plain).recipe.lr == 0.1


def test_what_is_no_recipe_is_one_line():
    with pytest.raises(UsageError, match="recipe is a dict; wanted a mest.Recipe"):
        Trainer(SoftmaxStep(), {"epochs": 1})


def test_a_run_says_what_its_data_go_through_and_what_never_happens(caplog):
    caplog.set_level("INFO", "mest_compile.training.loop")
    Trainer(SoftmaxStep(), Recipe(1, "em", lr=0.05)).fit(TRAIN, TEST)
    assert (
        "training set: 200 examples to train, 50 to test; images not augmented; method "
        "em; lr 0.05, cosine; "
        "the method 'em' mutates between epochs: in 1 epoch it never does"
    ) in caplog.text
    data = as_dataset(TRAIN), as_dataset(TEST)
    known = replace(data[0], shift=True, flip=True)
    assert "images shifted by up to 1 pixels, mirrored" in Trainer(SoftmaxStep(), RECIPE).about(known, data[1])
    assert "images not shifted, mirrored" in Trainer(SoftmaxStep(), replace(RECIPE, mirror=True)).about(*data)
    assert "images not augmented" in Trainer(SoftmaxStep(), LEARNABLE).about(*data)


@pytest.mark.parametrize(
    ("mirror", "known", "wanted"), [(None, False, False), (None, True, True), (True, False, True), (False, True, False)]
)
def test_images_are_mirrored_where_that_is_known_to_be_right_or_asked_for(mirror, known, wanted):
    shown = []

    class Seeing(SoftmaxStep):
        def __call__(self, images, labels, lr=0.1, ahead=None):
            shown.extend(images.copy())
            return super().__call__(images, labels, lr)

    images = np.zeros((64, 1, 8, 8), np.float32)
    images[:, :, 2:6, 5] = 1  # to the right, and a shift by one pixel leaves it there
    data = Dataset.of(images, np.arange(64) % 10, "arrows", flip=known)
    Trainer(Seeing(), Recipe(1, "static", lr=0.01, mirror=mirror)).fit(data, data)
    left = [image[0, :, :4].any() for image in shown]
    assert any(left) == wanted and not all(left)


def test_images_with_their_channels_last_are_told_apart(tmp_path):
    step = SoftmaxStep(shape=(16, 3, 8, 6))
    images = np.zeros((40, 8, 6, 3), np.uint8)
    with pytest.raises(
        InputError,
        match=r"takes images of shape \(3, 8, 6\), .* has \(8, 6, 3\); their channels are last: "
        r"give images.transpose\(0, 3, 1, 2\)",
    ):
        Trainer(step, RECIPE, tmp_path / "run").fit((images, np.arange(40) % 10), (images, np.arange(40) % 10))


def test_less_than_a_batch_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="training set: 15 examples do not fill one batch of 16"):
        Trainer(SoftmaxStep(), RECIPE, tmp_path / "run").fit((TRAIN[0][:15], TRAIN[1][:15]), TEST)
    assert not (tmp_path / "run").exists()


def test_data_that_do_not_fit_the_step_are_refused_before_anything_is_written(tmp_path):
    trainer = Trainer(SoftmaxStep(shape=(16, 1, 9, 9)), RECIPE, tmp_path / "run")
    with pytest.raises(
        InputError, match=r"shape \(1, 9, 9\), training set has \(1, 8, 8\); compile with input_shape=\(16, 1, 8, 8\)"
    ):
        trainer.fit(TRAIN, TEST)
    with pytest.raises(InputError, match="tells 4 classes apart, training set has 10"):
        Trainer(SoftmaxStep(classes=4), RECIPE, tmp_path / "run").fit(as_dataset(TRAIN, name="training set"), TEST)
    assert not (tmp_path / "run").exists()


def test_a_step_on_features_gets_flat_images():
    run = Trainer(SoftmaxStep(shape=(16, 64)), LEARNABLE).fit(TRAIN, TEST)
    assert run.test_accuracy > CHANCE and run.folder is None


def test_a_dense_step_needs_the_static_method():
    with pytest.raises(SparsityError, match="use method 'static'"):
        Trainer(SoftmaxStep(sparsity=0.0), Recipe(2))
    run = Trainer(SoftmaxStep(sparsity=0.0), Recipe(2, "static", lr=0.05)).fit(TRAIN, TEST)
    assert all(metrics["mutation"] is None for metrics in run.history)


def test_the_target_of_uneven_layers_is_that_of_all_their_weights():
    step = types.SimpleNamespace(
        describe=lambda: {"sparsity": {"a": 0.95, "b": 0.5, "dense": 0.0}},
        masks=lambda: {"a": np.ones((8, 100)), "b": np.ones((2, 100))},
    )
    assert target_sparsity(step) == 0.86
    assert target_sparsity(types.SimpleNamespace(describe=lambda: {"sparsity": {"dense": 0.0}}, masks=dict)) == 0.0


def test_progress_hears_of_every_batch_and_epoch():
    class Listener:
        def __init__(self):
            self.batches, self.epochs = [], []

        def on_batch(self, *facts):
            self.batches.append(facts[:4])

        def on_epoch(self, metrics):
            self.epochs.append(metrics["epoch"])

    listener = Listener()
    Trainer(SoftmaxStep(), RECIPE, progress=listener).fit(TRAIN, TEST)
    assert listener.batches == [(epoch, 6, batch, 12) for epoch in range(1, 7) for batch in range(1, 13)]
    assert listener.epochs == [1, 2, 3, 4, 5, 6]


class AnyBatch(SoftmaxStep):
    """One that takes fewer examples, and says of how many it was told before."""

    def __init__(self, shape=(16, 1, 8, 8)):
        super().__init__(shape)
        self.whole_batches, self.prepared, self.sizes = False, [], []

    def prepare(self, examples):
        self.prepared.append(examples)

    def __call__(self, images, labels, lr=0.1, ahead=None):
        self.sizes.append(len(images))
        assert ahead is None or len(ahead[0]) in (self.batch, *self.prepared)
        return super().__call__(images, labels, lr, ahead)


def test_an_epoch_is_of_all_examples_unless_the_last_are_to_be_left_out():
    static, images = Recipe(epochs=1, method="static"), (TRAIN[0][:39], TRAIN[1][:39])
    step = AnyBatch()
    metrics = Trainer(step, static).fit(images, TEST).history[0]
    assert step.sizes == [16, 16, 7] and step.prepared == [7]
    assert (metrics["examples"], metrics["iterations"], metrics["iterations_saved"]) == (39, 3, 0)
    dropping = AnyBatch()
    metrics = Trainer(dropping, replace(static, drop_last=True)).fit(images, TEST).history[0]
    assert dropping.sizes == [16, 16] and not dropping.prepared and metrics["examples"] == 32
    whole = Trainer(SoftmaxStep(), static)
    assert whole.recipe.drop_last is True and whole.fit(images, TEST).history[0]["examples"] == 32
    loaded = AnyBatch()
    loaded.prepared = [7]  # how many a loader gives is known when it has given them
    halves = [(images[0][part].astype(np.float32) / 255, images[1][part]) for part in (slice(20), slice(20, 39))]
    assert Trainer(loaded, replace(static, augment=None)).fit(halves).history[0]["examples"] == 39
    assert loaded.sizes == [16, 16, 7]
    few = AnyBatch((64, 1, 8, 8))
    assert Trainer(few, static).fit(images, TEST).history[0]["examples"] == 39 and few.sizes == [39]


def test_the_loss_of_an_epoch_is_a_mean_over_its_examples():
    class Counting(AnyBatch):
        def __call__(self, images, labels, lr=0.1, ahead=None):
            return replace(super().__call__(images, labels, lr, ahead), loss=float(len(images)))

    images = TRAIN[0][:39], TRAIN[1][:39]
    metrics = Trainer(Counting(), Recipe(epochs=1, method="static")).fit(images, TEST).history[0]
    assert metrics["loss"] == pytest.approx((16 * 16 * 2 + 7 * 7) / 39)


def test_what_a_step_cannot_take_is_refused_and_a_run_of_before_goes_on_as_it_began(tmp_path):
    with pytest.raises(UsageError, match="takes 16 examples at a time and has no compiler"):
        Trainer(SoftmaxStep(), replace(RECIPE, drop_last=False))
    Trainer(AnyBatch(), replace(RECIPE, drop_last=True), tmp_path).fit(TRAIN, TEST)
    recipe = RunFolder(tmp_path).recipe
    told = json.loads(recipe.read_text())
    assert told.pop("drop_last") is True
    recipe.write_text(json.dumps(told))
    assert Trainer.resume(tmp_path, AnyBatch()).recipe.drop_last is True


def test_seeds_change_a_run_and_nothing_else_does():
    losses = [
        [metrics["loss"] for metrics in Trainer(SoftmaxStep(), replace(RECIPE, seed=seed)).fit(TRAIN, TEST).history]
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.rewrite_metrics([{"epoch": 1}])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StateError, match="cannot be written: No space left on device; .* go on with --resume"):
        folder.rewrite_metrics([{"epoch": 1}, {"epoch": 2}])
    assert lines(tmp_path) == [{"epoch": 1}]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a file of Linux that is always full")
def test_a_full_disk_stops_the_run_with_its_last_epoch_intact(tmp_path):
    folder = tmp_path / "run"

    class Filling(Interrupter):
        def on_batch(self, *facts):
            if facts[:1] == (3,) and facts[2] == 1:
                (folder / "metrics.jsonl").unlink()
                (folder / "metrics.jsonl").symlink_to("/dev/full")

    with pytest.raises(StateError, match="metrics.jsonl cannot be written: No space left on device"):
        Trainer(SoftmaxStep(), RECIPE, folder, Filling(0, 0, None)).fit(TRAIN, TEST)
    assert extra_of(folder / "checkpoint.safetensors")["epoch"] == 2
    step, whole = SoftmaxStep(), SoftmaxStep()
    run = Trainer.resume(folder, step).fit(TRAIN, TEST)
    wanted = Trainer(whole, RECIPE).fit(TRAIN, TEST)
    assert without_clock(run.history) == without_clock(wanted.history) and not (folder / "metrics.jsonl").is_symlink()
    assert all((step.state[name] == whole.state[name]).all() for name in whole.state)


class CheckedStep(SoftmaxStep):
    """Its checkpoints are mest_compile's own."""

    def save(self, path, extra, arrays=None):
        checkpoint.write(path, {**self.state, **(arrays or {})}, {"extra": extra})

    def restore(self, path):
        arrays, facts = checkpoint.read(path)
        self.state = {name: arrays.pop(name) for name in self.state}
        return facts["extra"], arrays


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # of an array: the file can still be parsed
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def lose(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, lose])
def test_a_damaged_checkpoint_costs_an_epoch_and_not_the_run(tmp_path, damage, caplog):
    whole = CheckedStep()
    wanted = Trainer(whole, RECIPE).fit(TRAIN, TEST)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        Trainer(CheckedStep(), RECIPE, folder, Interrupter(5, 3, interrupt)).fit(TRAIN, TEST)
    damage(folder / "checkpoint.safetensors")
    trainer = Trainer.resume(folder, step := CheckedStep(seed=3))
    assert "the run goes on from the one before it" in caplog.text
    run = trainer.fit(TRAIN, TEST)
    assert without_clock(run.history) == without_clock(wanted.history) and lines(folder) == run.history
    assert all((step.state[name] == whole.state[name]).all() for name in whole.state)
    assert checkpoint.read(folder / "checkpoint.previous.safetensors")[1]["extra"]["epoch"] == 5

    for path in folder.glob("checkpoint*"):
        damage(path)
    with pytest.raises(
        StateError, match=r"checkpoint\.safetensors is damaged|no checkpoint|checkpoint.previous.safetensors is damaged"
    ):
        Trainer.resume(folder, CheckedStep())


def test_without_hard_links_the_previous_checkpoint_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    Trainer(SoftmaxStep(), RECIPE, tmp_path / "run").fit(TRAIN, TEST)
    assert extra_of(tmp_path / "run" / "checkpoint.previous.safetensors")["epoch"] == 5
    assert not list((tmp_path / "run").glob(".*"))


class LosingStep(SoftmaxStep):
    """Is on a device that is lost in the steps of those numbers, and while it reconnects for those times; steps are
    never counted anew."""

    def __init__(self, steps=(), times=()):
        super().__init__()
        self.steps, self.times, self.asked, self.reconnected = set(steps), set(times), 0, 0

    def __call__(self, *batch, **options):
        self.asked += 1
        if self.asked in self.steps:
            raise DeviceLost("device phone is lost: it closed the connection")
        return super().__call__(*batch, **options)

    def reconnect(self):
        self.reconnected += 1
        if self.reconnected in self.times:
            raise DeviceLost("device phone is lost: it closed the connection")


@pytest.mark.parametrize(
    ("step", "blamed"),
    [
        (LosingStep(range(15, 100)), "it is not the link, but the step's kernels"),
        (LosingStep([15], range(1, 100)), "look at the link and at the devices"),
        (LosingStep([15, 16], [2, 3]), "look at the link and at the devices"),
    ],
)
def test_devices_that_are_lost_again_and_again_end_the_run_and_it_is_said_what_is_to_blame(step, blamed, tmp_path):
    with pytest.raises(
        DeviceLost,
        match=f"it closed the connection. {MOST_LOSSES} were lost without a whole epoch in between, .*{blamed}",
    ):
        Trainer(step, LEARNABLE, tmp_path / "run").fit(TRAIN, TEST)
    assert extra_of(tmp_path / "run" / "checkpoint.safetensors")["epoch"] == 1 and step.asked <= 12 + 2 + MOST_LOSSES


def test_as_many_losses_with_whole_epochs_in_between_end_no_run(tmp_path):
    step, batches = LosingStep(), len(TRAIN[0]) // 16
    step.steps = {1 + turn * (batches + 1) for turn in range(LEARNABLE.epochs)}  # the first of every epoch
    run = Trainer(step, LEARNABLE, tmp_path / "run").fit(TRAIN, TEST)
    assert step.reconnected == LEARNABLE.epochs > MOST_LOSSES
    assert without_clock(run.history) == without_clock(
        Trainer(SoftmaxStep(), LEARNABLE, tmp_path / "whole").fit(TRAIN, TEST).history
    )


def test_a_run_prints_the_sparsity_of_all_weights_together():
    class Two(SoftmaxStep):
        def masks(self):
            return super().masks() | {"small": np.ones(160, bool)}

        def sparsity(self):
            return super().sparsity() | {"small": 0.0}

        def describe(self):
            return super().describe() | {"sparsity": {"weight": 0.9, "small": 0.0}}

    said = StringIO()
    step = Two()
    with TrainingProgress(Console(file=said, width=200), step.batch, METRICS["accuracy"]) as progress:
        run = Trainer(step, Recipe(1, "static", lr=0.05), progress=progress).fit(TRAIN, TEST)
    assert run.history[0]["overall_sparsity"] == 0.72 and " 0.720" in said.getvalue().splitlines()[1]

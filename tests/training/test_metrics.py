"""Metrics: what each is, and runs that are judged by those of their loss: progress, files, reports, best models, the
sieve."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import DataError, InputError, MestError, UsageError
from mest_compile.data import as_dataset
from mest_compile.operators.losses.loss import LOSSES
from mest_compile.training.metrics import METRICS, Score, compared, metrics_of
from mest_compile.training.predicting import evaluated
from mest_compile.training.reporting import write_report
from mest_compile.training.runfolder import RunFolder
from mest_compile.training.sieve import SieveRule

BATCH, FEATURES = 16, 12


def drawn(name, shape, rng):
    outputs = rng.standard_normal(shape).astype(np.float32).round(1)  # ties
    if name in ("accuracy", "top5"):
        labels = rng.integers(0, shape[1], (shape[0], *shape[2:]))
        labels[0] = -1
        return outputs, labels
    if name in ("mae", "mse"):
        return outputs, rng.standard_normal(shape).astype(np.float32)
    return outputs, (rng.random(shape) < 0.4).astype(np.float32)


def by_hand(name, outputs, targets):
    """One answer after another, in Python's numbers."""
    if name in ("accuracy", "top5"):
        scores = np.moveaxis(outputs, 1, -1).reshape(-1, outputs.shape[1]).tolist()
        top, right, counted = (1 if name == "accuracy" else 5), 0, 0
        for answer, label in zip(scores, targets.ravel().tolist(), strict=True):
            if label >= 0:
                ranked = sorted(range(len(answer)), key=lambda k, answer=answer: -answer[k])  # stable
                right, counted = right + (label in ranked[:top]), counted + 1
        return right / counted
    given, wanted = outputs.astype(float).ravel(), targets.astype(float).ravel()
    if name == "mae":
        return torch.nn.functional.l1_loss(torch.from_numpy(given), torch.from_numpy(wanted)).item()
    if name == "mse":
        return torch.nn.functional.mse_loss(torch.from_numpy(given), torch.from_numpy(wanted)).item()
    said = given > 0
    if name == "label_accuracy":
        return float((said == wanted.astype(bool)).mean())
    hits, alarms, misses = (said & (wanted == 1)).sum(), (said & (wanted == 0)).sum(), (~said & (wanted == 1)).sum()
    precision, recall = hits / (hits + alarms), hits / (hits + misses)
    return float(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("shape", [(37, 9), (10, 7, 3, 4)], ids=str)
def test_a_metric_is_what_it_is_by_hand_whatever_the_batches(name, shape):
    outputs, targets = drawn(name, shape, np.random.default_rng(2))
    wanted = by_hand(name, outputs, targets)
    for size in (shape[0], 8):
        score = Score([METRICS[name]])
        for start in range(0, shape[0], size):
            score.add(outputs[start : start + size], targets[start : start + size])
        assert score.values("test_") == {f"test_{name}": pytest.approx(wanted, rel=1e-12)}
    assert METRICS[name].better(0.9, 0.1) == METRICS[name].share


def test_what_is_nan_is_not_right():
    outputs = np.float32([[1, np.nan, 0], [np.nan] * 3, [3, 2, 1]])
    for name in ("accuracy", "top5"):
        sums = METRICS[name].sums(outputs, np.zeros(3, int))
        assert sums.tolist() == [1, 3]
    assert np.isnan(METRICS["mae"].sums(outputs, outputs * 0)).any()


@pytest.mark.parametrize("kind", [LOSSES.find(name) for name in LOSSES.names()])
def test_every_loss_has_metrics(kind):
    few, many = metrics_of(kind(), 5), metrics_of(kind(), 100)
    assert [metric.name for metric in many] == list(kind.metrics) and few[0] is many[0]
    assert METRICS["top5"] not in few


def test_labels_are_compared_as_the_loss_counts_them():
    labels = np.array([3, -100, 255, 0])
    assert compared(mest.CrossEntropy(ignore_index=255), labels).tolist() == [3, -100, -1, 0]
    assert compared(mest.SoftCrossEntropy(), np.eye(3, dtype=np.float32)).tolist() == [0, 1, 2]


# Runs.


class Net(nn.Module):
    def __init__(self, outputs, maps=False):
        super().__init__()
        self.maps = maps
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = nn.Conv2d(8, outputs, 1) if maps else nn.Linear(8, outputs)

    def forward(self, x):
        x = self.conv2(self.bn1(self.conv1(x)).relu()).relu()
        return self.head(x if self.maps else x.mean((2, 3)))


def made(loss, outputs, builder, maps=False, **options):
    torch.manual_seed(0)
    options = {"sparsity": 0.5, "dense_layers": ["conv1", "head"], "threads": 1, "seed": 0, **options}
    return mest.compile(Net(outputs, maps), (BATCH, 1, 6, 6), loss=loss, builder=builder, **options)


def examples(count, labels, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((count, 1, 6, 6)).astype(np.float32)
    images += rng.integers(-1, 2, (count, 1, 1, 1))
    return images, labels(images)


def level(images):
    return images.mean((1, 2, 3))


LABELS = {
    "number": lambda images: level(images),
    "numbers": lambda images: np.stack([level(images), -level(images)], 1),
    "answers": lambda images: np.stack([level(images) > 0, level(images) > 0.5, level(images) < -0.5], 1).astype(int),
    "classes": lambda images: np.digitize(level(images), [-0.5, 0.5]),
    "unknown": lambda images: np.where(np.arange(len(images)) % 5 == 0, -100, LABELS["classes"](images)),
    "void": lambda images: np.where(np.arange(len(images)) % 5 == 0, 255, LABELS["classes"](images)),
    "shares": lambda images: 0.9 * np.eye(3)[LABELS["classes"](images)] + 0.1 / 3,
    "maps": lambda images: (images[:, 0] > 0).astype(int),
}
CLASSES = ("classes", "unknown", "void")  # of an example there is one
KEEP = {"method": "static", "lr": 0.05, "augment": False, "lr_schedule": "constant"}
RUNS = {
    "mse": ("number", 1, {"mse", "mae"}),
    "smooth_l1": ("numbers", 2, {"mae", "mse"}),
    "huber": ("numbers", 2, {"mae", "mse"}),
    "bce": ("answers", 3, {"f1", "label_accuracy"}),
    "cross_entropy:ignore_index=-100": ("unknown", 3, {"accuracy"}),
    "cross_entropy:ignore_index=255,weight=[1,2,1]": ("void", 3, {"accuracy"}),
    "soft_cross_entropy": ("shares", 3, {"accuracy"}),
    "distill:mix=0.25": ("classes", 3, {"accuracy"}),
    "cross_entropy": ("maps", 2, {"accuracy"}),
}


class Watch:
    def __init__(self):
        self.scores, self.lines = [], []

    def on_batch(self, epoch, epochs, batch, batches, loss, correct):
        self.scores.append(correct)

    def on_epoch(self, metrics):
        self.lines.append(metrics)


@pytest.mark.parametrize("loss", RUNS)
def test_a_run_is_judged_by_the_metrics_of_its_loss(loss, builder, tmp_path):
    kind, outputs, wanted = RUNS[loss]
    step, watch = made(loss, outputs, builder, maps=kind == "maps"), Watch()
    train, test = examples(BATCH * 8, LABELS[kind]), examples(40, LABELS[kind], 1)
    teacher = {"teacher": lambda images: 9 * np.eye(3)[LABELS["classes"](images)]} if "distill" in loss else {}
    trainer = mest.Trainer(step, mest.Recipe(5, **KEEP), tmp_path / "run", watch, **teacher)
    run = trainer.fit(train, test)
    main = run.metric
    assert main.name == step.loss.metrics[0] and len(watch.scores) == 5 * 8
    assert all({f"test_{name}" for name in wanted} <= line.keys() for line in watch.lines)
    assert all(line["metric"] == main.name and line[f"train_{main.name}"] is not None for line in watch.lines)
    first, last = run.history[0], run.history[-1]
    assert main.better(last[f"train_{main.name}"], first[f"train_{main.name}"]) and last["loss"] < first["loss"]
    key = f"test_{main.name}"
    best = (max if main.share else min)(line[key] for line in run.history)
    assert run.best[key] == best and run.test_score == last[key]
    outputs_given = step.predict(test[0])
    labels = compared(step.loss, as_dataset(test, **step.loss.labels).labels)
    assert by_hand(main.name, outputs_given, labels) == pytest.approx(run.test_score, rel=1e-6)

    facts = write_report(tmp_path / "run")
    assert facts["metric"] == main.name and facts[key] == run.test_score
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert f"test {main.label}" in page and main.shown(run.test_score) in page
    lines = RunFolder(tmp_path / "run").metrics.read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.history
    again = mest.load(tmp_path / "run" / "best.safetensors")
    assert again.loss == step.loss
    told = evaluated(step, as_dataset(test, **step.loss.labels))
    assert told[main.name] == pytest.approx(run.test_score, rel=1e-6)
    # Which classes are taken for which is told where an example has one class.
    assert RunFolder(tmp_path / "run").verdict.is_file() == ("classes" in told) == (kind in CLASSES)


def test_a_resumed_run_of_numbers_goes_on_bit_for_bit(builder, tmp_path):
    train, test = examples(BATCH * 4, LABELS["numbers"]), examples(20, LABELS["numbers"], 1)
    recipe = mest.Recipe(3, **KEEP)

    class Stop(Watch):
        def on_epoch(self, metrics):
            if metrics["epoch"] == 2:
                raise KeyboardInterrupt

    whole = mest.Trainer(made("huber", 2, builder), recipe, tmp_path / "whole").fit(train, test)
    with pytest.raises(KeyboardInterrupt):
        mest.Trainer(made("huber", 2, builder), recipe, tmp_path / "run", Stop()).fit(train, test)
    run = mest.Trainer.resume(tmp_path / "run").fit(train, test)
    assert [line["test_mae"] for line in run.history] == [line["test_mae"] for line in whole.history]
    assert run.best == whole.best


def test_an_example_of_many_labels_is_forgotten_when_one_of_them_is_wrong(builder):
    step = made("bce", 3, builder)
    trainer = mest.Trainer(step, mest.Recipe(2, sieve=SieveRule(drop=0.25, after_epoch=1), **KEEP))
    outputs, labels = np.float32([[1, -1, 2], [1, 1, 2]]), np.float32([[1, 0, 1], [1, 0, 1]])

    class Result:
        pass

    Result.outputs = outputs
    assert trainer.judge.right(Result, labels).tolist() == [True, False]
    data = examples(BATCH * 8, LABELS["answers"])
    run = trainer.fit(data, data)
    counts = run.history[1]["sieve"]["counts"]
    assert sum(counts.values()) == len(data[0]) and counts["never learned"] < len(data[0])


SIEVED = {"sieve": SieveRule(drop=0.25, after_epoch=1)}
REFUSED = {
    "sieve of numbers": ("mse", 1, SIEVED, {}, "under mest.MSE no answer is right or wrong; leave the sieve out"),
    "sieve of maps": ("cross_entropy", 2, SIEVED, {"maps": True}, "map of labels is hardly ever all right"),
    "shifted maps": ("cross_entropy", 2, {"augment": True}, {"maps": True}, "maps of labels too; set augment = false"),
    "no teacher": ("distill", 3, {}, {}, "mest.Distill needs a teacher: give the Trainer teacher="),
    "a teacher": ("mse", 1, {}, {"teacher": np.zeros}, "a teacher is for loss=mest.Distill"),
    "no function": ("distill", 3, {}, {"teacher": 3}, "teacher is a int; wanted a function from images to logits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_loss_has_no_use_for_is_refused_by_name(case, builder):
    loss, outputs, settings, options, message = REFUSED[case]
    step = made(loss, outputs, builder, maps=options.pop("maps", False))
    with pytest.raises(UsageError, match=message):
        mest.Trainer(step, mest.Recipe(3, **{**KEEP, **settings}), **options)


@pytest.mark.parametrize(
    ("loss", "outputs", "kind", "error", "message"),
    [
        ("mse", 3, "numbers", InputError, r"targets have shape \(64, 2\); mest.MSE takes numbers of shape \(64, 3\)"),
        ("bce", 2, "numbers", InputError, "targets go from .* mest.BCE takes 0 for no"),
        ("cross_entropy", 3, "unknown", InputError, "ignore_index=-100"),
        ("cross_entropy", 2, "classes", DataError, r"labels must be in 0..1, found 0..2"),
        ("cross_entropy", 3, "number", DataError, "labels must be integers, not float32"),
        ("mse", 1, "maps", InputError, r"targets have shape \(64, 6, 6\)"),
    ],
)
def test_data_that_the_loss_cannot_take_are_refused_before_the_first_step(loss, outputs, kind, error, message, builder):
    data = examples(BATCH * 4, LABELS[kind])
    with pytest.raises(error, match=message):
        mest.Trainer(made(loss, outputs, builder), mest.Recipe(3, **KEEP)).fit(data, data)


def test_the_rate_is_the_optimizers_where_the_recipe_has_none(builder):
    step = made("mse", 1, builder, optimizer=mest.AdamW(0.003))
    data = examples(BATCH * 4, LABELS["number"])
    run = mest.Trainer(step, mest.Recipe(2, **{**KEEP, "lr": None})).fit(data, data)
    assert run.recipe.lr == run.history[0]["lr"] == 0.003


def test_a_torch_data_set_of_numbers_and_of_maps_is_read():
    images, numbers = examples(6, LABELS["numbers"])
    listed = list(zip(torch.from_numpy(images), torch.from_numpy(numbers), strict=True))
    np.testing.assert_array_equal(as_dataset(listed, numbers=True).labels, np.float32(numbers))
    maps = LABELS["maps"](images)
    read = as_dataset(list(zip(images, maps, strict=True)))
    np.testing.assert_array_equal(read.labels, maps)
    assert read.classes == 2 and as_dataset(listed, numbers=True).outputs == 2
    with pytest.raises(DataError, match=r"example 1 has shape \(3,\), that of example 0 \(2,\)"):
        as_dataset([listed[0], (images[0], np.zeros(3))], numbers=True)
    with pytest.raises(MestError, match="labels hold NaN or infinity"):
        as_dataset((images, numbers * np.nan), numbers=True)

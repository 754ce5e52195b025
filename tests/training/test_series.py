"""Training on series (N, C, L)."""

import numpy as np
import pytest
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import InputError, UsageError


@pytest.fixture(scope="module")
def step():
    net = nn.Sequential(
        *(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3)),
    )
    return mest.compile(net, (8, 2, 20), scheme="unstructured", sparsity=0.5)


def series(count, channels=2, length=20):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    wave = np.sin(np.arange(length) * (1 + labels[:, None, None]) / 2)
    return (wave + 0.1 * rng.standard_normal((count, channels, length))).astype(np.float32), labels


def test_a_trainer_takes_arrays_of_them(step):
    recipe = mest.Recipe(12, method="static", augment=False, lr=0.3)
    run = mest.Trainer(step, recipe).fit(series(48), series(24))
    assert run.test_accuracy > 0.9
    assert step.predict(series(3)[0]).shape == (3, 3)


def test_nothing_is_shifted_and_what_does_not_fit_is_refused(step):
    with pytest.raises(
        UsageError, match="augmentation shifts images, and the step takes .8, 2, 20., .* augment = false"
    ):
        mest.Trainer(step, mest.Recipe(2, method="static", augment=True))
    trainer = mest.Trainer(step, mest.Recipe(2, method="static"))
    with pytest.raises(InputError, match=r"takes images of shape \(2, 20\), training set has \(1, 20, 2\)"):
        trainer.fit(series(24, 20, 2), series(24, 20, 2))

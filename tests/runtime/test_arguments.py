"""What compiling is given: numbers of any kind are taken, what cannot be meant is one line that says what was
wanted."""

import json
import logging

import numpy as np
import pytest
import torch
from torch import nn

import mest_compile as mest
from mest_compile import compiling, frontend
from mest_compile.base.errors import BudgetError, MestError, SpecError, UnknownName
from mest_compile.frontend import import_model
from mest_compile.ir.graph import LayerSpec
from mest_compile.models.catalog import build_model

SHAPE = (4, 1, 4, 4)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def compiled(**options):
    return mest.compile(
        net(), **{"input_shape": SHAPE, "scheme": "unstructured", "sparsity": 0.5, "threads": 1, **options}
    )


class Foreign:
    def __repr__(self):
        return "a\nthing"


PARAMETER = [nn.Parameter(torch.zeros(1))]
REFUSED = {
    "seed": [-1, 1.5, "0", None, True],
    "threads": [0, 1.5, "all", False],
    "label_smoothing": ["a", 1.0, -0.1, float("nan"), None],
    "grow_to": ["a", -0.1, 1.0, float("nan"), 0.7],
    "memory_budget": [0, 1.5, "64 MoB", True],
    "lower_density": [1, "yes"],
    "sparsity": ["0.5", [0.5], 1.0, float("nan"), {"1": "x"}],
    "dense_layers": [5, "1", [1]],
    "distribution": [5, None, ["erk"]],
    "scheme": [5, None, mest.Block, "blok", ["block"]],
    "optimizer": ["adamm", 0, mest.SGD, torch.optim.SGD(PARAMETER, lr=0.1), torch.optim.AdamW(PARAMETER), {"lr": 0.1}],
    "activations": [16, ["float16"], np.float16, np.zeros(3)],
    "target": [5, None, ["local"]],
    "device": ["x", 0, torch.device("cpu")],
    "builder": ["x", Foreign()],
    "records": ["x", {}],
    "input_shape": [
        (4.7, 1, 4, 4),
        ((4, 1), 4, 4, 4),
        (True, 1, 4, 4),
        "4144",
        ("4", "1", "4", "4"),
        (4, 1, 4, 4, 4),
        (0, 1, 4, 4),
        4,
        None,
        {4: 1, 5: 2},
        np.ones((2, 2), int),
        np.array([4.0, 16.0]),
        (10**12, 16),
    ],
}


@pytest.fixture(scope="module")
def imported():
    return import_model(net(), SHAPE)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_what_cannot_be_meant_is_one_line_that_names_the_argument(name, value, monkeypatch, imported):
    monkeypatch.setattr(frontend, "import_model", lambda model, input_shape: imported)
    monkeypatch.setattr(compiling, "make_step", None)  # nothing may be compiled
    with pytest.raises(MestError, match=name) as caught:
        compiled(**{name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_lower_density_without_a_budget_is_refused():
    with pytest.raises(MestError, match="give one, or leave lower_density out"):
        compiled(lower_density=True)


def test_numbers_of_numpy_are_numbers_down_to_the_checkpoint(tmp_path):
    rule = mest.SGD(lr=np.float32(0.5), momentum=np.float64(0.5), weight_decay=np.float16(0), nesterov=True)
    step = compiled(
        sparsity=np.float32(0.5),
        threads=np.int64(1),
        memory_budget=np.int64(10**9),
        seed=np.uint8(3),
        optimizer=rule,
        label_smoothing=np.float64(0.25),
        grow_to=np.float32(0.25),
        input_shape=np.array(SHAPE),
        scheme=mest.Block(np.int32(4), np.int64(1)),
        dense_layers=("3",),
    )
    json.dumps(step.describe())
    step.save(tmp_path / "a.safetensors")
    loaded = mest.load(tmp_path / "a.safetensors", threads=np.int64(1))
    assert loaded.describe() | {"spared_bytes": step.describe()["spared_bytes"]} == step.describe()
    assert loaded.optimizer == rule and loaded.input_shape == SHAPE
    for name, value in {"threads": 0, "device": "x", "builder": "x"}.items():
        with pytest.raises(MestError, match=name):
            mest.load(tmp_path / "a.safetensors", **{name: value})


@pytest.mark.parametrize(
    "rule",
    [
        {"lr": 1e39},
        {"lr": "a"},
        {"lr": float("nan")},
        {"lr": -1},
        {"momentum": 1},
        {"momentum": None},
        {"weight_decay": float("inf")},
        {"nesterov": 1},
        {"momentum": 0, "nesterov": True},
    ],
)
def test_a_rule_that_float32_cannot_follow_is_refused(rule):
    with pytest.raises(SpecError, match=min(rule)):
        mest.SGD(**rule)


@pytest.mark.parametrize("block", [("a", 1), (4.0, 1), (True, 1), (0, 1), (1, 17)])
def test_a_block_that_is_none_is_refused(block):
    with pytest.raises(MestError, match="Block|block"):
        mest.Block(*block)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 10**6}, BudgetError, r"mlp with a width of 1000000 needs 3,.* MiB, this machine has"),
        ({"width": 10**12}, SpecError, "more weights than torch can count"),
        ({"width": -1.5}, SpecError, "width is -1.5"),
        ({"classes": "a"}, SpecError, "classes is 'a'"),
        ({"seed": -1}, MestError, "seed is -1"),
        ({"input_shape": (8, 4.5)}, SpecError, "input_shape is"),
        ({"name": ["mlp"]}, UnknownName, "no model"),
    ],
)
def test_a_model_beyond_memory_or_of_no_size_is_refused_before_it_is_made(options, error, message):
    with pytest.raises(error, match=message) as caught:
        build_model(**{"name": "mlp", "input_shape": (8, 16), **options})
    assert "\n" not in str(caught.value)


def test_a_step_beyond_memory_is_refused_before_it_is_compiled():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last, self.fc = nn.Conv2d(1, 512, 1), nn.Conv2d(512, 8, 1), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.last(self.conv(x).relu()).mean((2, 3)))

    with pytest.raises(BudgetError, match="the step needs .* MiB, this machine has .* MiB; use a smaller batch"):
        mest.compile(Wide(), (2**15, 1, 64, 64), scheme="dense", sparsity=0, threads=1)


def test_a_weight_of_more_elements_than_31_bits_tell_apart_is_refused():
    with pytest.raises(SpecError, match="wide: the weight has 4,294,967,296 elements"):
        LayerSpec("wide", (2**16, 2**16, 1, 1), (1, 2**16, 1, 1))


def test_what_stays_dense_is_said_when_a_step_is_compiled(caplog):
    with caplog.at_level(logging.WARNING, "mest_compile"):
        compiled(dense_layers=["1", "3"])
    assert [message for message in caplog.messages if "dense are: 1.weight, 3.weight" in message]

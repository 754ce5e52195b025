"""All that a model has and cannot be trained is told in one error, each by its own name and place."""

import pytest
import torch
from onnx import helper
from test_frontend import Calls
from test_onnx_import import CLASSES, ROWS, gemm, node, numbers, write
from torch import nn

from mest_compile.base.errors import Refusal, UnsupportedOperator
from mest_compile.frontend import from_onnx, from_torch

SHAPE = (2, 3, 8, 8)


class Sums(nn.Module):
    def forward(self, x):
        return x.cumsum(2)


class Largest(nn.Module):
    def forward(self, x):
        return x.topk(2, dim=3).values


class Tall(nn.Module):
    """Rank 5 on the way, which no reader knows."""

    def forward(self, x):
        return x.unsqueeze(2).cumprod(2).flip(2).amin(2)


def refused(model, shape=SHAPE):
    with pytest.raises(UnsupportedOperator) as caught:
        (from_onnx if isinstance(model, str) else from_torch)(model, shape)
    assert "\n" not in str(caught.value)
    return caught.value


def test_all_refusals_come_at_once_grouped_and_in_order():
    """No consequence of one is among them: what follows a refused operator is read as if there were a value."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        Sums(),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        Largest(),
        *(Sums() for _ in range(4)),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    error = refused(net)
    assert str(error).startswith(
        "2 operators cannot be trained here: cumsum in layer '1' (Sums), '5', '6' and 2 more; "
        "topk in layer '4' (Largest); supported: add, "
    )
    assert [one.layer for one in error.refused] == ["1", "4", "5", "6", "7", "8"]
    assert error.refused[1] == Refusal("topk", "in layer '4' (Largest)", "topk")


def test_two_layers_are_named_both():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Sums(), Sums(), nn.Flatten(), nn.Linear(256, 5))
    assert str(refused(net)).startswith("cumsum in layer '1' (Sums) and '2' cannot be trained here; supported: ")


def test_operators_between_that_know_no_such_value_are_no_refusals():
    error = refused(nn.Sequential(nn.Conv2d(3, 4, 1), Tall(), nn.Flatten(), nn.Linear(256, 5)))
    operators = {one.operator for one in error.refused}
    assert {"cumprod", "flip", "amin"} <= operators <= {"cumprod", "flip", "amin", "unsqueeze"}


def test_a_layer_whose_weight_is_refused_is_not():
    error = refused(Calls(lambda self, y: torch.conv2d(y, self.part.weight.cumsum(1)), part=nn.Conv2d(4, 4, 1)))
    assert [one.operator for one in error.refused] == ["cumsum"]


def test_what_the_logits_do_not_need_is_not():
    from_torch(Calls(lambda self, y: (y.cumsum(1), y)[1]), SHAPE)


def test_operators_made_of_several_are_refused_once_by_the_name_that_was_called():
    error = refused(Calls(lambda self, y: y.cumsum(2).logsumexp(1, keepdim=True) + y))
    assert [one.operator for one in error.refused][:2] == ["cumsum", "logsumexp"]
    assert len({(one.operator, one.where) for one in error.refused}) == len(error.refused)


def test_reasons_of_different_kinds_come_together():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(192, 5)

        def forward(self, x):
            y = torch.sub(x, x, alpha=2).cumsum(1)
            return self.fc((y * 2 if self.training else y).flatten(1))

    text = str(refused(Net()))
    for words in (
        "in training mode the model does",
        "2 operators cannot be trained here: sub with alpha=2 in the model's own forward (Net); cumsum in the model's ",
    ):
        assert words in text


def test_nodes_of_an_onnx_file(tmp_path):
    nodes = [
        gemm("x w", "h"),
        node("Celu", "h", "a", name="first"),
        node("Relu", "a", "r"),
        helper.make_node("LpNormalization", ["r"], ["n"], name="norm", axis=1),
        node("Celu", "n", "c", name="second"),
        gemm("c v"),
    ]
    error = refused(str(write(tmp_path, nodes, {"w": numbers(7, 12), "v": numbers(CLASSES, 7)})), (ROWS, 12))
    assert str(error).startswith(
        "2 operators cannot be trained here: Celu in node 'first' and 'second'; LpNormalization in node 'norm'; "
    )

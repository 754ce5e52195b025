"""GRU, LSTM and plain recurrent layers: kernels against their float64 references, nets against torch."""

import numpy as np
import pytest
import torch
from test_joins import same_as_torch
from test_operators import assert_close, draw, pack, run, unpack  # noqa: F401  # run is a fixture
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import UnsupportedOperator
from mest_compile.frontend import from_torch
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators import recurrent


def lanes(image, array):
    """(steps, rows, N) of an array [slice, step, row, lane]."""
    found = np.moveaxis(array.reshape(image.slices, image.width, -1, image.vector), 0, 2)
    return found.reshape(*found.shape[:2], -1)[..., : image.batch]


@pytest.mark.parametrize(("cell", "reverse"), [("gru", True), ("lstm", False), ("rnn_tanh", True), ("rnn_relu", False)])
def test_kernels_give_what_the_references_give(run, cell, reverse):  # noqa: F811
    rng, hidden, vector = np.random.default_rng(0), 6, 4
    gates = recurrent.CELLS.find(cell).gates * hidden
    x, y = (Image(rows, 1, 5, 7, halo, vector) for rows, halo in ((gates, (0, 1, 0, 2)), (hidden, (0, 0, 0, 0))))
    values, dy, start = draw(rng, x), draw(rng, y), draw(rng, x)
    weight, bias = (rng.standard_normal(count).astype(np.float32) / 2 for count in (gates * hidden, gates))
    problem = recurrent.Recurrent(x, y, cell, reverse, True)
    room = np.full(problem.kept_elems, 7, np.float32)
    *_, kept, made = run("recurrent.forward", problem, pack(x, values), weight, bias, room, pack(y, dy))
    wanted, told = recurrent.forward_reference(problem, values, weight, bias)
    assert_close(unpack(y, made), wanted, terms=60)
    assert_close(lanes(x, kept), told, terms=60)
    for accumulate in (False, True):
        back = recurrent.RecurrentBackward(problem, y, x, accumulate)
        arrays = [pack(y, dy, 0), pack(x, values), weight, kept, room, pack(x, start, 0)]
        *_, dues, dx = run("recurrent.backward", back, *arrays)
        slopes, due = recurrent.backward_reference(problem, dy, values, weight, lanes(x, kept))
        assert_close(unpack(x, dx, gradient=True), slopes + (start if accumulate else 0), terms=100, scale=10)
        assert_close(lanes(x, dues), due, terms=100, scale=10)
    parameters = recurrent.RecurrentParameters(cell, hidden, 5, x.lanes, vector, True)
    *_, dweight, dbias = run("recurrent.parameters", parameters, kept, dues, np.zeros_like(weight), np.zeros_like(bias))
    found = recurrent.parameters_reference(parameters, lanes(x, kept), lanes(x, dues))
    for got, want in zip((dweight.reshape(gates, hidden), dbias), found, strict=True):
        assert_close(got, want, terms=40, scale=10)


class Spotter(nn.Module):
    """Series of a normed convolution, last values of both kinds of states, two layers, both directions."""

    def __init__(self, kind, **more):
        super().__init__()
        self.rnn = kind(4, 6, batch_first=True, **more)
        self.last = nn.Linear(6 * (1 + self.rnn.bidirectional), 5)

    def forward(self, x):
        y, state = self.rnn(x)
        state = state[0] if isinstance(state, tuple) else state
        y = y[:, -1] + y.mean(1)
        return self.last(y + nn.functional.pad(state[-1], (y.shape[1] - 6, 0)))


KINDS = {
    "gru": (nn.GRU, {"num_layers": 2}),
    "lstm": (nn.LSTM, {"bidirectional": True}),
    "rnn": (nn.RNN, {"bias": False, "nonlinearity": "relu"}),
}


@pytest.mark.filterwarnings("error:The tensor attribute")  # torch's, of what it does itself
@pytest.mark.parametrize(("name", "target"), [("gru", "local"), ("lstm", "local"), ("rnn", "local"), ("gru", "opencl")])
def test_three_steps_equal_torchs(name, target, tmp_path):
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    torch.manual_seed(0)
    kind, more = KINDS[name]
    model = Spotter(kind, **more)
    step = same_as_torch(model, model, (3, 5, 4), tmp_path, target)
    assert 0 < step.masks()["rnn.weight_ih_l0"].mean() < 1  # it was asked for: by dense_layers
    if name == "rnn":
        assert mest.compile(model, (3, 5, 4), "unstructured", 0.5, optimizer=mest.SGD(lr=0.1)).masks() == {}


class Last(nn.Module):
    def __init__(self, rnn, started=False):
        super().__init__()
        self.rnn, self.last, self.started = rnn, nn.Linear(rnn.proj_size or 6, 5), started

    def forward(self, x):
        state = (x[None, :, 0, :1].repeat(1, 1, 6),) if self.started else ()
        return self.last(self.rnn(x, *state)[0][:, -1])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Last(nn.GRU(4, 6, batch_first=True), True), "gru.*a state to begin with, leave it out"),
        (lambda: Last(nn.GRU(4, 6, 2, batch_first=True, dropout=0.5)), "gru.*dropout=0.5 between its layers"),
        (lambda: Last(nn.LSTM(4, 6, batch_first=True, proj_size=3)), "lstm.*proj_size"),
    ],
)
def test_what_is_not_taken_is_told(make, said):
    with pytest.raises(UnsupportedOperator, match=said):
        from_torch(make(), (3, 5, 4))

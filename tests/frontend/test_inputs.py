"""Models of several inputs, of whole numbers, and of one number out, in whole steps: as torch."""

import numpy as np
import pytest
import torch
from test_step import relative
from torch import nn
from torch.nn import functional as F

import mest_compile as mest
from mest_compile.base.errors import InputError, SpecError, UnsupportedOperator, UsageError
from mest_compile.frontend import from_onnx, from_torch

IMAGES, WORDS, NUMBERS = (5, 3, 6, 4), (5, 7), (5, 4)
ROWS = 9


class Mixed(nn.Module):
    """An image, words and numbers, of which one is added to all that is known of the image."""

    def __init__(self):
        super().__init__()
        self.body, self.table = nn.Conv2d(3, 8, 3), nn.Embedding(ROWS, 8, padding_idx=2)
        self.mix, self.last = nn.Linear(20, 8), nn.Linear(8, 1)

    def forward(self, image, words, numbers):
        known = self.body(image).relu().mean((2, 3)) + numbers[:, :1]
        found = torch.cat([known, self.table(words).mean(1), numbers], 1)
        return self.last(self.mix(found).relu()).squeeze(1)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    images, numbers = (rng.standard_normal(shape).astype(np.float32) for shape in (IMAGES, NUMBERS))
    return (images, rng.integers(0, ROWS, WORDS), numbers), rng.standard_normal(5).astype(np.float32)


@pytest.mark.parametrize("target", ["local", "opencl"])
def test_three_steps_equal_torchs(target, tmp_path):
    if target == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    torch.manual_seed(0)
    model, rule = Mixed(), {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0}
    shapes = IMAGES, WORDS, NUMBERS
    step = mest.compile(
        model, shapes, "unstructured", 0.5, dense_layers=["last"], loss="mse", optimizer=mest.SGD(**rule), target=target
    )
    assert step.input_shape == (5, 72 + 7 + 4) and step.output_shape == (5, 1)
    masks = {name: torch.from_numpy(mask) for name, mask in step.masks().items()}
    assert masks.keys() == {"body.weight", "mix.weight"}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in step.state_dict().items()})
    optimizer = torch.optim.SGD(model.parameters(), **rule)
    found = step.gradients(*batch())
    for turn in range(3):
        given, targets = batch(turn)
        optimizer.zero_grad()
        loss = F.mse_loss(model(*map(torch.from_numpy, given)), torch.from_numpy(targets))
        loss.backward()
        for name, mask in masks.items():
            model.get_parameter(name).grad *= mask
        for name, parameter in model.named_parameters() if turn == 0 else ():
            assert relative(found[name], parameter.grad.numpy()) < 1e-5, name
        optimizer.step()
        assert step(given, targets).loss == pytest.approx(loss.item(), rel=1e-5)
    given, _ = batch(9)
    with torch.no_grad():
        wanted = model.eval()(*map(torch.from_numpy, given)).numpy()
    packed = np.concatenate([one.reshape(5, -1) for one in given], 1).astype(np.float32)
    assert relative(step.predict(given)[:, 0], wanted) < 1e-5
    np.testing.assert_array_equal(step.predict(packed), step.predict(given))
    if target == "opencl":
        return
    step.save(tmp_path / "step.safetensors")
    again = mest.load(tmp_path / "step.safetensors")
    np.testing.assert_array_equal(again.predict(given), step.predict(given))
    mest.to_onnx(step, tmp_path / "net.onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert relative(session.run(None, {"input": packed})[0][:, 0], wanted) < 1e-5
    for wrong, said in (
        ((given[0], given[1] + 3, given[2]), "numbers that name rows of table.weight go from"),
        ((given[0], given[2]), "2 inputs came; the model takes 3"),
        ((given[0], given[2], given[2]), r"input 1 has shape \(5, 4\); wanted \(5, 7\)"),
    ):
        with pytest.raises(InputError, match=said):
            step.predict(wrong)
    with pytest.raises(SpecError, match="9 rows|300 rows"):
        mest.compile(nn.Sequential(nn.Embedding(300, 4), nn.Flatten(), nn.Linear(28, 2)), WORDS, activations="bfloat16")


def test_what_cannot_be_is_told(tmp_path):
    with pytest.raises(SpecError, match="forward takes 3: image, words, numbers; give a shape for each"):
        from_torch(Mixed(), IMAGES)
    with pytest.raises(UsageError, match="wanted the same batch for all inputs"):
        mest.compile(Mixed(), (IMAGES, (4, 7), NUMBERS))
    with pytest.raises(SpecError, match="an .onnx file of one input is wanted, input_shape has 2"):
        from_onnx(tmp_path / "net.onnx", (IMAGES, WORDS))

    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Embedding(ROWS, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.table((2 * x).long()).mean(1))

    with pytest.raises(UnsupportedOperator, match="embedding.* of other numbers than the input's"):
        from_torch(Computed(), WORDS)


class Heads(nn.Module):
    """Of torchvision's GoogLeNet: while training a second head, which drops, gives logits beside the first's."""

    def __init__(self, named=False):
        super().__init__()
        self.named, self.body, self.more = named, nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
        self.aux, self.last, self.drop = nn.Linear(8, 5), nn.Linear(8, 5), nn.Dropout(0.5)

    def forward(self, x):
        x = self.body(x).relu().mean((2, 3))
        aux = self.aux(self.drop(x)) if self.training or self.named else None
        x = self.last(F.dropout(self.more(x), 0.0, self.training).relu())
        if self.named:
            return {"aux": aux, "out": x}
        return x if aux is None else (x, aux)


@pytest.mark.parametrize(("named", "output"), [(False, 0), (True, "out")])
def test_one_of_several_outputs_trains_and_heads_beside_it_stay(named, output):
    torch.manual_seed(0)
    model, rng = Heads(named).train(), np.random.default_rng(0)
    step = mest.compile(model, IMAGES, "unstructured", 0.5, output=output, optimizer=mest.SGD(lr=0.1, weight_decay=0.0))
    before = step.state_dict()
    images, labels = rng.standard_normal(IMAGES).astype(np.float32), rng.integers(0, 5, 5)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in before.items()})
    found = model(torch.from_numpy(images))[output]
    loss = F.cross_entropy(found, torch.from_numpy(labels))
    loss.backward()
    gradients = step.gradients(images, labels)
    assert gradients.keys() == {name for name, _ in model.named_parameters() if not name.startswith("aux")}
    for name, gradient in gradients.items():
        wanted = model.get_parameter(name).grad.numpy() * step.masks().get(name, 1)
        assert relative(gradient, wanted) < 1e-5, name
    assert step(images, labels).loss == pytest.approx(loss.item(), rel=1e-5)
    after = step.state_dict()
    assert all(np.array_equal(after[name], before[name]) == name.startswith("aux") for name in after)


def test_several_outputs_are_refused_with_the_way_out():
    with pytest.raises(
        UnsupportedOperator, match=r"training mode the model gives 2 values \(0, 1\).*output=0.*aux_logits"
    ):
        from_torch(Heads(), IMAGES)
    with pytest.raises(SpecError, match="this one returns 2 values; say which they are by output="):
        from_torch(Heads(named=True), IMAGES)
    with pytest.raises(SpecError, match="the model gives no output 'logits'; there are: aux, out"):
        from_torch(Heads(named=True), IMAGES, output="logits")
    with pytest.raises(SpecError, match="an .onnx file is to have one"):
        mest.compile("net.onnx", IMAGES, output="out")
    with pytest.raises(UsageError, match="output is -1; wanted a whole number of 0 or more, an output's name, or None"):
        mest.compile(Heads(), IMAGES, output=-1)


def test_logits_of_one_pixel_are_logits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1))
    step = mest.compile(model, IMAGES, "dense", 0)
    images, labels = np.ones(IMAGES, np.float32), np.arange(5)
    wanted = model(torch.from_numpy(images)).flatten(1)
    assert step.output_shape == (5, 5)
    assert step(images, labels).loss == pytest.approx(
        F.cross_entropy(wanted, torch.from_numpy(labels)).item(), rel=1e-5
    )

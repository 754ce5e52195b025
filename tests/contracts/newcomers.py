"""The plug-ins that CONTRIBUTING.md shows, in steps: test_contributing.py runs this in a copy of the package that has
their files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mest_compile as mest
from mest_compile.data.dataset import load
from mest_compile.hardware.target import find_target
from mest_compile.ir.layouts.batch import Image
from mest_compile.models.catalog import build_model
from mest_compile.operators.flip import Flip, flip_reference

SHAPE = (7, 3, 9, 8)


@pytest.fixture(params=["local", "opencl"])
def target(request):
    if request.param == "opencl":
        pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    return find_target(request.param)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.softsign(self.bn1(self.conv1(x)))
        x = F.softsign(x + x.flip(3))
        return self.fc(F.softsign(self.bn2(self.conv2(x))).mean((2, 3)))


def test_three_steps_of_all_of_them_equal_torch(target, tmp_path):
    """Scheme, loss, optimizer, activation and operator: gradients, steps, and what files find by their names."""
    torch.manual_seed(0)
    # A larger eps than usual: what rounding leaves of a gradient that is 0 would make whole steps.
    net, loss, rule = Net(), nn.PoissonNLLLoss(), mest.Adagrad(lr=0.005, eps=1e-4, weight_decay=1e-3)
    chosen = {"scheme": mest.Pair(), "loss": mest.PoissonNLL(), "optimizer": rule, "dense_layers": ["conv1", "fc"]}
    step = mest.compile(net, SHAPE, sparsity=0.75, target=target, **chosen)
    calls = step.program.calls
    assert {"softsign.backward", "flip"} <= {call.kernel for call in calls}
    assert "softsign" in {getattr(call.problem, "activation", None) for call in calls}  # batch_norm takes it in
    masks = {name: torch.from_numpy(mask) for name, mask in step.masks().items()}
    assert all(torch.equal(mask[::2], mask[1::2]) for mask in masks.values())
    parameters, theirs = (
        dict(net.train().named_parameters()),
        torch.optim.Adagrad(net.parameters(), **{name: getattr(rule, name) for name in ("lr", "eps", "weight_decay")}),
    )
    for name, mask in masks.items():
        parameters[name].data *= mask

    rng = np.random.default_rng(0)
    for turn in range(3):
        images = rng.standard_normal(SHAPE).astype(np.float32)
        counts = rng.poisson(2.0, (SHAPE[0], 5)).astype(np.float32)
        theirs.zero_grad()
        value = loss(net(torch.from_numpy(images)), torch.from_numpy(counts))
        value.backward()
        for name, mask in masks.items():
            parameters[name].grad *= mask
        for name, found in step.gradients(images, counts).items() if turn == 0 else ():
            gradient = parameters[name].grad.numpy()
            assert np.abs(found - gradient).max() <= 1e-4 * np.abs(gradient).max(), name
        theirs.step()
        np.testing.assert_allclose(step(images, counts).loss, value.item(), rtol=1e-4)
    state = step.state_dict()
    for name, parameter in parameters.items():
        np.testing.assert_allclose(state[name], parameter.detach().numpy(), rtol=1e-3, atol=1e-4, err_msg=name)

    step.save(tmp_path / "a.safetensors")
    others = [mest.load(tmp_path / "a.safetensors")]
    if target.device == "cpu":
        step.export(tmp_path / "artifact")
        others.append(mest.open_artifact(tmp_path / "artifact"))
    for name in ("optimizer", "loss", "schemes"):
        assert all(other.describe()[name] == step.describe()[name] for other in others)
    value = step(images, counts).loss
    assert all(other(images, counts).loss == value for other in others)


def test_they_are_public_and_a_loss_has_a_name():
    assert {"Pair", "PoissonNLL", "Adagrad"} <= set(dir(mest))
    assert mest.compile("mlp", (2, 1, 4, 4), loss="poisson").describe()["loss"] == {"name": "poisson"}


@pytest.mark.parametrize("knobs", [{}, {"unroll": 2}], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_the_kernel_gives_what_its_reference_gives(target, builder, knobs, accumulate):
    import test_operators

    layouts = [Image(5, 3, 6, 7, halo, target.vector) for halo in ((1, 0, 2, 1), (0, 1, 0, 0))]
    x, y = np.random.default_rng(2).standard_normal((2, 5, 3, 6, 7)).astype(np.float32)
    arrays = [layout.pack(values, 7.5, test_operators.HALO) for layout, values in zip(layouts, (x, y), strict=True)]
    problem = Flip(*layouts, accumulate)
    if target.device == "opencl":
        from test_opencl_kernels import launch

        result = launch(builder, "flip", problem, *arrays)[1]
    else:
        import tvm

        from mest_compile.kernels.source import kernel_source

        tensors = [tvm.runtime.tensor(array.reshape(-1)) for array in arrays]
        builder.function(kernel_source("flip", problem, target, **knobs))(*tensors)
        result = tensors[1].numpy()
    wanted = flip_reference(x) + (y if accumulate else 0)
    test_operators.assert_close(test_operators.unpack(layouts[1], result), wanted)


def test_the_kind_of_device_takes_the_steps_of_a_cpu():
    usual, shape = find_target("local"), (5, 1, 6, 6)
    kinds = usual, replace(usual, name="debug", device="debug")
    net, rng = build_model("mlp", shape, 3, 16), np.random.default_rng(0)
    steps = [mest.compile(net, shape, sparsity=0.75, target=kind, threads=1) for kind in kinds]
    for _ in range(3):
        batch = rng.standard_normal(shape).astype(np.float32), rng.integers(0, 3, shape[0])
        assert len({step(*batch).loss for step in steps}) == 1


def test_the_scheme_the_source_and_the_target_train():
    data, shape = load("stripes"), (32, 1, 8, 8)
    net = build_model("mlp", shape, 2, 16)
    step = mest.compile(net, shape, scheme="pair", sparsity=0.8, target="old-laptop", threads=1)
    recipe = mest.Recipe(3, "em", lr=0.05, mutate_every=1, augment=False)
    assert mest.Trainer(step, recipe).fit(data.train, data.test).test_accuracy > 0.9
    masks = step.masks().values()
    assert masks and all((mask[::2] == mask[1::2]).all() for mask in masks)
    assert step.describe()["target"] == "old-laptop"


def test_the_command_line_and_recipes_find_them_by_name(mest_compile_command, tmp_path):
    assert "pair" in {row["scheme"] for row in mest_compile_command("schemes", "--json").document}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('epochs = 1\n[run]\nmodel = "mlp"\nwidth = 16\nscheme = "pair"\ndata = "stripes"\nbatch = 32\n')
    ran = mest_compile_command("train", "--recipe", recipe, "--out", tmp_path / "run", "--json")
    assert ran.code == 0, ran.err
    assert set(mest.load(tmp_path / "run" / "checkpoint.safetensors").describe()["schemes"].values()) == {
        "pair",
        "dense",
    }

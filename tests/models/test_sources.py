"""Models by the names that users give: of packages, of files, of their own."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mest_compile.base.errors import DataError, NotInstalled, SpecError, StateError, UnknownName, UsageError
from mest_compile.measuring.case import Case
from mest_compile.models import sources
from mest_compile.models.catalog import build_model
from mest_compile.models.sources import find_model

SHAPE = (2, 3, 8, 8)


class Small(nn.Module):
    def __init__(self, channels=3, classes=1000, conv_head=False):
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 3)
        self.head = nn.Conv2d(4, classes, 1) if conv_head else nn.Sequential(nn.Dropout(0.1), nn.Linear(4, classes))

    def forward(self, x):
        y = self.stem(x).mean((2, 3), keepdim=True)
        return self.head(y).flatten(1) if isinstance(self.head, nn.Conv2d) else self.head(y.flatten(1))


@pytest.fixture
def packages(monkeypatch):
    """A timm and a torchvision of small models."""

    def timm(name, pretrained, num_classes, in_chans):
        if pretrained:
            raise OSError("no network")
        return Small(in_chans, num_classes)

    def torchvision(name, weights=None, num_classes=1000):
        net = Small(3, num_classes, conv_head=name == "small_conv")
        if weights == "DEFAULT":
            nn.init.ones_(net.stem.weight)
        return net

    names = ["small", "small_conv"]
    models = SimpleNamespace(list_models=lambda module: names, get_model=torchvision)
    there = {
        "timm": SimpleNamespace(is_model=lambda name: name in names, list_models=lambda: names, create_model=timm),
        "torchvision": SimpleNamespace(models=models),
    }
    for name, module in there.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", ["timm:small", "torchvision:small", "torchvision:small_conv"])
def test_packages_models_have_the_wanted_classes_and_the_seeds_weights(name):
    before = torch.random.get_rng_state()
    net, again, other = (find_model(name, SHAPE, 5, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert net(torch.zeros(SHAPE)).shape == (2, 5)
    assert torch.equal(net.stem.weight, again.stem.weight) and not torch.equal(net.stem.weight, other.stem.weight)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", ["torchvision:small", "torchvision:small_conv"])
def test_a_pretrained_model_keeps_its_weights_and_gets_a_classifier(name):
    net = find_model(name, SHAPE, 7, pretrained=True)
    assert net.stem.weight.eq(1).all() and net(torch.zeros(SHAPE)).shape == (2, 7)


def test_a_built_in_model_may_be_pretrained(monkeypatch):
    monkeypatch.setattr(sources, "pretrained_model", lambda name, shape: (Small(), None))
    assert find_model("efficientnet-lite0", SHAPE, 7, pretrained=True)(torch.zeros(SHAPE)).shape == (2, 7)
    with pytest.raises(UsageError, match="efficientnet-lite0 of width 8 comes without weights"):
        find_model("efficientnet-lite0", SHAPE, 7, 8, pretrained=True)


@pytest.mark.usefixtures("packages")
def test_timm_models_take_images_of_other_channels():
    assert find_model("timm:small", (2, 1, 8, 8)).stem.in_channels == 1


FILE = """
import torch
from beside import WIDTH

def net(classes, input_shape):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(input_shape[1] * WIDTH, classes))

def wide(width=1):
    return torch.nn.Linear(4, width)

ready = torch.nn.Linear(4, 9)

def number():
    return 42

def broken():
    raise ValueError("not today")
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "beside.py").write_text("WIDTH = 64\n")
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    yield path
    sys.modules.pop("beside", None)


def test_a_files_function_is_given_what_it_takes(file):
    folders = list(sys.path)
    net = find_model(f"{file}:net", SHAPE, 5)
    assert net(torch.zeros(SHAPE)).shape == (2, 5) and sys.path == folders
    assert find_model(f"{file}:wide", SHAPE, width=6).out_features == 6
    assert find_model(f"{file}:wide", SHAPE).out_features == 1
    assert find_model(f"{file}:ready", SHAPE).out_features == 9


@pytest.mark.usefixtures("packages")
def test_a_name_that_cannot_be_meant_is_told(file, tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("import missing_module_of_theirs\n")
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not there
    cases = [
        ("abacus", {}, UnknownName, "no model 'abacus'; there are: .*resnet20.*; or timm:NAME"),
        (42, {}, UnknownName, "wanted a name"),
        ("timm:smell", {}, UnknownName, "timm has no model 'smell'"),
        ("timm:small_x", {}, UnknownName, "it has: small, small_conv"),
        ("timm:small", {"pretrained": True}, DataError, "pretrained weights of timm:small cannot be had: no network"),
        ("timm:small", {"width": 8}, UsageError, "has its width already"),
        ("net.onnx", {"width": 8}, UsageError, "an .onnx file has its width already"),
        (
            "resnet20",
            {"pretrained": True},
            UsageError,
            "resnet20 comes without weights; pretrained are eff",
        ),
        ("torchvision:small", {}, NotInstalled, "pip install torchvision"),
        (f"{tmp_path}/gone.py:net", {}, DataError, "no file .*gone.py"),
        (f"{tmp_path}/bad.py:net", {}, DataError, "bad.py failed with ModuleNotFoundError"),
        (f"{file}:nothing", {}, UnknownName, "has no function 'nothing'; it has: net, wide"),
        (f"{file}:number", {}, SpecError, "gives a int; wanted a torch.nn.Module"),
        (f"{file}:broken", {}, DataError, "broken failed with ValueError: not today"),
        (f"{file}:net", {"width": 8}, UsageError, "takes no width"),
    ]
    for name, options, error, words in cases:
        with pytest.raises(error, match=words) as caught:
            find_model(name, SHAPE, **options)
        assert "\n" not in str(caught.value), name


@pytest.mark.usefixtures("packages")
def test_torchvision_models_take_three_channels():
    with pytest.raises(SpecError, match="takes images of 3 channels, the input has 1"):
        find_model("torchvision:small", (2, 1, 8, 8))


def test_an_onnx_files_path_stays_what_it_is():
    assert find_model("net.onnx", SHAPE) == "net.onnx"


def test_benchmarks_take_the_same_names_but_for_files_that_torch_cannot_train(file):
    assert Case(f"{file}:ready", (2, 4)).network().out_features == 9
    with pytest.raises(UsageError, match=r"cannot train an .onnx file.*--vs mest-dense"):
        Case("net.onnx", SHAPE).network()


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_weights_of_a_file_are_taken_and_those_of_other_classes_but_for_the_last_layer(tmp_path, form):
    from safetensors.torch import save_file

    net, path = build_model("mlp", (2, 20), 7, 16, seed=5), tmp_path / f"net.{form}"
    save_file(net.state_dict(), path) if form == "safetensors" else torch.save(net.state_dict(), path)
    same, other = (find_model("mlp", (2, 20), classes, 16, weights=path) for classes in (7, 3))
    wanted = net.state_dict()
    for name, value in same.state_dict().items():
        assert torch.equal(value, wanted[name])
    assert other(torch.zeros(2, 20)).shape == (2, 3)
    kept = [name for name, value in other.state_dict().items() if torch.equal(value, wanted.get(name)[: len(value)])]
    assert set(wanted) - set(kept) == {name for name in wanted if len(wanted[name]) == 7}


@pytest.mark.usefixtures("packages")
def test_weights_that_cannot_be_taken_are_refused(tmp_path):
    torch.save({"other": torch.zeros(1)}, tmp_path / "net.pt")
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    cases = [
        ("mlp", {"weights": tmp_path / "net.pt"}, StateError, "net.pt does not fit the net"),
        ("mlp", {"weights": tmp_path / "gone.pt"}, DataError, "gone.pt cannot be read"),
        ("net.onnx", {"weights": tmp_path / "net.pt"}, UsageError, "has its weights already"),
        (str(tmp_path), {"weights": tmp_path / "net.pt"}, UsageError, "has its weights already"),
        (str(tmp_path), {"width": 8}, UsageError, "has its width already"),
        (
            "timm:small",
            {"weights": tmp_path / "net.pt", "pretrained": True},
            UsageError,
            "--pretrained has its weights",
        ),
    ]
    for name, options, error, words in cases:
        with pytest.raises(error, match=words):
            find_model(name, SHAPE, **options)


def test_a_folder_with_a_checkpoint_is_a_trained_model(tmp_path):
    assert not sources.is_trained("mlp") and not sources.is_trained(tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"")
    assert sources.is_trained(tmp_path) and sources.is_trained("any.safetensors")
    assert find_model(str(tmp_path), SHAPE) == str(tmp_path)

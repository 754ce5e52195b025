"""Sparsities and schemes of layers, and masks of pruned models, on the command line and in recipes."""

import numpy as np
import pytest
from torch.nn.utils import prune

import mest_compile as mest
from mest_compile.cli.options import by_layer, said_schemes, said_sparsity
from mest_compile.models.catalog import build_model

SHAPE = (16, 1, 8, 8)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """An ONNX file whose first layer torch has pruned to 90%."""
    pytest.importorskip("onnx")
    net = build_model("mlp", SHAPE, 10, 16)
    prune.l1_unstructured(net.fc1, "weight", amount=0.9)
    prune.remove(net.fc1, "weight")
    path = tmp_path_factory.mktemp("pruned") / "net.onnx"
    step = mest.compile(net, SHAPE, scheme="unstructured", sparsity="as-given", threads=1)
    mest.to_onnx(step, path)
    return path, net.fc1.weight.detach().numpy() != 0


def test_a_pruned_file_is_trained_and_built_at_its_own_mask(mest_compile_command, pruned, tmp_path):
    path, mask = pruned
    said = ["--model", path, "--scheme", "unstructured", "--sparsity", "as-given"]
    ran = mest_compile_command(
        "train", *said, "--method", "static", "--epochs", 1, "--out", tmp_path / "run", "--batch", 16, "--json"
    )
    assert ran.code == 0, ran.err
    assert ran.document["epochs"][-1]["sparsity"].keys() == {"fc1.weight"}
    step = mest.load(tmp_path / "run" / "checkpoint.safetensors")
    np.testing.assert_array_equal(step.masks()["fc1.weight"], mask)
    assert (step.state_dict()["fc1.weight"] != 0)[mask].all()
    ran = mest_compile_command(
        "build", *said, "--target", "local", "--image", "1x8x8", "--batch", 16, "--out", tmp_path / "artifact"
    )
    assert ran.code == 0, ran.err
    np.testing.assert_array_equal(mest.open_artifact(tmp_path / "artifact").masks()["fc1.weight"], mask)
    planned = mest_compile_command("plan", *said, "--image", "1x8x8", "--batch", 16, "--json")
    assert planned.code == 0, planned.err
    assert {call["layer"] for call in planned.document["calls"]} >= {"fc1.weight"}
    ran = mest_compile_command("train", "--model", path, "--sparsity", "as-given", "--out", tmp_path / "other")
    assert ran.code == 2 and "in two; pass scheme='unstructured'" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--model", "mlp", "--sparsity", "as-given"), "no weight of the model is 0; prune it first"),
        (("plan", "--model", "mlp", "--sparsity", "as-given"), "no weight of the model is 0; prune it first"),
        (("tune", "--model", "mlp", "--sparsity", "as-given"), "is of weights, which are not looked at here"),
        (("analyze", "--model", "mlp", "--sparsity", "as-given"), "figures are of one sparsity"),
        (("table", "--model", "mlp", "--sparsities", "as-given"), "--sparsities is 'as-given'; wanted numbers"),
        (("train", "--sparsity", "much"), "--sparsity is 'much'; wanted a number, as-given, or numbers of layers"),
        (("train", "--sparsity", "fc1=0.5,fc2=x"), "--sparsity is 'fc1=0.5,fc2=x'; wanted a number"),
        (
            ("train", "--scheme", "a=block,a=filter"),
            "--scheme is 'a=block,a=filter'; wanted layers or patterns, each once",
        ),
        (("train", "--scheme", "a=block,filter"), "--scheme is 'a=block,filter'; wanted layers or patterns, each once"),
        (("plan", "--model", "mlp", "--scheme", "layer9.*=block"), "scheme: no layer matches 'layer9.*'"),
        (
            ("build", "--out", "x", "--model", "mlp", "--scheme", "2:4", "--sparsity", "0.9"),
            "scheme 2:4 has sparsity 0.5",
        ),
    ],
)
def test_what_cannot_be_is_one_line(mest_compile_command, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    ran = mest_compile_command(*arguments)
    assert ran.code == 2 and message in ran.err and ran.err.count("\n") == 1, ran.err


def test_texts_of_layers_are_read():
    assert by_layer("scheme", "block:4x1") == "block:4x1"
    assert by_layer("scheme", " layer1.* = pattern , *=block:2x2 ") == {"layer1.*": "pattern", "*": "block:2x2"}
    assert said_sparsity("layer1.*=0.8,*=0.9") == {"layer1.*": 0.8, "*": 0.9}
    assert (said_sparsity("0.5"), said_sparsity("as-given"), said_sparsity(None)) == (0.5, "as-given", None)
    assert said_sparsity({"*": 0.9}) == {"*": 0.9} and said_schemes("fc1=2:4") == {"fc1": mest.NM(2, 4)}


def test_a_recipes_tables_are_honoured_and_the_command_line_wins(mest_compile_command, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'epochs = 1\nmethod = "static"\n[run]\nmodel = "mlp"\nwidth = 16\nbatch = 32\n'
        '[run.scheme]\nfc1 = "2:4"\n"*" = "unstructured"\n[run.sparsity]\nfc1 = 0.5\n"*" = 0.8\n'
    )
    schemes = {}
    for name, others in (("tables", ()), ("line", ("--scheme", "1:4"))):
        ran = mest_compile_command("train", "--recipe", recipe, *others, "--out", tmp_path / name, "--json")
        assert ran.code == 0, ran.err
        schemes[name] = mest.load(tmp_path / name / "checkpoint.safetensors").describe()
    assert schemes["tables"]["schemes"] == {"fc1.weight": "2:4", "fc2.weight": "unstructured", "fc3.weight": "dense"}
    assert schemes["tables"]["sparsity"] == {"fc1.weight": 0.5, "fc2.weight": 0.8, "fc3.weight": 0.0}
    assert schemes["line"]["schemes"] == {"fc1.weight": "1:4", "fc2.weight": "1:4", "fc3.weight": "dense"}
    assert schemes["line"]["sparsity"]["fc2.weight"] == 0.75


HEADS = """
import torch


class Heads(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.one, self.two, self.three = (torch.nn.Conv2d(c, 8, 3) for c in (1, 8, 8))
        self.aux, self.head = torch.nn.Linear(8, classes), torch.nn.Linear(8, classes)

    def forward(self, x):
        x = self.three(self.two(self.one(x).relu()).relu()).mean((2, 3))
        return {"aux": self.aux(x), "logits": self.head(x)}


def heads(classes):
    return Heads(classes)
"""


def test_layers_that_stay_dense_and_the_output_that_trains_are_said_in_every_command_and_in_recipes(
    mest_compile_command, tmp_path
):
    (tmp_path / "nets.py").write_text(HEADS)
    model, said = f"{tmp_path / 'nets.py'}:heads", ("--dense-layers", "one.weight, head.weight", "--output", "logits")
    of = {"--image": "1x8x8", "--batch": 16}
    ran = mest_compile_command("check", model, *[part for item in of.items() for part in item], *said, "--json")
    assert ran.code == 0, ran.err
    states = {layer["name"]: layer["state"] for layer in ran.document["layers"]}
    assert states == {"one": "dense", "two": "sparse", "three": "sparse", "head": "dense"}
    where = ("--model", model, "--image", "1x8x8", "--batch", 16, *said)
    ran = mest_compile_command("build", *where, "--target", "local", "--out", tmp_path / "artifact")
    assert ran.code == 0, ran.err
    assert mest.open_artifact(tmp_path / "artifact").masks().keys() == {"two.weight", "three.weight"}
    for option, message in (("--dense-layers", "fc9"), ("--output", "there are: aux, logits")):
        ran = mest_compile_command("plan", *where, option, "fc9")
        assert ran.code == 2 and message in ran.err

    (tmp_path / "recipe.toml").write_text(
        f"""
epochs = 1
method = "static"
[run]
model = "{model}"
batch = 16
dense_layers = ["one.weight", "head.weight"]
output = 1
trainable = ["three.*", "head.*"]
"""
    )
    ran = mest_compile_command("train", "--recipe", tmp_path / "recipe.toml", "--out", tmp_path / "run", "--json")
    assert ran.code == 2 and "there are: aux, logits" in ran.err
    ran = mest_compile_command(
        *("train", "--recipe", tmp_path / "recipe.toml", "--output", "logits", "--out", tmp_path / "run", "--json")
    )
    assert ran.code == 0, ran.err
    assert "sparsity 0.903 in sparse layers" in ran.err
    step = mest.load(tmp_path / "run" / "checkpoint.safetensors")
    assert step.masks().keys() == {"two.weight", "three.weight"}
    assert step.describe()["trainable"] == ["three.weight", "three.bias", "head.weight", "head.bias"]


def test_the_output_that_trains_is_the_one_that_is_tuned(mest_compile_command, tmp_path):
    (tmp_path / "nets.py").write_text(HEADS)
    where = ("--model", f"{tmp_path / 'nets.py'}:heads", "--image", "1x8x8", "--batch", 16, "--log", tmp_path / "log")
    ran = mest_compile_command("tune", *where, "--trials", 1, "--vectors", 8, "--time-limit", 0)
    assert ran.code == 2 and "say which they are by output=" in ran.err
    ran = mest_compile_command("tune", *where, "--trials", 1, "--vectors", 8, "--time-limit", 0, "--output", "logits")
    assert ran.code == 0, ran.err

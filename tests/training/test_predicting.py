"""From a folder of pictures to a trained model that names what it sees: predict, eval and export, as commands."""

import csv
import json
import shutil
from functools import cache
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import mest_compile as mest
from mest_compile import ondevice
from mest_compile.base.errors import InputError, UsageError
from mest_compile.data import Dataset
from mest_compile.models.inputs import Inputs, Reading
from mest_compile.runtime import checkpoint
from mest_compile.training import verdict
from mest_compile.training.predicting import answers, evaluated, readable

COLOURS = {"leaf": (40, 160, 60), "night": (20, 20, 60), "sand": (220, 190, 120)}
SIDE = 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """train/ and test/ with three classes of noisy colours."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 10)):
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal(colour, 70, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """(run folder, its test accuracy)"""
    from mest_compile.cli.running import Request, start_run
    from mest_compile.options import StepOptions

    options = StepOptions(scheme=mest.Block(4, 1), sparsity=0.5, threads=1)
    recipe = mest.Recipe(epochs=3, method="static", lr=0.05, augment=False)
    out = tmp_path_factory.mktemp("runs") / "run"
    run = start_run(Request("mlp", "folder", recipe, options, width=16, data_folder=pictures, batch=8, out=out))
    return out, run.test_accuracy


def test_predict_names_pictures_as_often_rightly_as_the_run_reports(trained, pictures, mest_compile_command):
    folder, accuracy = trained
    ran = mest_compile_command("predict", folder, pictures / "test", "--top", 2, "--json")
    assert ran.code == 0, ran.err
    answers = ran.document
    assert len(answers) == 30 and {one["class"] for one in answers} == set(COLOURS)
    right = [one["class"] == one["file"].split("/")[-2] for one in answers]
    assert np.mean(right) == accuracy and accuracy > 0.8
    for one in answers:
        first, second = one["top"]
        assert first == {"class": one["class"], "probability": one["probability"]}
        assert 1 >= first["probability"] >= second["probability"] >= 0


def test_a_picture_of_another_size_is_cut_and_resized(trained, pictures, mest_compile_command, tmp_path):
    with Image.open(pictures / "test" / "sand" / "0.png") as image:
        image.resize((64, 48)).save(tmp_path / "large.jpg")
    ran = mest_compile_command("predict", trained[0], tmp_path / "large.jpg")
    assert ran.code == 0 and "sand" in ran.out.splitlines()[1]


def test_answers_as_csv(trained, pictures, mest_compile_command, tmp_path):
    ran = mest_compile_command("predict", trained[0], pictures / "test" / "leaf", "--csv", tmp_path / "a.csv")
    assert ran.code == 0, ran.err
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert len(rows) == 10 and list(rows[0])[:3] == ["file", "class", "probability"] and "class 3" in rows[0]
    assert sum(float(rows[0][name]) for name in rows[0] if "probability" in name) == pytest.approx(1)
    ran = mest_compile_command("predict", trained[0], pictures / "test" / "leaf" / "0.png", "--csv", "-")
    assert next(iter(csv.DictReader(ran.out.splitlines()))) == {**rows[0]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}", "absent.png"], "no picture absent.png"),
        (["{run}", "{run}"], "holds no .png, .jpg, .jpeg files"),
        (["{run}/recipe.json", "{picture}"], "recipe.json is damaged"),
        (["absent", "{picture}"], "no checkpoint absent"),
        (["{run}", "{picture}", "--csv", "a", "--json"], "leave one out"),
        (["{run}", "{picture}", "--runtime", "lib.so"], "belongs to an artifact"),
    ],
)
def test_what_cannot_be_predicted_is_said(trained, pictures, mest_compile_command, arguments, said):
    places = {"run": trained[0], "picture": pictures / "test" / "leaf" / "0.png"}
    ran = mest_compile_command("predict", *(argument.format(**places) for argument in arguments))
    assert ran.code in (1, 2) and said in ran.err and ran.err.count("\n") == 1


def test_eval_tells_what_the_run_reports_and_each_class(trained, mest_compile_command):
    folder, accuracy = trained
    ran = mest_compile_command("eval", folder, "--json")
    assert ran.code == 0, ran.err
    found = ran.document
    assert found["accuracy"] == accuracy and found["examples"] == 30 and list(found["classes"]) == list(COLOURS)
    confusion = np.array(found["confusion"])
    assert confusion.sum() == 30 and confusion.trace() == round(30 * accuracy)
    assert sum(one["examples"] for one in found["calibration"]["bins"]) == 30
    shown = mest_compile_command("eval", folder).out
    assert f"{accuracy:.2%}" in shown and "calibration" in shown


def test_eval_scales_other_data_as_the_trained_data_was(trained, pictures, mest_compile_command, tmp_path):
    """A set with one class's pictures in both parts has other statistics, which must not count."""
    for part in ("train", "test"):
        for name in COLOURS:
            (tmp_path / part / name).mkdir(parents=True)
            shutil.copy(pictures / "test" / "sand" / "0.png", tmp_path / part / name)
        shutil.copytree(pictures / "test" / "sand", tmp_path / part / "sand", dirs_exist_ok=True)
    found = mest_compile_command("eval", trained[0], "--data", "folder", "--data-folder", tmp_path, "--json").document
    whole = mest_compile_command("eval", trained[0], "--json").document
    assert found["classes"]["sand"]["recall"] == whole["classes"]["sand"]["recall"]


def test_an_onnx_file_takes_raw_pixels_and_is_as_good_as_reported(trained, pictures, mest_compile_command, tmp_path):
    folder, accuracy = trained
    ran = mest_compile_command("export", folder, "--format", "onnx", "--out", tmp_path / "net.onnx", "--json")
    assert ran.code == 0 and ran.document["takes"] == "pixels", ran.err
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    names = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    right = []
    for file in sorted((pictures / "test").rglob("*.png")):
        with Image.open(file) as image:
            pixels = np.asarray(image).transpose(2, 0, 1)[None].astype(np.float32)
        (logits,) = session.run(None, {"input": pixels})
        right.append(names[logits[0].argmax()] == file.parent.name)
    assert len(right) == 30 and np.mean(right) == accuracy


def test_every_export_says_classes_and_scaling(trained, mest_compile_command, tmp_path):
    reading = mest_compile_command(
        "export", trained[0], "--format", "safetensors", "--out", tmp_path / "net", "--json"
    ).document["reading"]
    assert reading["classes"] == list(COLOURS) and reading["inputs"]["size"] == [SIDE, SIDE]
    from safetensors import safe_open

    with safe_open(tmp_path / "net", "np") as file:
        assert json.loads(file.metadata()["reading"]) == reading


def test_an_artifact_built_of_a_run_predicts_the_same(trained, pictures, mest_compile_command, tmp_path, capsys):
    folder, _ = trained
    ran = mest_compile_command("build", "--checkpoint", folder, "--batch", 4, "--out", tmp_path / "artifact", "--json")
    assert ran.code == 0, ran.err
    assert mest.open_artifact(tmp_path / "artifact").batch == 4
    images = pictures / "test" / "night"
    wanted = mest_compile_command("predict", folder, images, "--json").document
    found = mest_compile_command("predict", tmp_path / "artifact", images, "--json").document
    assert ondevice.main(["predict", str(tmp_path / "artifact"), str(images), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert [(one["file"], one["class"]) for one in found] == [(one["file"], one["class"]) for one in wanted]
    assert [one["probability"] for one in found] == pytest.approx([one["probability"] for one in wanted])


def test_a_step_of_scaled_numbers_does_not_guess_what_pixels_are(trained, pictures):
    step = mest.load(trained[0])
    assert step.reading.inputs.size == (SIDE, SIDE)
    step.reading = Reading(("a", "b", "c"))
    with pytest.raises(UsageError, match=r"nobody says how pictures .* mest.Reading"):
        next(answers(step, [pictures / "test" / "sand" / "0.png"]))
    with pytest.raises(UsageError, match="nobody says how pixels"):
        mest.to_onnx(step, "nowhere.onnx", pixels=True)


def test_pictures_have_one_channel_or_three_and_their_answer_is_no_map():
    def step(channels, *outputs):
        pixels = Inputs((4, 4), mean=(0.0,) * channels, std=(1.0,) * channels)
        return SimpleNamespace(reading=Reading((), pixels), output_shape=(2, *outputs))

    assert [readable(step(channels, 5))[0].channels for channels in (1, 3)] == [1, 3]
    with pytest.raises(UsageError, match="images of 2 channels, and pictures have 1 or 3"):
        readable(step(2, 5))
    with pytest.raises(UsageError, match=r"answers are maps, \(5, 4\) an example"):
        readable(step(3, 5, 4))


def test_data_of_other_classes_is_refused(trained):
    step, images = mest.load(trained[0]), np.zeros((4, 3, SIDE, SIDE), np.uint8)
    images[0] = 255
    other = Dataset.of(images, np.arange(4) % 3, "other", names=("leaf", "night", "snow"))
    with pytest.raises(InputError, match="other has other classes than the model, or in another order: 'sand'"):
        evaluated(step, other)
    with pytest.raises(InputError, match="other has 4 classes, the model gives 3 classes"):
        evaluated(step, Dataset.of(images, np.arange(4), "other"))


def test_a_damaged_reading_is_said(trained, tmp_path):
    arrays, facts = checkpoint.read(trained[0])
    facts["reading"]["inputs"]["std"] = [0, 0, 0]
    checkpoint.write(tmp_path / "odd.safetensors", arrays, facts)
    with pytest.raises(mest.MestError, match="its reading of pictures is none"):
        mest.load(tmp_path / "odd.safetensors")


def test_a_reading_comes_back_from_json():
    for reading in (Reading(), Reading(("a", "b"), Inputs((3, 4), 0.5, (1.0,), (2.0,)))):
        assert Reading.from_json(json.loads(json.dumps(reading.to_json()))) == reading
    assert Reading(("a",)).name(0) == "a" and Reading(("a",)).name(3) == "3"


def test_calibration_is_the_gap_between_sure_and_right():
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]], np.float32))
    found = verdict.calibration(logits, np.array([0, 1, 0, 1]))
    assert found["error"] == pytest.approx((2 * abs(0.9 - 0.5) + 2 * abs(0.6 - 1.0)) / 4)
    assert [(one["examples"], one["accuracy"]) for one in found["bins"]] == [(2, 1.0), (2, 0.5)]


def test_a_run_is_built_for_another_device_with_another_batch(trained, mest_compile_command, tmp_path):
    out = tmp_path / "artifact"
    command = ("build", "--checkpoint", trained[0], "--target", "cortex-a72", "--batch", 4, "--out", out, "--json")
    ran = mest_compile_command(*command)
    assert ran.code == 0 and ran.document["target"] == "cortex-a72", ran.err
    library = (out / "step.so").read_bytes()
    assert library[:4] == b"\x7fELF" and int.from_bytes(library[18:20], "little") == 183  # EM_AARCH64
    facts = json.loads((out / "manifest.json").read_text())["facts"]
    assert facts["graph"]["input_shape"] == [4, 3, SIDE, SIDE] and facts["target"]["name"] == "cortex-a72"
    state, wanted = checkpoint.read(out / "state.safetensors")[1], checkpoint.read(trained[0])[1]
    assert state["reading"] == wanted["reading"] and state["updates"] == wanted["updates"] > 0


def test_a_run_is_a_model_wherever_one_is_named(trained, mest_compile_command, tmp_path):
    folder, _ = trained
    held = mest_compile_command("check", folder, "--json").document
    assert held["input_shape"] == [8, 3, SIDE, SIDE] and held["taken"]
    again = mest.check(str(folder / "checkpoint.safetensors"), ()).to_dict()
    assert json.loads(json.dumps(again)) == held
    step, before = mest.compile(str(folder), (4, 3, SIDE, SIDE), sparsity="as-given"), mest.load(folder)
    assert step.batch == 4
    for name, mask in before.masks().items():
        np.testing.assert_array_equal(step.masks()[name], mask)
    for name, value in before.state_dict().items():
        np.testing.assert_array_equal(step.state_dict()[name], value)
    with pytest.raises(mest.MestError, match=r"takes \(3, 8, 8\) an example, not \(3, 9, 9\)"):
        mest.compile(str(folder), (4, 3, 9, 9))


def test_options_of_images_say_what_was_meant(mest_compile_command):
    for text, said in (("32x32x3", "did you mean 3x32x32?"), ("8x8", "wanted channels x height x width")):
        for command in (("check", "mlp"), ("build", "--out", "a"), ("bench",), ("tune",), ("table",), ("analyze",)):
            ran = mest_compile_command(*command, "--image", text)
            assert ran.code == 2 and said in ran.err and ran.err.count("\n") == 1, ran.err


def test_tune_in_python_searches_what_the_command_does_and_keeps_to_its_time(trained, tmp_path):
    found = mest.tune(
        str(trained[0]), (4, 3, SIDE, SIDE), 1, 0.0, log=tmp_path / "log", scheme="block:4x1", sparsity=0.5
    )
    assert not found.finished and found.measured == 0 and found.left_out and found.log == str(tmp_path / "log")
    with pytest.raises(UsageError, match="tune takes its own options and those of mest.compile"):
        mest.tune("mlp", (4, 3, 8, 8), colour="blue")


def test_pixels_in_a_file_of_arrays_are_pictures(trained, pictures, mest_compile_command, tmp_path):
    files = sorted((pictures / "test" / "leaf").iterdir())
    images = np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files])
    np.save(tmp_path / "some.npy", images)
    found = mest_compile_command("predict", trained[0], tmp_path / "some.npy", "--json").document
    wanted = mest_compile_command("predict", trained[0], *files, "--json").document
    assert [one.pop("file") for one in found] == [f"{tmp_path / 'some.npy'}[{place}]" for place in range(10)]
    assert found == [{name: value for name, value in one.items() if name != "file"} for one in wanted]
    for odd, said in ((images / 255, "holds float64"), (images[:, :1], r"wanted uint8 pixels \(n, 3, 8, 8\)")):
        np.save(tmp_path / "odd.npy", odd)
        with pytest.raises(mest.MestError, match=said):
            list(answers(mest.load(trained[0]), [tmp_path / "odd.npy"]))


# What an example is answered with, by loss: (loss, outputs, labels (n, ...) of logits (n, outputs)).
ANSWERS = {
    "yes or no": ("bce", 1, lambda wanted: (wanted[:, 0] > 0).float()),
    "yes or no, in a column": ("bce", 1, lambda wanted: (wanted > 0).float()),
    "labels": ("bce", 3, lambda wanted: (wanted > 0).float()),
    "number": ("mse", 1, lambda wanted: wanted[:, 0]),
    "numbers": ("smooth_l1", 2, lambda wanted: wanted),
    "one of two": ("cross_entropy", 2, lambda wanted: wanted.argmax(1)),
    "shares": ("soft_cross_entropy", 3, lambda wanted: wanted.softmax(1)),
    "taught": ("distill", 3, lambda wanted: wanted.argmax(1)),
}
NAMES = ("fog", "ice", "mud")


@pytest.fixture(scope="module")
def answering(builder):
    """A function that makes of a case (step, module in float64, pixels (7, 3, 4, 4) uint8, labels as torch's)."""

    @cache
    def made(case):
        loss, outputs, label = ANSWERS[case]
        torch.manual_seed(3)
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, outputs))
        pixels = torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8)
        options = {"sparsity": 0.0, "threads": 1, "activations": "float32", "builder": builder}
        step = mest.compile(net, (4, 3, 4, 4), loss=loss, **options)
        step.reading = Reading(NAMES[:outputs], Inputs((4, 4), mean=(90.0, 120.0, 110.0), std=(60.0, 70.0, 80.0)))
        return step, net.double(), pixels, label(torch.randn(7, outputs))

    return made


def logits_of(net, pixels):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((90.0, 120, 110), (60.0, 70, 80)))
    with torch.no_grad():
        return net((pixels.double() - mean) / std)


@pytest.mark.parametrize("case", ANSWERS)
def test_a_picture_is_answered_as_the_loss_means_outputs(case, answering, tmp_path, mest_compile_command):
    """Numbers by name, of each yes or no how probable a yes is, or the classes in the order of their softmax."""
    step, net, pixels, _ = answering(case)
    logits = logits_of(net, pixels)
    names, file = NAMES[: logits.shape[1]], tmp_path / "some.npy"
    np.save(file, pixels.numpy())
    told = list(answers(step, [file]))
    assert [one["file"] for one in told] == [f"{file}[{place}]" for place in range(7)]
    for one, its in zip(told, logits, strict=True):
        if ANSWERS[case][0] == "bce":
            shares = its.sigmoid().tolist()
            assert one.keys() == {"file", "classes", "probabilities"} and tuple(one["probabilities"]) == names
            assert list(one["probabilities"].values()) == pytest.approx(shares, rel=1e-4)
            assert one["classes"] == [name for name, share in zip(names, shares, strict=True) if share > 0.5]
            continue
        if ANSWERS[case][0] in ("mse", "smooth_l1"):
            assert one.keys() == {"file", "outputs"} and tuple(one["outputs"]) == names
            assert list(one["outputs"].values()) == pytest.approx(its.tolist(), rel=1e-4, abs=1e-5)
            continue
        order = its.argsort(descending=True).tolist()
        assert [best["class"] for best in one["top"]] == [names[place] for place in order]
        assert [best["probability"] for best in one["top"]] == pytest.approx(its.softmax(0)[order].tolist(), rel=1e-4)
        assert {name: one[name] for name in ("class", "probability")} == one["top"][0]

    step.save(tmp_path / "net.safetensors")
    command = ("predict", tmp_path / "net.safetensors", file)
    assert mest_compile_command(*command, "--json").document == told
    shown, table = (mest_compile_command(*command, *form).out.splitlines() for form in (("--csv", "-"), ()))
    rows = list(csv.DictReader(shown))
    for one, row, line in zip(told, rows, table[-7:], strict=True):
        if "outputs" in one:
            assert {name: float(row[name]) for name in names} == one["outputs"]
            assert line.split()[-len(names) :] == [f"{value:.4g}" for value in one["outputs"].values()]
        elif "probabilities" in one:
            assert {name: float(row[name]) for name in names} == one["probabilities"]
            assert line.split()[-len(names) :] == [f"{share:.1%}" for share in one["probabilities"].values()]
        else:
            assert row["class"] == one["class"] and f"{one['probability']:.1%}" in line


@pytest.mark.parametrize("case", ANSWERS)
def test_a_data_set_is_judged_as_torch_judges_it(case, answering):
    step, net, pixels, labels = answering(case)
    loss = ANSWERS[case][0]
    classes = {} if labels.is_floating_point() else {"classes": step.classes}
    data = Dataset.of(pixels.numpy(), labels.numpy(), "some", **classes)
    found, logits = evaluated(step, data), logits_of(net, pixels)
    assert found.pop("examples") == 7
    if loss in ("mse", "smooth_l1"):
        wanted = labels.view_as(logits).double()
        assert found.keys() == {"mse", "mae"}
        assert found["mse"] == pytest.approx(nn.functional.mse_loss(logits, wanted).item(), rel=1e-4)
        assert found["mae"] == pytest.approx(nn.functional.l1_loss(logits, wanted).item(), rel=1e-4)
    elif loss == "bce":
        said, wanted = logits.sigmoid() > 0.5, labels.view_as(logits) == 1
        hits = (said & wanted).sum().item()
        f1 = 2 * hits / (2 * hits + (said ^ wanted).sum().item())
        assert 0 < f1 < 1, "a model that is always right or wrong tells little"
        assert found == {"f1": pytest.approx(f1), "label_accuracy": pytest.approx((said == wanted).double().mean())}
    else:
        right = logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))
        assert found["accuracy"] == pytest.approx(right.double().mean().item())
        # Of shares nobody says which class an example is of.
        assert ("confusion" in found) == ("calibration" in found) == ("classes" in found) == (labels.ndim == 1)


@pytest.mark.parametrize(
    ("case", "labels", "said"),
    [
        ("labels", np.zeros((7, 2), np.float32), r"some: targets have shape \(7, 2\); mest.BCE takes numbers of shape"),
        ("yes or no", np.full(7, 2, np.float32), "some: targets go from 2 to 2; mest.BCE takes 0 for no, 1 for yes"),
        ("numbers", np.zeros(7, np.float32), r"shape \(7,\); mest.SmoothL1 takes numbers of shape \(7, 2\)"),
        (
            "shares",
            np.zeros((7, 2), np.float32),
            r"shape \(7, 2\); mest.SoftCrossEntropy takes numbers of shape \(7, 3\)",
        ),
        ("one of two", np.zeros((7, 4, 4), np.int64), r"some: labels have shape \(7, 4, 4\); wanted \(7,\)"),
        ("taught", np.zeros((7, 4, 4), np.int64), r"some: labels have shape \(7, 4, 4\); wanted \(7,\)"),
        ("labels", np.zeros(7, np.int64), "some has 1 classes, the model gives 3 numbers; give other data"),
        ("one of two", np.zeros(7, np.float32), "some has numbers, the model gives 2 classes; give other data"),
    ],
)
def test_labels_that_the_loss_cannot_take_are_not_judged(case, labels, said, answering):
    step, _, pixels, _ = answering(case)
    with pytest.raises(InputError, match=said):
        evaluated(step, Dataset.of(pixels.numpy(), labels, "some"))


def test_what_has_no_label_is_not_judged(answering):
    step, net, pixels, labels = answering("one of two")
    labels = torch.where(torch.arange(7) // 2 == 1, -100, labels)
    found = evaluated(step, Dataset.of(pixels.numpy(), labels.numpy(), "some", classes=2))
    right = (logits_of(net, pixels).argmax(1) == labels)[labels >= 0]
    assert found["accuracy"] == pytest.approx(right.double().mean().item()) and np.sum(found["confusion"]) == 5

"""Loss and optimizer on the command line, in recipes, and what runs keep of them."""

import json

import numpy as np
import pytest

SMALL = ("--model", "mlp", "--width", "16", "--batch", "16", "--method", "static", "--epochs", "2", "--threads", "1")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A folder of images and of two numbers each."""
    folder, rng = tmp_path_factory.mktemp("numbers"), np.random.default_rng(0)
    for name, count in (("train", 64), ("test", 20)):
        images = rng.standard_normal((count, 1, 4, 4)).astype(np.float32)
        np.savez(folder / f"{name}.npz", images=images, labels=images.mean((1, 2, 3))[:, None] * [1.0, -2.0])
    return folder


def facts_of(folder):
    return json.loads((folder / "run.json").read_text())["step"]


def test_a_run_of_numbers_takes_its_loss_and_optimizer_from_options(mest_compile_command, numbers, tmp_path):
    out = tmp_path / "run"
    data = "--data", "arrays", "--data-folder", numbers
    options = "--loss", "huber:delta=0.5", "--optimizer", "adamw:lr=0.01,groups=[{names='fc3.*',rate=2}]"
    ran = mest_compile_command("train", *SMALL, *data, *options, "--out", out, "--json")
    assert ran.code == 0, ran.err
    [epoch] = [line for line in ran.err.splitlines() if line.startswith("  1/2 ")]
    assert float(epoch.split()[2]) > 0 and "%" not in epoch
    found = facts_of(out)
    assert found["loss"] == {"name": "huber", "delta": 0.5} and found["output_shape"] == [16, 2]
    assert found["optimizer"]["name"] == "adamw" and found["optimizer"]["groups"][0]["rate"] == 2
    assert ran.document["recipe"]["lr"] == 0.01
    assert ran.document["test_mae"] == ran.document["epochs"][-1]["test_mae"]
    shown = mest_compile_command("report", out)
    assert shown.code == 0 and "mean absolute error" in shown.out


def test_a_recipe_says_both_and_options_win(mest_compile_command, numbers, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'epochs = 1\nmethod = "static"\nlr = 0.01\n[run]\nmodel = "mlp"\nwidth = 16\nbatch = 16\ndata = "arrays"\n'
        'optimizer = "rmsprop:alpha=0.5"\n[run.loss]\nname = "smooth_l1"\nbeta = 0.5\n'
    )
    for options, loss in (((), {"name": "smooth_l1", "beta": 0.5}), (("--loss", "mse"), {"name": "mse"})):
        out = tmp_path / loss["name"]
        ran = mest_compile_command("train", "--recipe", recipe, "--data-folder", numbers, "--out", out, *options)
        assert ran.code == 0, ran.err
        found = facts_of(out)
        assert found["loss"] == loss and (found["optimizer"]["name"], found["optimizer"]["alpha"]) == ("rmsprop", 0.5)


def test_a_teacher_teaches_and_is_remembered(mest_compile_command, tmp_path):
    first, out = tmp_path / "first", tmp_path / "run"
    assert mest_compile_command("train", *SMALL, "--out", first).code == 0
    teacher = first / "best.safetensors"
    ran = mest_compile_command("train", *SMALL, "--loss", "distill:mix=0.75", "--teacher", teacher, "--out", out)
    assert ran.code == 0, ran.err
    assert json.loads((out / "source.json").read_text())["teacher"] == str(teacher)
    again = mest_compile_command("train", "--resume", out, "--json")
    assert again.code == 0 and len(again.document["epochs"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loss", "hinge"), "no loss 'hinge'; there are: bce, "),
        (("--loss", "huber:beta=1"), "loss 'huber' has no option 'beta'"),
        (("--optimizer", "adam:lr"), "cannot be read"),
        (("--loss", "mse"), "digits has classes, and the loss takes numbers; give data of arrays"),
        (("--loss", "distill"), "mest.Distill needs a teacher"),
        (("--lr", "0.1", "--optimizer", "adam:lr=0.2"), "leave one of the two out"),
    ],
)
def test_what_does_not_fit_is_one_line(mest_compile_command, tmp_path, options, message):
    ran = mest_compile_command("train", *SMALL, *options, "--out", tmp_path / "run")
    assert ran.code in (1, 2) and message in ran.err and not (tmp_path / "run" / "run.json").exists()


def test_an_artifact_has_both(mest_compile_command, tmp_path):
    out = tmp_path / "artifact"
    model = "--model", "mlp", "--width", "16", "--image", "1x4x4", "--classes", "1", "--batch", "8", "--target", "local"
    ran = mest_compile_command("build", *model, "--loss", "mse", "--optimizer", "sgd:momentum=0.0", "--out", out)
    assert ran.code == 0, ran.err
    alone = mest_compile_command("build", *model, "--out", tmp_path / "other")
    assert alone.code in (1, 2) and "one logit" in alone.err and "loss=mest.BCE()" in alone.err
    facts = json.loads((out / "manifest.json").read_text())["facts"]
    assert facts["loss"] == {"name": "mse"} and facts["optimizer"]["momentum"] == 0


def test_any_key_of_a_recipe_is_set_on_the_command_line(mest_compile_command, tmp_path):
    small = ("--model", "mlp", "--width", 16, "--epochs", 2, "--method", "static")
    ran = mest_compile_command(
        "train", *small, "--set", "warmup_epochs=1", "--set", "lr_schedule=step", "--set", "clip_norm=2.5",
        "--augment", "none", "--val-split", 0.2, "--patience", 3, "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    recipe = ran.document["recipe"]
    wanted = {"warmup_epochs": 1, "lr_schedule": "step", "clip_norm": 2.5, "augment": "none", "patience": 3}
    assert {name: recipe[name] for name in wanted} == wanted
    assert "val_accuracy" in ran.document["best"] and "images not augmented" in ran.err
    assert "to choose the best model by" in ran.err
    longer = mest_compile_command("train", "--resume", tmp_path / "run", "--epochs", 3, "--json")
    assert longer.code == 0 and longer.document["epochs"][:2] == ran.document["epochs"], longer.err
    for said, wanted in (
        ("warmup=1", "did you mean 'warmup_epochs'?"),
        ("epochs=3", "epochs is said twice"),
        ("lr", "wanted NAME=VALUE"),
        ("sieve=1", "wanted NAME=VALUE"),
        ("clip_norm=much", "clip_norm is 'much'"),
    ):
        ran = mest_compile_command("train", *small, "--set", said)
        assert ran.code == 2 and wanted in ran.err, ran.err

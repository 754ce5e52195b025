"""The command line: what it prints where, and its exit codes."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

import mest_compile as mest
from mest_compile import __version__
from mest_compile.hardware.target import target_names
from mest_compile.models.pretrained import read_weights
from mest_compile.runtime import checkpoint
from mest_compile.training.against import told
from mest_compile.training.loop import Trainer

HELP = """
import sys
from mest_compile.cli import main
try:
    main(["--help"])
finally:
    print(sorted({"torch", "tvm"} & set(sys.modules)))
"""


def test_help_loads_neither_torch_nor_tvm_and_costs_little_beside_what_it_is_written_with():
    ratios = []
    for _ in range(3):
        beside = cpu_seconds("import typer.rich_utils")[0]
        seconds, said = cpu_seconds(HELP)
        assert "train" in said and said.splitlines()[-1] == "[]"
        ratios.append(seconds / beside)
    assert min(ratios) < 3, ratios


def cpu_seconds(program: str) -> tuple[float, str]:
    """What a Python program takes of the processor, and what it prints."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, done.stdout


def test_version(mest_compile_command):
    assert mest_compile_command("--version").out == f"mest-compile {__version__}\n"


@pytest.mark.parametrize(
    "name",
    [
        "train",
        "finetune",
        "predict",
        "eval",
        "export",
        "bench",
        "table",
        "analyze",
        "demo",
        "models",
        "schemes",
        "targets",
        "doctor",
        "build",
        "tracker",
        "serve",
        "tune",
    ],
)
def test_every_command_is_in_the_help_and_takes_json(mest_compile_command, name):
    assert f" {name} " in mest_compile_command("--help").out
    assert "--json" in mest_compile_command(name, "--help").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["bench", "--batch", "0"], "--batch"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--colour", "blue"], "--colour"),
        (["train", "--learning-rate", "0.1"], "did you mean --lr?"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(mest_compile_command, arguments, said):
    ran = mest_compile_command(*arguments)
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and said in ran.err


def test_an_empty_call_prints_the_help_and_no_error_line(mest_compile_command):
    ran = mest_compile_command()
    assert ran.code == 2 and "Commands" in ran.out + ran.err and "error:" not in ran.err


def test_targets_as_table_and_as_json(mest_compile_command):
    document = mest_compile_command("targets", "--json").document
    assert [target["name"] for target in document] == target_names()
    assert all(target["llvm"]["kind"] for target in document)
    lines = mest_compile_command("targets").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == target_names()


@pytest.mark.parametrize(("listing", "key", "has"), [("models", "model", "resnet20"), ("schemes", "scheme", "block")])
def test_listings(mest_compile_command, listing, key, has):
    assert has in [entry[key] for entry in mest_compile_command(listing, "--json").document]
    assert f"\n{has}" in mest_compile_command(listing).out


def test_doctor_finds_this_machine_fit(mest_compile_command):
    ran = mest_compile_command("doctor", "--json")
    status = {check["name"]: check["status"] for check in ran.document}
    assert ran.code == 0 and "fail" not in status.values()
    assert {status[name] for name in ("apache-tvm", "apache-tvm-ffi", "torch", "tvm", "target local")} == {
        "ok"
    } and "OpenCL" in status


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("temporary", "as neither XDG_CACHE_HOME nor HOME leads to a folder that can be used"),
        ("file", "cannot be written (Not a directory)"),
        ("full", "MiB left; when it is full every start compiles again"),
        ("noexec", "is mounted noexec"),
        ("well", "GiB free"),
    ],
)
def test_doctor_looks_at_the_cache(how, said, tmp_path, monkeypatch):
    from mest_compile.cli import doctor
    from mest_compile.hardware import folders, host

    (tmp_path / "file").write_text("")
    place, spare = tmp_path / ("file/under" if how == "file" else how), tmp_path / "temporary"
    monkeypatch.setattr(folders, "cache_folder", lambda: place)
    monkeypatch.setattr(folders, "cache_folders", lambda: iter([place, spare]))
    monkeypatch.setattr(host, "forbids_execution", lambda folder: how == "noexec")
    free = {"full": 2**20}.get(how, 2**33)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    found = doctor._cache_folder()
    assert said in found.detail and found.status == ("ok" if how == "well" else "warn")


def test_doctor_compiles_a_kernel_with_the_linker_that_it_names(monkeypatch):
    from mest_compile.cli import doctor
    from mest_compile.kernels import linkers

    assert doctor._kernel().status == "ok"
    monkeypatch.setattr(linkers, "linkers", lambda architecture: [])
    found = doctor._kernel()
    assert found.status == "fail" and "pip install ziglang" in found.detail


def test_doctor_counts_the_cores_of_a_quota(monkeypatch):
    from mest_compile.cli import doctor
    from mest_compile.hardware import host

    monkeypatch.setattr(host, "cpu_quota", lambda: 1.5)
    assert doctor._threads().detail.startswith("1 of ") and "a quota of 1.5 cores" in doctor._threads().detail


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("build", "--out", "x", "--model", "net.onnx", "--width", 8), "an .onnx file has its width already"),
        (("build", "--out", "x", "--model", "net.onnx", "--classes", 8), "net.onnx has its classes already"),
        (("build", "--out", "x", "--scheme", "dense", "--sparsity", 0.5), "scheme dense has sparsity 0, not 0.5"),
        (("bench", "--profile", "--vs", "torch"), "--profile times our step alone"),
        (("tracker", "--query", "127.0.0.1:1", "--port", 9), "listens nowhere; leave out --port"),
        (("tune", "--key", "phone"), "--tracker and --key go together"),
        (
            ("tune", "--tracker", "127.0.0.1:1", "--key", "phone", "--runner", "local"),
            "the local runner asks no tracker",
        ),
        (("train", "--lower-density"), "to meet a memory_budget"),
    ],
)
def test_an_option_that_would_not_be_used_is_refused(arguments, said, mest_compile_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = mest_compile_command(*arguments)
    assert ran.code == 2 and said in ran.err and ran.err.count("\n") == 1, ran.err
    assert list(tmp_path.iterdir()) == []


def test_doctor_fails_when_a_package_has_the_wrong_version(mest_compile_command, monkeypatch):
    from mest_compile.cli import doctor

    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy<1", "no-such-package-of-mest>=2"])
    ran = mest_compile_command("doctor", "--json")
    checks = {check["name"]: check for check in ran.document}
    assert ran.code == 1
    assert checks["numpy"]["status"] == "fail" and "pip install 'numpy<1'" in checks["numpy"]["detail"]
    assert checks["no-such-package-of-mest"]["status"] == "fail"


def test_json_is_the_only_thing_on_stdout():
    done = subprocess.run(
        [sys.executable, "-c", "from mest_compile.cli import main; main(['targets', '--json'])"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and json.loads(done.stdout) and done.stderr == ""


TINY = ("--model", "mlp", "--width", 32, "--batch", 32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two epochs: (folder, what --json printed)."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from mest_compile.cli import main; main()",
            "train",
            *map(str, TINY),
            "--epochs",
            "2",
            "--seed",
            "3",
            "--out",
            str(folder),
            "--json",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line.split()[0] for line in lines if line.split()[0] in ("epoch", "1/2", "2/2")] == ["epoch", "1/2", "2/2"]
    assert any("2 of 3 layers sparse, " in line and f"; run folder {folder}" in line for line in lines)
    assert lines[-1].startswith(f"next: mest-compile report {folder} | ")
    assert (
        "digits: 1442 examples to train, 355 to test; images shifted by up to 1 pixels, not mirrored; method em; "
        "lr 0.1, " in done.stderr
    )
    return folder, json.loads(done.stdout)


def test_train_prints_the_run_and_writes_its_folder(trained):
    folder, document = trained
    assert (
        document["folder"] == str(folder) and document["recipe"]["seed"] == 3 and document["recipe"]["method"] == "em"
    )
    assert [epoch["epoch"] for epoch in document["epochs"]] == [1, 2]
    assert document["epochs"][1]["loss"] < document["epochs"][0]["loss"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == document["epochs"]
    source = json.loads((folder / "source.json").read_text())
    assert source.pop("command").endswith(f"--out {folder} --json")
    assert source == {"model": "mlp", "data": "digits", "data_folder": None}


def test_a_run_that_cannot_be_written_is_refused_before_anything_is_compiled(mest_compile_command, tmp_path):
    (tmp_path / "file").write_text("")
    ran = mest_compile_command("train", *TINY, "--epochs", 1, "--out", tmp_path / "file" / "run")
    assert ran.code == 2 and "compiling" not in ran.err
    assert (
        f"cannot write the run to {tmp_path}/file/run: {tmp_path}/file is no folder that can be written; pass "
        "another --out" in ran.err
    )


def test_a_target_that_is_not_this_machine_is_refused_before_anything_is_written(mest_compile_command, tmp_path):
    ran = mest_compile_command("train", *TINY, "--target", "cortex-a76", "--out", tmp_path / "run")
    assert ran.code == 2 and "--target cortex-a76 is not this machine (that is for aarch64" in ran.err
    assert "give the --tracker and --key of a device that it is" in ran.err
    assert not (tmp_path / "run").exists()


def test_an_onnx_file_trains_like_the_model_it_was_exported_from(trained, mest_compile_command, tmp_path):
    import torch

    from mest_compile.models.catalog import build_model

    images = torch.randn(32, 1, 8, 8)
    torch.onnx.export(
        build_model("mlp", tuple(images.shape), 10, 32, seed=3),
        (images,),
        tmp_path / "net.onnx",
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.TRAINING,
    )
    ran = mest_compile_command(
        "train",
        "--model",
        tmp_path / "net.onnx",
        "--batch",
        32,
        "--epochs",
        2,
        "--seed",
        3,
        "--out",
        tmp_path / "run",
        "--json",
    )
    assert ran.code == 0, ran.err
    assert [epoch["loss"] for epoch in ran.document["epochs"]] == [epoch["loss"] for epoch in trained[1]["epochs"]]


def test_a_finished_run_goes_on_for_longer_in_other_batches(trained, mest_compile_command, tmp_path):
    folder, document = trained
    shutil.copytree(folder, tmp_path / "run")
    before, _ = checkpoint.read(tmp_path / "run" / "checkpoint.safetensors")
    for options, said in (
        (["--batch", 16], "the run has made all of its 2 epochs; give epochs beside batch"),
        (["--epochs", 2], "the run has 2 epochs, of which 2 are made"),
        (["--epochs", 4, "--target", "cortex-a76"], "--target cortex-a76 is not this machine"),
    ):
        ran = mest_compile_command("train", "--resume", tmp_path / "run", *options)
        assert ran.code == 2 and said in ran.err
    trainer = Trainer.resume(tmp_path / "run", epochs=4, batch=16)
    assert trainer.step.batch == 16
    trainer.step.save(tmp_path / "step")
    after, _ = checkpoint.read(tmp_path / "step")
    held = [name for name in before if name.startswith("held/")]
    assert any(name.endswith(":momentum") for name in held)
    for name in held:
        np.testing.assert_array_equal(np.sort(after[name]), np.sort(before[name]), err_msg=name)
    ran = mest_compile_command("train", "--resume", tmp_path / "run", "--epochs", 4, "--batch", 16, "--json")
    assert ran.code == 0, ran.err
    epochs = ran.document["epochs"]
    assert epochs[:2] == document["epochs"] and [epoch["iterations"] for epoch in epochs] == [46, 46, 91, 91]
    assert epochs[2]["loss"] < epochs[0]["loss"]
    assert [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == epochs
    report = mest_compile_command("report", tmp_path / "run", "--json").document
    went_on = {"after_epoch": 2, "epochs": 4, "batch": 16, "target": "local"}
    assert report["epochs"] == report["of_epochs"] == 4 and report["continued"] == [went_on]
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert "<td>went on</td><td>after epoch 2 to 4, batch 16, local</td>" in page
    assert mest_compile_command("train", "--resume", tmp_path / "run", "--json").document == ran.document


def test_a_report_tells_the_step_beside_its_dense_twin(trained, mest_compile_command, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained[0], folder)
    ran = mest_compile_command("report", folder, "--against-dense", "--json")
    assert ran.code == 0, ran.err
    found = ran.document["against_dense"]
    assert (
        found == json.loads((folder / "dense.json").read_text()) and found["low"] <= found["speedup"] <= found["high"]
    )
    step = mest.load(folder)
    assert found["planned_bytes"] == step.memory()["total"] < found["dense_planned_bytes"]
    times = (
        f"{found['step_seconds'] * 1e3:.2f} ms against {found['dense_seconds'] * 1e3:.2f}: {found['speedup']:.2f} times"
    )
    page = (folder / "report" / "report.html").read_text()
    assert f"<td>our dense step</td><td>{times} as fast (" in page
    assert "busy: times do not compare" in told(found | {"others_cores": 0.6}) and "busy" not in told(
        found | {"others_cores": 0.4}
    )


@pytest.mark.parametrize("form", ["onnx", "torch", "safetensors"])
def test_the_model_of_a_run_comes_out(trained, mest_compile_command, tmp_path, form):
    folder, _ = trained
    scaled = ["--scaled"] if form == "onnx" else []  # of pixels: tests/training/test_predicting.py
    ran = mest_compile_command("export", folder, "--format", form, "--out", tmp_path / "new" / "net", "--json", *scaled)
    assert ran.code == 0, ran.err
    assert ran.document["format"] == form and ran.document["bytes"] == (tmp_path / "new" / "net").stat().st_size
    step = mest.load(folder / "checkpoint.safetensors")
    state, masks = step.state_dict(), step.masks()
    assert list(ran.document["sparsity"]) == list(masks)
    if form == "onnx":
        import onnxruntime

        x = np.random.default_rng(0).standard_normal((5, *step.input_shape[1:])).astype(np.float32)
        (found,) = onnxruntime.InferenceSession(tmp_path / "new" / "net").run(None, {"input": x})
        np.testing.assert_allclose(found, step.predict(x), rtol=0, atol=1e-5)
        return
    if form == "torch":
        import torch

        found = {name: one.numpy() for name, one in torch.load(tmp_path / "new" / "net", weights_only=True).items()}
    else:
        found = load_file(tmp_path / "new" / "net")
        assert {name: found.pop(f"mask:{name}").tolist() for name in masks} == {
            name: mask.tolist() for name, mask in masks.items()
        }
        small = tmp_path / "small.safetensors"
        ran = mest_compile_command("export", folder, "--format", form, "--compressed", "--out", small, "--json")
        assert ran.code == 0 and ran.document["bytes"] < 0.7 * (tmp_path / "new" / "net").stat().st_size, ran.err
        for path in (small, tmp_path / "new" / "net"):
            read, read_masks = mest.read_safetensors(path)
            assert read.keys() == state.keys() and read_masks.keys() == masks.keys()
            assert all(np.array_equal(read[name], array) for name, array in state.items())
            assert all(np.array_equal(read_masks[name], mask) for name, mask in masks.items())
            assert {name: tuple(one.shape) for name, one in read_weights(path).items()} == {
                name: array.shape for name, array in state.items()
            }
        content = small.read_bytes()
        for damaged in (content[:-5], content.replace(b"bits:", b"bats:", 1), content[:-1] + bytes([content[-1] ^ 1])):
            small.write_bytes(damaged)
            with pytest.raises(mest.MestError, match="small.safetensors is no whole safetensors file"):
                mest.read_safetensors(small)
        with pytest.raises(mest.MestError, match="absent cannot be read"):
            mest.read_safetensors(tmp_path / "absent")
    assert found.keys() == state.keys() and masks
    for name, array in state.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_what_cannot_come_out_is_said(trained, mest_compile_command, tmp_path):
    folder, _ = trained
    (tmp_path / "empty").mkdir()
    for arguments, code, said in (
        ((folder, "--format", "pickle"), 2, "no format 'pickle'; there are: onnx, torch, safetensors"),
        ((folder, "--format", "torch", "--opset", 18), 2, "--opset belongs to --format onnx"),
        ((folder, "--format", "torch", "--compressed"), 2, "--compressed belongs to --format safetensors"),
        ((folder, "--format", "onnx", "--into", tmp_path / "no.onnx"), 1, "no.onnx cannot be read"),
        ((tmp_path / "empty", "--format", "torch"), 1, "no checkpoint"),
        ((folder / "recipe.json", "--format", "torch"), 1, "recipe.json is damaged"),
    ):
        ran = mest_compile_command("export", *arguments, "--out", tmp_path / "net")
        assert ran.code == code and said in ran.err, ran.err
    assert not (tmp_path / "net").exists()


def test_resuming_a_finished_run_gives_the_same_result(trained, mest_compile_command):
    folder, document = trained
    assert mest_compile_command("train", "--resume", folder, "--json").document == document


def test_a_net_with_ninety_percent_zeros_learns_digits(mest_compile_command, tmp_path):
    ran = mest_compile_command(
        "train",
        "--model",
        "resnet20",
        "--width",
        8,
        "--scheme",
        "block:4x1",
        "--sparsity",
        0.9,
        "--epochs",
        20,
        "--out",
        tmp_path / "run",
        "--json",
    )
    assert ran.code == 0, ran.err
    assert ran.document["test_accuracy"] > 0.9  # seeds 0, 1, 2 gave 0.98, 0.95, 0.94; guessing gives 0.1
    fates = [epoch["mutation"]["layers"] for epoch in ran.document["epochs"][1:10]]
    assert fates == [{"re-indexed": 18}] * 9  # the mask moved, and no kernel was compiled for it


def test_a_folder_with_a_run_is_not_overwritten(trained, mest_compile_command):
    folder, _ = trained
    before = {path: path.read_bytes() for path in folder.iterdir()}
    ran = mest_compile_command("train", *TINY, "--out", folder)
    assert ran.code == 2 and "already holds a run" in ran.err and ran.err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_cut_in_half_costs_an_epoch_and_two_are_one_line(trained, mest_compile_command, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(trained[0], folder)
    for name, code in ("checkpoint", 0), ("checkpoint.previous", 1):
        for path in folder.glob(f"{name}.safetensors"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if code:
            (folder / "checkpoint.safetensors").write_bytes(b"")
        ran = mest_compile_command("train", "--resume", folder, "--json")
        assert ran.code == code
        if code:
            assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
        else:
            assert [epoch["loss"] for epoch in ran.document["epochs"]] == [
                epoch["loss"] for epoch in trained[1]["epochs"]
            ]


def test_the_quick_recipe_uses_every_part_of_the_method(mest_compile_command, tmp_path):
    recipe = Path(__file__).parents[2] / "examples" / "recipes" / "quick.toml"
    ran = mest_compile_command("train", "--recipe", recipe, "--width", 32, "--out", tmp_path / "run", "--json")
    assert ran.code == 0, ran.err
    epochs = ran.document["epochs"]
    assert [epoch["mutation"] is None for epoch in epochs] == [True, False, False, False]
    assert [epoch["sieve"] and epoch["sieve"]["dropped"] for epoch in epochs] == [None, None, 144, None]
    assert epochs[3]["iterations"] < epochs[0]["iterations"] and epochs[3]["iterations_saved"] > 0
    assert "sieved 144" in ran.err and " 0.750  " in ran.err and " 0.800\n" in ran.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"]["schemes"]["fc1.weight"] == "unstructured"


def test_options_override_the_recipe_file_and_dense_needs_no_method(mest_compile_command, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('epochs = 9\nmethod = "static"\nlr = 0.05\n')
    ran = mest_compile_command(
        "train", *TINY, "--scheme", "dense", "--recipe", recipe, "--epochs", 1, "--out", tmp_path / "run", "--json"
    )
    assert ran.code == 0, ran.err
    chosen = ran.document["recipe"]
    assert (chosen["epochs"], chosen["method"], chosen["lr"]) == (1, "static", 0.05)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--sparsity", 1.2], 2, "1.2"),
        (["--sparsity", 0.0], 2, "static"),
        (["--scheme", "dense", "--sparsity", 0.5], 2, "dense"),
        (["--scheme", "plaid"], 2, "plaid"),
        (["--scheme", "block:4by1"], 2, "ROWSxCOLUMNS"),
        (["--width", 30], 2, "multiples of 4"),
        (["--model", "abacus"], 2, "abacus"),
        (["--model", "absent.onnx"], 1, "absent.onnx"),
        (["--model", "absent.onnx", "--width", 8], 2, "--width"),
        (["--target", "abacus"], 2, "abacus"),
        (["--data", "abacus"], 2, "abacus"),
        (["--data", "cifar10"], 1, "--data-folder"),
        (["--method", "snip"], 2, "no method 'snip'"),
        (["--sieve", "1.5"], 2, "share between 0 and 1"),
        (["--out", ""], 2, "--out is given an empty text"),
        (["--data-folder", " "], 2, "--data-folder is given an empty text"),
        (["--recipe="], 2, "--recipe is given an empty text"),
        (["--out", "a" * 300], 2, "File name too long"),
        (["--lr", "1e39"], 2, "lr is 1e+39"),
        (["--lr", "nan"], 2, "lr is nan"),
        (["--distribution", "bell"], 2, "bell"),
        (["--recipe", "absent.toml"], 2, "absent.toml"),
        (["--resume", "absent"], 1, "absent"),
        (["--resume", "absent", "--lr", 0.1], 2, "--lr"),
    ],
)
def test_what_train_cannot_mean_is_one_line_and_writes_nothing(
    mest_compile_command, tmp_path, monkeypatch, options, code, said
):
    monkeypatch.chdir(tmp_path)
    given = options if {"--resume", "--model"} & set(options) else ["--model", "mlp", "--width", 32, *options]
    ran = mest_compile_command("train", *given)
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and said in ran.err, ran.err
    assert ran.code == code and ran.out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "bench", "table", "analyze", "build", "tune", "plan", "report", "serve"])
def test_an_empty_argument_is_refused_in_every_command(mest_compile_command, command):
    ran = mest_compile_command(command, "--target", "")
    assert (
        (ran.code, ran.out) == (2, "")
        and ran.err.startswith("error: --target is given an empty text; ")
        and ran.err.count("\n") == 1
    )


def raising(problem):
    def fail(*_, **__):
        raise problem

    return fail


EVERYWHERE = [
    ("mest_compile.data.load", ["train"]),
    ("mest_compile.compiling.compile_step", ["train"]),
    ("mest_compile.compiling.compile_step", ["plan"]),
    ("mest_compile.compiling.compile_step", ["build", "--out", "a"]),
    ("mest_compile.measuring.benchmark.compare", ["bench"]),
    ("mest_compile.tuning.command.tune", ["tune"]),
    ("mest_compile.measuring.speedtable.speed_table", ["table"]),
    ("mest_compile.training.reporting.write_report", ["report", "a"]),
    ("mest_compile.models.sources.model_to_read", ["analyze"]),
]
FAULTS = [
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(28, "No space left on device", "a/b"), 1, "a/b: No space left on device"),
    (PermissionError(13, "Permission denied"), 1, "Permission denied"),
    (MemoryError(), 1, "not enough memory"),
]


@pytest.mark.parametrize(
    ("where", "arguments", "problem", "code", "said"),
    [*((*place, *FAULTS[0]) for place in EVERYWHERE), *((*EVERYWHERE[0], *fault) for fault in FAULTS[1:])],
)
def test_an_everyday_fault_anywhere_is_one_line(
    mest_compile_command, tmp_path, monkeypatch, where, arguments, problem, code, said
):
    import mest_compile

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(mest_compile.__dict__, "compile", mest_compile.compile)  # so that undoing leaves no name behind
    monkeypatch.setattr(where, raising(problem))
    ran = mest_compile_command(*arguments)
    assert (
        ran.code == code
        and ran.out == ""
        and ran.err.splitlines()[-1].startswith("error: ")
        and said in ran.err.splitlines()[-1]
    )


def test_an_interrupted_run_says_how_to_go_on_where_there_is_something_to_go_on_from(
    mest_compile_command, tmp_path, monkeypatch
):
    from mest_compile.training.loop import Trainer

    monkeypatch.setattr(Trainer, "_train", raising(KeyboardInterrupt()))
    ran = mest_compile_command("train", *TINY, "--out", tmp_path / "run")
    assert ran.code == 130 and "error: interrupted" in ran.err
    assert f"continue with: mest-compile train --resume {tmp_path}/run" in ran.err.replace("\n", " ")
    monkeypatch.setattr(Trainer, "_begin", raising(KeyboardInterrupt()))
    ran = mest_compile_command("train", *TINY, "--out", tmp_path / "other")
    assert ran.code == 130 and "error: interrupted" in ran.err and "continue with" not in ran.err


def test_with_json_nothing_else_reaches_stdout(tmp_path):
    code = (
        "import os, subprocess, sys, mest_compile.cli.listing as listing; from mest_compile.cli import main\n"
        "show = listing._show\n"
        "def noisy(*a):\n"
        " print('a line of Python'); os.write(1, b'a line of C'); subprocess.run(['echo', 'a line of a child']); "
        "show(*a)\n"
        "listing._show = noisy; main(['models', '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)
    assert all(f"a line of {who}" in done.stderr for who in ("Python", "C", "a child"))


@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"]])
def test_a_reader_that_has_heard_enough_ends_the_command_quietly(arguments):
    code = f"import sys; from mest_compile.cli import main; sys.stdin.read(); main({arguments})"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    process.stdout.close()
    assert process.communicate("")[1] == "" and process.returncode == 1


@pytest.mark.parametrize("main", ["mest_compile.cli", "mest_compile.ondevice"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--resume", "run", "--lr", "0.1"], "leave out --lr"),
        (["--resume", "run", "--out", "other"], "leave out --out"),
        (["--out", ""], "--out is given an empty text"),
        (["--threads", "0"], "threads"),
        (["--recipe", "absent.toml"], "absent.toml"),
    ],
)
def test_both_command_lines_of_an_artifact_refuse_alike(capsys, main, options, said):
    import importlib

    try:
        code = importlib.import_module(main).main(["train", "--artifact", "absent", *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and said in capsys.readouterr().err


def test_on_a_device_options_override_the_recipe(monkeypatch, tmp_path):
    from mest_compile import ondevice
    from mest_compile.base.errors import DataError

    (tmp_path / "recipe.toml").write_text('epochs = 9\nmethod = "static"\nlr = 0.05\n')
    jobs = []
    monkeypatch.setattr(ondevice, "open_job", lambda job: jobs.append(job) or raising(DataError("enough"))())
    assert ondevice.main(["train", "--artifact", "a", "--recipe", str(tmp_path / "recipe.toml"), "--epochs", "3"]) == 1
    assert ondevice.main(["train", "--artifact", "a"]) == 1
    assert (jobs[0].recipe.epochs, jobs[0].recipe.method, jobs[0].recipe.lr) == (3, "static", 0.05)
    assert (jobs[1].recipe.epochs, jobs[1].recipe.method, jobs[1].recipe.lr) == (10, "em", None)


@pytest.mark.parametrize("main", ["mest_compile.cli", "mest_compile.ondevice"])
@pytest.mark.parametrize(("options", "epochs"), [([], None), (["--epochs", "12"], 12)])
def test_a_run_on_a_device_goes_on_for_longer(monkeypatch, capsys, main, options, epochs):
    import importlib

    from mest_compile.training import ondevice

    asked = []
    monkeypatch.setattr(ondevice, "load", lambda *_: None)
    monkeypatch.setattr(ondevice, "open_artifact", lambda *_: "step")
    monkeypatch.setattr(ondevice.Trainer, "resume", lambda *given, **named: asked.append((given, named)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(main).main(["train", "--artifact", "a", "--resume", "run", *options])
    assert asked == [((Path("run"), "step"), {"epochs": epochs})]


@pytest.mark.slow
def test_the_demo_from_scratch_trains_and_compares(mest_compile_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = mest_compile_command("demo", "--scratch", "--quick", "--json")
    assert ran.code == 0, ran.err
    assert ran.document["comparison"]["ratio"] > 0 and 0 < ran.document["test_accuracy"] <= 1
    assert (tmp_path / ran.document["folder"] / "metrics.jsonl").exists()


def test_a_command_that_ends_with_an_error_keeps_no_later_ones_result(capsys):
    from mest_compile.base.commandline import print_result, results_alone

    with pytest.raises(ValueError, match="the command's"), results_alone():
        raise ValueError("the command's")
    with redirect_stdout(StringIO()) as later:
        print_result("later")
    assert later.getvalue() == "later\n" and not capsys.readouterr().out

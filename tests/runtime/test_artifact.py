"""Artifacts: trained where there is no compiler, checked before they are used, clean of what a device does not have."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import artifacts
import numpy as np
import pytest
import tvm_ffi
from device import emulated
from nets import short_resnet
from test_step import make_batches
from test_training import Interrupter, interrupt

import mest_compile as mest
from mest_compile.base import tensorfile
from mest_compile.compiling import compile_step
from mest_compile.data import load
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.runtime import artifact, checkpoint, library
from mest_compile.training.loop import Trainer
from mest_compile.training.recipe import Recipe

SHAPE = (64, 1, 8, 8)
RECIPE = Recipe(epochs=3, method="em", lr=0.01, mutate_every=1, drop_last=True)  # as an artifact does
OPTIONS = ["--data", "arrays", "--threads", "1", "--json"]
HEAVY = (
    "tvm",
    "torch",
    "typer",
    "rich",
    "safetensors",
    "platformdirs",
    "packaging",
    "pandas",
    "sklearn",
    "matplotlib",
    "PIL",
    "tornado",
)


def compiled(target="local", **options):
    return mest.compile(
        short_resnet(SHAPE),
        SHAPE,
        scheme="block",
        sparsity=0.9,
        target=target,
        threads=1,
        optimizer=mest.SGD(lr=0.01),
        **options,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of the digits as arrays: 22 steps an epoch."""
    folder, split = tmp_path_factory.mktemp("data"), load("digits")
    for name, part in (("train", split.train), ("test", split.test)):
        np.savez(folder / f"{name}.npz", images=part.images, labels=part.labels)
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "local"
    compiled().export(folder)
    return folder


def bare_site(folder: Path) -> Path:
    """A folder of packages that holds what a device needs and nothing else."""
    folder.mkdir()
    for package in (Path(np.__file__).parent, Path(tvm_ffi.__file__).parent):
        for path in package.parent.glob(f"{package.name}*"):
            if not path.name.endswith(".dist-info"):
                (folder / path.name).symlink_to(path)
    import typing_extensions

    (folder / "typing_extensions.py").symlink_to(typing_extensions.__file__)
    lay_package(folder / "mest_compile")
    return folder


def lay_package(folder: Path) -> None:
    """As a wheel lays it: with the folders of the top level that are installed inside."""
    folder.mkdir()
    package = Path(mest.__file__).parent
    for entry in (*package.iterdir(), *(package.parent / name for name in ("schedules", "targets", "autotune_logs"))):
        (folder / entry.name).symlink_to(entry)


class Device:
    """How a Python without compiler, torch or tvm is started: this machine's, or the emulated device's."""

    def __init__(self, folder: Path, kind: str, made: Path):
        self.artifact = folder / "artifact"
        shutil.copytree(made, self.artifact)
        (folder / "empty").mkdir()
        runtime = Path(tvm_ffi.__file__).parent.parent / "tvm" / "lib" / library.RUNTIME
        if kind == "emulated":
            site, runtime = folder / "site", emulated.FOLDER / "device" / library.RUNTIME
            shutil.copytree(emulated.FOLDER / "site", site, symlinks=True)
            lay_package(site / "mest_compile")
            root = emulated.FOLDER / "root"
            self.command = [shutil.which("qemu-aarch64"), "-L", str(root), str(root / "usr/bin/python3.11")]
        else:
            site, self.command = bare_site(folder / "site"), [sys.executable]
        shutil.copy(runtime, self.artifact)
        # -S: no packages but those in `site`. PATH: an empty folder, so that there is no compiler, linker or shell to
        # be found.
        self.command += ["-S", "-m", "mest_compile"]
        self.environment = {
            "PATH": str(folder / "empty"),
            "PYTHONPATH": str(site),
            "PYTHONDONTWRITEBYTECODE": "1",
            "QEMU_CPU": "cortex-a76",
        }

    def start(self, *arguments):
        return subprocess.Popen(
            [*self.command, *map(str, arguments)],
            env=self.environment,
            cwd="/",
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments):
        process = self.start(*arguments)
        out, err = process.communicate(timeout=400)
        return process.returncode, out, err


@pytest.mark.parametrize("kind", ["here", "emulated"])
def test_a_device_without_a_compiler_trains_is_killed_resumes_and_ends_as_the_compiled_step(
    kind, data, local, tmp_path
):
    made = local
    if kind == "emulated":
        if (why := emulated.missing()) is not None:
            pytest.skip(why)
        made = tmp_path / "made"
        compiled("arm_cpu").export(made)
    device, run = Device(tmp_path, kind, made), tmp_path / "run"
    asked = ["train", "--artifact", device.artifact, "--data-folder", data, *OPTIONS]
    process = device.start(*asked, "--epochs", 3, "--lr", 0.01, "--out", run)
    for _ in range(4000):
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= 1:
            break
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, out, err = device.run(*asked, "--resume", run)
    assert code == 0, err
    history = json.loads(out)["epochs"]
    assert sum(epoch["iterations"] for epoch in history) >= 50
    split = load("arrays", data)
    whole = Trainer(compiled(), RECIPE, tmp_path / "whole").fit(split.train, split.test)
    losses = [[epoch["loss"] for epoch in epochs] for epochs in (history, whole.history)]
    assert history[1]["mutation"]["layers"] == {"re-indexed": 6}
    (got, _), (wanted, _) = (checkpoint.read(folder / "checkpoint.safetensors") for folder in (run, tmp_path / "whole"))
    if kind == "here":  # the same instructions, so the same bits
        assert losses[0] == losses[1] and got.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(got[name], array, name)
    else:  # sums in another order, a rate at which rounding does not grow beyond this in three epochs
        np.testing.assert_allclose(losses[0], losses[1], rtol=0.03)


def test_one_step_from_an_artifact_has_the_bits_of_the_compiled_one(local):
    step, twin = mest.open_artifact(local), compiled()
    batches = make_batches(SHAPE, 10, 3)
    for batch in batches[:2]:
        assert step(*batch).loss == twin(*batch).loss
    for one in (step, twin):
        one.mutate(prune_to=0.92, grow_to=0.9, rng=np.random.default_rng(0))
    assert step(*batches[2]).loss == twin(*batches[2]).loss
    np.testing.assert_array_equal(step.predict(batches[0][0]), twin.predict(batches[0][0]))
    with pytest.raises(mest.MestError, match="3 examples came, and this step has code for 64 at a time"):
        step(*make_batches((3, *SHAPE[1:]), 10, 1)[0])
    with pytest.raises(mest.MestError, match="gradients of dead weights need a dense step"):
        step.dense_gradients(*batches[0])
    with pytest.raises(mest.MestError, match="has no compiler to make another"):
        step.export("another")


def test_an_artifact_makes_the_passes_that_it_was_built_to_of_any_multiple(mest_compile_command, tmp_path):
    options = ["--model", "mlp", "--image", "1x8x8", "--batch", 8, "--target", "local", "--threads", 1]
    built = mest_compile_command("build", *options, "--microbatch", 2, "--out", tmp_path / "made", "--json")
    assert built.code == 0, built.err
    step = mest.open_artifact(tmp_path / "made")
    twin = mest.load(tmp_path / "made" / artifact.STATE)
    assert (step.batch, step.microbatch, step.whole_batches) == (8, 2, True)
    for size in (8, 6):
        batch = make_batches((size, 1, 8, 8), 10, 1)[0]
        assert step(*batch).loss == twin(*batch).loss
    for name, value in twin.state_dict().items():
        np.testing.assert_array_equal(step.state_dict()[name], value)
    with pytest.raises(mest.MestError, match="5 examples came, and this step has code for 2 at a time"):
        step(*make_batches((5, 1, 8, 8), 10, 1)[0])


def test_modules_of_a_device_import_numpy_and_nothing_heavier():
    script = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise ImportError(f"a device has no {{name}}")
sys.meta_path.insert(0, Refuse())
import mest_compile.ondevice
from mest_compile.data import SOURCES
from mest_compile.operators.layers.family import FAMILIES
from mest_compile.operators.operator import OPERATORS
from mest_compile.sparsity.scheme import SCHEMES
for registry in (SOURCES, FAMILIES, OPERATORS, SCHEMES):
    registry.load()
print("tvm_ffi" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0 and done.stdout == "False\n", done.stderr


def edit(path, **changes):
    manifest = json.loads((path / artifact.MANIFEST).read_text())
    sign(path, manifest | changes)


def sign(path, manifest):
    """Writes a manifest as whoever made it would have."""
    manifest.pop("digest")
    (path / artifact.MANIFEST).write_text(json.dumps(manifest | {"digest": artifact._digest(manifest)}))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def foreign(path):
    """The library of another machine, as whoever built it would have signed it."""
    made = path.parent / "foreign"
    compiled("arm_cpu").export(made)
    shutil.rmtree(path)
    shutil.copytree(made, path)


def newer_cpu(path):
    manifest = json.loads((path / artifact.MANIFEST).read_text())
    manifest["facts"]["target"]["llvm"] = [["kind", "llvm"], ["mcpu", "x86-64-v4"]]
    manifest["features"].append("avx512f")
    sign(path, manifest)


DAMAGE = {
    "library": (lambda path: flip(path / "step.so"), "step.so is not what was built"),
    "state": (lambda path: flip(path / "state.safetensors"), "state.safetensors is not what was built"),
    "missing": (lambda path: (path / "step.so").unlink(), "no whole artifact: step.so is missing"),
    "manifest": (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
    "format": (lambda path: edit(path, format="mest-compile artifact 9"), "of format 'mest-compile artifact 9'"),
    "arrays": (lambda path: edit(path, functions={}), "whose steps have other arrays"),
    "facts": (lambda path: edit(path, facts={}), "lacks 'graph'"),
    "machine": (foreign, "is for aarch64, target 'arm_cpu'; this machine is"),
}


def test_the_page_has_the_recorded_sizes():
    page = artifacts.DOCUMENT.read_text()
    assert artifacts.embed(page, artifacts.table(json.loads(artifacts.RESULTS.read_text()))) == page, (
        "run python benchmarks/artifacts.py"
    )


@pytest.mark.parametrize("case", DAMAGE)
def test_what_does_not_fit_is_refused_before_it_is_loaded(case, local, tmp_path):
    shutil.copytree(local, tmp_path / "copy")
    DAMAGE[case][0](tmp_path / "copy")
    with pytest.raises(mest.MestError, match=DAMAGE[case][1]) as caught:
        mest.open_artifact(tmp_path / "copy")
    assert "\n" not in str(caught.value)


def test_a_cpu_that_lacks_what_the_kernels_use_is_refused(local, tmp_path, monkeypatch):
    shutil.copytree(local, tmp_path / "copy")
    newer_cpu(tmp_path / "copy")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : sse4_2 avx2 fma bmi2\n")
    monkeypatch.setattr("mest_compile.hardware.host.CPUINFO", cpuinfo)
    with pytest.raises(mest.MestError, match="this machine's CPU lacks .*avx512f"):
        mest.open_artifact(tmp_path / "copy")


def test_build_tells_sizes_and_replaces_an_artifact_whole(mest_compile_command, tmp_path):
    out = tmp_path / "made"
    options = [
        "build",
        "--model",
        "mlp",
        "--width",
        32,
        "--image",
        "1x8x8",
        "--scheme",
        "unstructured",
        "--out",
        out,
        "--json",
    ]
    for _ in range(2):
        ran = mest_compile_command(*options)
        assert ran.code == 0, ran.err
    assert ran.document["bytes"] == sum((out / name).stat().st_size for name in ("step.so", "state.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    lean = mest_compile_command(*options, "--memory-budget", ran.document["memory_bytes"] - 1)
    assert lean.code == 2 and "memory_budget is" in lean.err  # nothing in so small a net can be computed again
    roomy = mest_compile_command(*options, "--grow-to", 0.8)
    assert roomy.document["memory_bytes"] > ran.document["memory_bytes"]
    (tmp_path / "mine").mkdir()
    assert mest_compile_command(*options[:-2], tmp_path / "mine").code == 2


def test_the_command_line_trains_from_an_artifact(mest_compile_command, local, data, tmp_path):
    ran = mest_compile_command(
        "train", "--artifact", local, "--data", "digits", "--epochs", 1, "--out", tmp_path / "run", "--json"
    )
    assert ran.code == 0 and ran.document["epochs"][0]["iterations"] == 22, ran.err
    refused = mest_compile_command("train", "--artifact", local, "--scheme", "pattern")
    assert refused.code == 2 and "the artifact has its --scheme already" in refused.err


def test_files_of_arrays_are_safetensors_files(tmp_path):
    from safetensors.numpy import load as other_load
    from safetensors.numpy import save as other_save

    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b": np.arange(5, dtype=np.int64),
        "c": np.array([True, False, True]),
        "d": np.zeros((0, 2), np.uint8),
        "e": np.array(1.5),
    }
    packed = tensorfile.pack(arrays, {"format": "x"})
    for got in (other_load(packed), tensorfile.unpack(packed)[0], tensorfile.unpack(other_save(arrays))[0]):
        assert got.keys() == arrays.keys()
        for name, array in arrays.items():
            assert got[name].dtype == array.dtype and got[name].shape == array.shape
            np.testing.assert_array_equal(got[name], array)
    assert tensorfile.unpack(packed)[1] == {"format": "x"}
    for cut in range(0, len(packed), 7):
        with pytest.raises(ValueError):  # noqa: PT011
            tensorfile.unpack(packed[:cut])


FROZEN = """
epochs = 6
method = "em_s"
lr = 0.05
mutate_every = 1
drop_last = true
[freeze]
share = 0.25
begin = 0.3
[run]
model = "mlp"
width = 32
batch = 64
scheme = "unstructured"
sparsity = 0.8
"""


def test_an_artifact_freezes_as_it_was_built_to_and_goes_on(mest_compile_command, data, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(FROZEN)
    built = ["build", "--recipe", recipe, "--image", "1x8x8", "--target", "local", "--threads", 1]
    ran = mest_compile_command(*built, "--out", tmp_path / "made")
    assert ran.code == 0, ran.err
    device, run, split = Device(tmp_path, "here", tmp_path / "made"), tmp_path / "run", load("arrays", data)
    code, out, err = device.run(
        "train", "--artifact", device.artifact, "--data-folder", data, *OPTIONS, "--recipe", recipe, "--out", run
    )
    assert code == 0, err
    told = [epoch["freeze"]["now"] for epoch in json.loads(out)["epochs"]]
    assert [name for names in told for name in names] == ["fc1", "fc2"] and told[0] == []
    chosen = Recipe.from_file(recipe)
    options = chosen.step_options(StepOptions("unstructured", 0.8, threads=1))
    whole = compile_step(build_model("mlp", SHAPE, 10, 32, 0), SHAPE, options)
    Trainer(whole, chosen, tmp_path / "whole").fit(split.train, split.test)
    stopped = Trainer(
        mest.open_artifact(tmp_path / "made", threads=1), chosen, tmp_path / "stopped", Interrupter(5, 3, interrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(split.train, split.test)
    again = Trainer.resume(tmp_path / "stopped", mest.open_artifact(tmp_path / "made", threads=1))
    again.fit(split.train, split.test)
    wanted, _ = checkpoint.read(tmp_path / "whole" / "checkpoint.safetensors")
    for folder in (run, tmp_path / "stopped"):
        got, _ = checkpoint.read(folder / "checkpoint.safetensors")
        assert got.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(got[name], array, name)
    with pytest.raises(mest.MestError, match="built to freeze other parts, or in another order"):
        mest.open_artifact(tmp_path / "made").freeze("fc2.*")
    for options, said in (
        (["--grow-to", 0.5], "leave --grow-to out"),
        (["--checkpoint", run / "checkpoint.safetensors"], "leave it out"),
    ):
        ran = mest_compile_command(*built, *options, "--out", tmp_path / "no")
        assert ran.code == 2 and said in ran.err
    recipe.write_text(FROZEN.replace("begin", 'of = "time"\nbegin'))
    ran = mest_compile_command(*built, "--out", tmp_path / "no")
    assert ran.code == 2 and 'give of = "flops"' in ran.err

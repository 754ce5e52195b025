"""A checkpoint that goes on with another batch, or on another device."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch.nn as nn

import mest_compile as mest
from mest_compile import compiling
from mest_compile.hardware.target import find_target
from mest_compile.kernels.elf import read_library
from mest_compile.models.catalog import build_model
from mest_compile.planning.retargeting import retargeted
from mest_compile.records.log import Choice, Records
from mest_compile.records.record import STEP
from mest_compile.runtime import checkpoint

rng = np.random.default_rng(0)
X, Y = rng.standard_normal((8, 2, 6, 6)).astype("f"), np.arange(8) % 3


@pytest.fixture(scope="module")
def net():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )


@pytest.fixture(scope="module")
def trained(net, tmp_path_factory):
    """(a step that trained and mutated, its checkpoint)."""
    step = mest.compile(
        net,
        X.shape,
        scheme="unstructured",
        sparsity=0.5,
        threads=1,
        grow_to=0.4,
        optimizer=mest.SGD(lr=0.03, momentum=0.8),
    )
    step(X, Y)
    step.mutate(0.5, 0.45, rng=np.random.default_rng(1))
    step(X, Y)
    path = tmp_path_factory.mktemp("trained") / "checkpoint"
    step.save(path, {"epoch": 3})
    return step, path


def same_state(path, other):
    """All arrays and random numbers of two checkpoints, which may lie in another order."""
    (one, facts), (two, others) = (checkpoint.read(each) for each in (path, other))
    assert one.keys() == two.keys() and facts["rng"] == others["rng"] and facts["optimizer"] == others["optimizer"]
    for name, array in one.items():
        if name.startswith("order/"):
            weight, sorts = name.removeprefix("order/"), [np.argsort(each[name], kind="stable") for each in (one, two)]
            np.testing.assert_array_equal(array[sorts[0]], two[name][sorts[1]])
            for part in ("", ":momentum", ":gradient"):
                held = [
                    each[f"held/{weight}{part}"].reshape(len(sort), -1)[sort] for each, sort in zip((one, two), sorts)
                ]
                np.testing.assert_array_equal(*held, err_msg=name + part)
        elif not name.startswith(
            tuple(f"held/{order.removeprefix('order/')}" for order in one if order.startswith("order/"))
        ):
            np.testing.assert_array_equal(array, two[name], name)


def test_another_batch_goes_on_with_weights_masks_momentum_and_statistics(net, trained, tmp_path):
    step, path = trained
    smaller = mest.load(path, batch=4)
    smaller.save(tmp_path / "smaller")
    same_state(path, tmp_path / "smaller")
    assert smaller.input_shape == (4, 2, 6, 6) and smaller.describe()["threads"] == 1
    np.testing.assert_allclose(smaller.predict(X), step.predict(X), rtol=1e-5, atol=1e-6)
    twin = mest.compile(net, (4, *X.shape[1:]), scheme="unstructured", sparsity=0.5, threads=1, grow_to=0.4)
    twin.set_masks(step.masks())
    twin.load_state_dict(step.state_dict())
    wanted = twin.gradients(X[:4], Y[:4])
    for name, gradient in smaller.gradients(X[:4], Y[:4]).items():
        np.testing.assert_allclose(gradient, wanted[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_another_target_goes_on_with_all_state_and_is_built_for_it(trained, tmp_path, mest_compile_command):
    _, path = trained
    ran = mest_compile_command(
        "build", "--checkpoint", path, "--target", "cortex-a72", "--batch", 2, "--out", tmp_path / "made", "--json"
    )
    assert ran.code == 0 and ran.document["target"] == "cortex-a72", ran.err
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    assert read_library((tmp_path / "made" / "step.so").read_bytes()).machine == "aarch64"
    assert (
        manifest["facts"]["graph"]["input_shape"] == [2, 2, 6, 6]
        and manifest["facts"]["threads"] == find_target("cortex-a72").cores
    )
    assert manifest["facts"]["optimizer"]["momentum"] == 0.8
    same_state(path, tmp_path / "made" / "state.safetensors")


def test_what_a_checkpoint_decides_is_no_option(trained, tmp_path, mest_compile_command):
    for option in (
        ("--model", "mlp"),
        ("--sparsity", 0.5),
        ("--grow-to", 0.4),
        ("--seed", 0),
        ("--activations", "float32"),
    ):
        ran = mest_compile_command("build", "--checkpoint", trained[1], *option, "--out", tmp_path / "made")
        assert ran.code == 2 and f"the checkpoint has its {option[0]} already" in ran.err
    assert not (tmp_path / "made").exists()


def test_what_another_target_cannot_do_is_refused(trained, tmp_path, mest_compile_command):
    ran = mest_compile_command("build", "--checkpoint", trained[1], "--target", "mali", "--out", tmp_path / "made")
    assert ran.code == 2 and "artifacts are for CPUs" in ran.err
    step, _ = trained
    half = replace(step._compiled.facts, activations="float16")
    with pytest.raises(mest.MestError, match="has no instructions that turn float16"):
        retargeted(half, find_target("cortex-a53" if not find_target("cortex-a53").float16 else "armv7"), 8)
    with pytest.raises(mest.MestError, match="batch is 0; wanted a whole number"):
        mest.load(trained[1], batch=0)


class Tuned(Records):
    """Records by which steps of other vectors and larger sections are the fastest."""

    def for_target(self, target):
        return Tuned(target)

    def best(self, kernel, problem, live, text):
        return Choice({STEP: {"vector": 8}}.get(kernel, {"caches": 2}), "exact")


@pytest.fixture
def planned(monkeypatch):
    """function(batch, target, scheme): the facts of compiling, of which nothing is compiled."""

    def facts(batch, target, scheme, records=Records, **options):
        with monkeypatch.context() as patched:
            patched.setattr(compiling, "make_step", lambda plan, *others: plan.facts)
            shape = (batch, 3, 32, 32)
            options |= {"scheme": scheme, "target": target, "records": records(find_target(target))}
            return mest.compile(build_model("resnet20", shape, 10, 64), shape, sparsity=0.6, **options)

    return facts


@pytest.mark.parametrize("records", [Records, Tuned])
@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        ("block", find_target("armv7")),
        ("pattern", find_target("armv7")),
        ("pattern", find_target("mali")),  # with kernels of another family, and nothing recomputed
        ("block", replace(find_target("armv7"), vector=16)),  # of which a batch of 8 fills a half
    ],
)
def test_facts_for_another_device_and_batch_are_those_of_compiling_for_it(scheme, target, records, planned):
    moved = retargeted(planned(32, "cortex-a76", scheme), target, 8, records).facts
    assert moved.to_json() == planned(8, target, scheme, records).to_json()
    assert any(layer.section_channels for layer in moved.layers.values())


def test_what_a_budget_recomputes_is_recomputed_elsewhere(planned):
    usual = planned(32, "cortex-a76", "block").recomputed
    tight = planned(32, "cortex-a76", "block", memory_budget=150 * 10**6)
    assert tight.recomputed > usual
    assert retargeted(tight, find_target("armv7"), 32, Records).facts.recomputed == tight.recomputed

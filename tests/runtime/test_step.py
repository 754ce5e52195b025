"""Whole steps against masked dense torch: same masks, same SGD, same numbers."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import short_resnet
from torch import nn

import mest_compile as mest
from mest_compile.models.catalog import build_model


class Odd(nn.Module):
    """Sizes that divide nothing, every pooling, biases, an addition without batch_norm, a kernel that is not square."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 13, (5, 3), stride=(2, 1), padding=(2, 1), bias=True)
        self.norm = nn.BatchNorm2d(13)
        self.b = nn.Conv2d(13, 20, 3, padding=1, bias=True)
        self.c = nn.Conv2d(20, 20, 3, stride=2, padding=1)
        self.d = nn.Conv2d(20, 20, 1)
        self.max = nn.MaxPool2d(3, 2, 1)
        self.avg = nn.AvgPool2d(2)
        self.e = nn.Linear(20 * 2, 11)
        self.f = nn.Linear(11, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)))
        x = F.relu(self.b(x))
        x = self.c(x)
        x = F.relu(x + self.d(x))
        x = self.avg(self.max(x))
        return self.f(F.relu(self.e(x.flatten(1))))


MODELS = {
    "resnet20-block": (lambda: build_model("resnet20", (8, 3, 16, 16), width=8), (8, 3, 16, 16), "block", None),
    "resnet20-unstructured": (
        lambda: build_model("resnet20", (8, 3, 16, 16), width=8),
        (8, 3, 16, 16),
        "unstructured",
        None,
    ),
    "vgg11-block": (lambda: build_model("vgg11", (8, 3, 32, 32), width=8), (8, 3, 32, 32), "block", None),
    "mlp-unstructured": (lambda: build_model("mlp", (16, 1, 8, 8), width=32), (16, 1, 8, 8), "unstructured", None),
    "mlp-block": (lambda: build_model("mlp", (16, 1, 8, 8), width=32), (16, 1, 8, 8), "block:2x2", None),
    "odd-unstructured": (Odd, (7, 3, 17, 17), "unstructured", ["f"]),
    "odd-dense": (Odd, (7, 3, 17, 17), "dense", None),
}


def masked_steps(model, masks, batches, lr, optimizer):
    """Dense torch with masked weights and masked gradients; yields the loss of each step and the first step's
    gradients."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name] *= torch.from_numpy(mask)
    rule = torch.optim.SGD(
        model.parameters(),
        lr=lr,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay,
        nesterov=optimizer.nesterov,
    )
    model.train()
    losses, first = [], None
    for images, labels in batches:
        rule.zero_grad()
        loss = F.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels))
        loss.backward()
        for name, mask in masks.items():
            parameters[name].grad *= torch.from_numpy(mask)
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        first = first or {name: parameter.grad.numpy().copy() for name, parameter in trained.items()}
        rule.step()
        losses.append(loss.item())
    return losses, first


def make_batches(shape, classes, count, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(shape).astype(np.float32), rng.integers(0, classes, shape[0])) for _ in range(count)]


def relative(got, wanted):
    return np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-12)


def assert_like_torch(step, model, images):
    """The step's state and its predictions are those of the torch module."""
    state = step.state_dict()
    for name, value in model.state_dict().items():
        assert relative(state[name], value.numpy()) < 1e-3, name
    model.eval()
    with torch.no_grad():
        assert relative(step.predict(images), model(torch.from_numpy(images)).numpy()) < 1e-3


@pytest.mark.parametrize(
    ("case", "nesterov"), [(case, False) for case in MODELS] + [("odd-unstructured", True), ("mlp-block", True)]
)
def test_ten_steps_equal_ten_steps_of_masked_torch(case, nesterov):
    make, shape, scheme, dense_layers = MODELS[case]
    torch.manual_seed(0)
    model = make()
    # A larger rate makes the comparison chaotic: a ReLU that flips by rounding moves torch float32 away from torch
    # float64 as far as us.
    optimizer = mest.SGD(lr=0.002, momentum=0.9, weight_decay=1e-3, nesterov=nesterov)
    step = mest.compile(
        model,
        shape,
        scheme=scheme,
        sparsity=0.0 if scheme == "dense" else 0.9,
        dense_layers=dense_layers,
        optimizer=optimizer,
        threads=2,
    )
    masks = step.masks()
    for name, mask in masks.items():
        assert mask.mean() == pytest.approx(0.1, abs=0.02), name
    batches = make_batches(shape, step.classes, 10)
    got_gradients = step.gradients(*batches[0])
    untouched = step.state_dict()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(untouched[name], value.numpy() * masks.get(name, True))
    got = [step(*batch, lr=0.002).loss for batch in batches]
    wanted, gradients = masked_steps(model, masks, batches, 0.002, optimizer)
    for name, gradient in gradients.items():
        # A bias before batch_norm has gradient 0; what rounding leaves of it is measured by its layer's weight.
        scale = max(np.abs(gradient).max(), np.abs(gradients[name.replace(".bias", ".weight")]).max())
        assert np.abs(got_gradients[name] - gradient).max() <= 1e-4 * scale, name
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    assert_like_torch(step, model, make_batches((shape[0] * 2 + 3, *shape[1:]), 2, 1, seed=9)[0][0])


def test_a_unit_that_dies_and_is_drawn_again_starts_at_zero():
    step = small_step(sparsity=0.5)
    step(*make_batches((8, 3, 8, 8), 10, 1)[0])
    alive = {name: np.count_nonzero(value) for name, value in step.state_dict().items() if name in step.masks()}
    step.mutate(prune_to=0.9, grow_to=0.1)  # most of those that die are drawn again
    for name, value in step.state_dict().items():
        if name in alive:
            assert np.count_nonzero(value) == pytest.approx(alive[name] * 0.2, rel=0.05), name


def small_step(net=short_resnet, **options):
    torch.manual_seed(1)
    return mest.compile(net((8, 3, 8, 8)), (8, 3, 8, 8), **{"scheme": "block", "sparsity": 0.8, **options})


def deep_net(shape):
    """Of which much can be computed again."""
    return build_model("resnet20", shape, 10, 8)


def test_what_is_loaded_for_a_step_goes_with_it(tmp_path):
    """A process has room for some 65,000 mappings."""

    def mapped() -> list[str]:
        gc.collect()
        return [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line]

    def use(step):
        step(*make_batches((8, 3, 8, 8), 10, 1)[0])
        return step

    use(small_step(threads=1)).export(tmp_path / "artifact")
    use(mest.open_artifact(tmp_path / "artifact"))  # whatever is loaded once for all
    before = mapped()
    for make in (lambda: small_step(threads=1), lambda: mest.open_artifact(tmp_path / "artifact")):
        step = use(make())
        assert set(mapped()) - set(before)
        del step
        assert sorted(mapped()) == sorted(before)


def test_correct_says_which_examples_the_largest_logit_gets_right():
    step = small_step(optimizer=mest.SGD(lr=0.0, momentum=0.0, weight_decay=0.0))
    images, labels = make_batches((8, 3, 8, 8), 10, 1)[0]
    before = step.state_dict()
    result = step(images, labels)
    assert result.correct.shape == (8,) and result.correct.dtype == bool
    model = short_resnet((8, 3, 8, 8))
    mest.to_torch(step, model)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in before.items()}, strict=False)
    with torch.no_grad():
        logits = model.train()(torch.from_numpy(images))
    np.testing.assert_array_equal(result.correct, logits.argmax(1).numpy() == labels)


def test_mutation_keeps_survivors_and_their_momentum_and_starts_new_units_at_zero():
    step = small_step()
    for batch in make_batches((8, 3, 8, 8), 10, 3):
        step(*batch)
    masks, state, momentum = step.masks(), step.state_dict(), step._state.collect(":momentum")
    report = step.mutate(prune_to=0.85, grow_to=0.8, rng=np.random.default_rng(0))
    assert set(report.layers.values()) == {"re-indexed"} and 0 < report.reindex_seconds < report.seconds
    new_masks, new_state, new_momentum = step.masks(), step.state_dict(), step._state.collect(":momentum")
    for name, mask in masks.items():
        assert new_masks[name].sum() == mask.sum()
        norms = np.linalg.norm(state[name].reshape(-1, 4, *mask.shape[1:]), axis=1)
        fewest = round(0.15 * norms.size)
        stayed = np.repeat(norms >= np.sort(norms.ravel())[-fewest], 4, axis=0)
        grown = new_masks[name] & ~stayed
        assert stayed.sum() == 4 * fewest and not (stayed & ~new_masks[name]).any() and grown.any()
        np.testing.assert_array_equal(new_state[name][stayed], state[name][stayed])
        np.testing.assert_array_equal(new_momentum[name][stayed], momentum[name][stayed])
        assert not new_state[name][grown].any() and not new_momentum[name][grown].any()
    assert np.isfinite(step(*make_batches((8, 3, 8, 8), 10, 1)[0]).loss)


def test_a_step_after_new_masks_equals_torch_with_those_masks():
    step = small_step()
    rng = np.random.default_rng(4)
    masks = {
        name: np.repeat(rng.random((mask.shape[0] // 4, *mask.shape[1:])) < 0.3, 4, axis=0)
        for name, mask in step.masks().items()
    }
    only = dict(list(masks.items())[:3])
    report = step.set_masks(only)
    assert list(report.layers.values()).count("re-indexed") == 3
    step.set_masks(masks)
    model = short_resnet((8, 3, 8, 8))
    mest.to_torch(step, model)
    batches = make_batches((8, 3, 8, 8), 10, 3)
    got = [step(*batch, lr=0.01).loss for batch in batches]
    np.testing.assert_allclose(got, masked_steps(model, masks, batches, 0.01, step.optimizer)[0], rtol=1e-4)


def test_a_saved_step_goes_on_bit_for_bit(tmp_path):
    step, batches = small_step(), make_batches((8, 3, 8, 8), 10, 4)
    step(*batches[0])
    step.mutate(prune_to=0.85, grow_to=0.8)
    step(*batches[1])
    step.save(tmp_path / "a.safetensors", {"epoch": 3}, {"counts": np.arange(5)})
    loaded, other = mest.load(tmp_path / "a.safetensors"), small_step()
    extra, arrays = other.restore(tmp_path / "a.safetensors")
    assert extra == {"epoch": 3} and arrays["counts"].tolist() == list(range(5))
    for twin in (step, loaded, other):
        twin.mutate(prune_to=0.9, grow_to=0.8)
    losses = {tuple(twin(*batch).loss for batch in batches) for twin in (step, loaded, other)}
    assert len(losses) == 1
    for name, value in step.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name], value)
        np.testing.assert_array_equal(other.state_dict()[name], value)


TWO_THREADS = """
import sys

import numpy as np
import tvm
import mest_compile as mest

sys.path.append(sys.argv[1])
from nets import short_resnet

shape, losses = (8, 3, 16, 16), []
for threads in (1, 2):
    step = mest.compile(short_resnet(shape), shape, scheme="block", sparsity=0.8, threads=threads)
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal(shape, dtype=np.float32), rng.integers(0, 10, 8)
    losses.append([step(images, labels, lr=0.1).loss for _ in range(5)])
    print(tvm.get_global_func("runtime.NumThreads")())
print(losses[0] == losses[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_two_threads_are_two_and_give_the_same_bits():
    free = {name: value for name, value in os.environ.items() if name not in ("TVM_NUM_THREADS", "OMP_NUM_THREADS")}
    command = [sys.executable, "-c", TWO_THREADS, str(Path(nets.__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=free)
    assert done.stdout.split() == ["1", "2", "True"], done.stderr


def test_no_buffer_of_the_step_has_the_size_of_a_dense_weight():
    step = small_step(sparsity=0.9)
    for name, mask in step.masks().items():
        for held in step._state.held:
            if held.startswith(name):
                assert step._state.get(held).size < 0.5 * mask.size + 64, held


def test_memory_counts_every_kind():
    memory = small_step().memory()
    assert set(memory) == {"values", "indices", "gradients", "optimizer", "activations", "workspace", "batch", "total"}
    assert (
        memory["total"] == sum(value for kind, value in memory.items() if kind != "total") and min(memory.values()) > 0
    )


@pytest.mark.parametrize("scheme", ["unstructured", "channel"])
def test_what_is_planned_for_values_is_what_is_held_whatever_lives(scheme):
    """Among it the array that layers turn their values in, which is as large as the largest needs it; of a channel
    scheme those are more than live, as groups of rows are filled up."""
    step, (batch,) = small_step(scheme=scheme), make_batches((8, 3, 8, 8), 10, 1)
    largest = max(step.masks(), key=lambda name: step.masks()[name].size)
    for channels in (9, 3, 15, 2):
        mask = np.zeros(step.masks()[largest].shape, bool)
        mask[:, :channels] = True
        step.set_masks({largest: mask})
        held = step._state.held.items()
        there = sum(step._state.get(name).nbytes for name, buffer in held if buffer.kind == "values")
        assert step.memory()["values"] == there
        turned = step._state.held[f"{largest}:{'transposed_from' if scheme == 'channel' else 'permutation'}"]
        assert step._state.get(":transposed").size >= step._state.get(turned.name).size
        assert np.isfinite(step(*batch).loss)


BAD = {
    "shape": (lambda s, x, y: s(x[:, :2], y), "compiled for"),
    "nan": (lambda s, x, y: s(np.where(x > 2, np.nan, x), y), "NaN or infinite"),
    "label": (lambda s, x, y: s(x, y + 9), "classes 0 to 9"),
    "label count": (lambda s, x, y: s(x, y[:3]), "labels have shape"),
    "float labels": (lambda s, x, y: s(x, y.astype(float)), "whole numbers"),
    "lr": (lambda s, x, y: s(x, y, lr=-1), "lr is"),
    "mutate": (lambda s, x, y: s.mutate(prune_to=0.8, grow_to=0.9), "grow_to <= prune_to"),
    "mask name": (lambda s, x, y: s.set_masks({"conv1.weight": np.ones((8, 3, 3, 3), bool)}), "no sparse layer"),
    "state": (lambda s, x, y: s.load_state_dict({"a": x}), "does not fit"),
    "dead": (
        lambda s, x, y: s.load_state_dict({n: v + 1 for n, v in s.state_dict().items()}),
        "not 0 where the mask is dead",
    ),
    "checkpoint": (lambda s, x, y: s.restore("nowhere.safetensors"), "no checkpoint"),
}


@pytest.fixture(scope="module")
def unchanging():
    """A step for tests which find that it is as it was."""
    return small_step()


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_changes_nothing(case, unchanging):
    step, (images, labels) = unchanging, make_batches((8, 3, 8, 8), 5, 1)[0]
    before = step.state_dict()
    with pytest.raises(mest.MestError, match=BAD[case][1]) as caught:
        BAD[case][0](step, images, labels)
    assert "\n" not in str(caught.value)
    for name, value in step.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    step = small_step()
    step.save(tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(mest.MestError, match="damaged or cut short"):
        mest.load(tmp_path / "half.safetensors")
    with pytest.raises(mest.MestError, match="another model"):
        mest.compile(build_model("mlp", (8, 3, 8, 8), width=16), (8, 3, 8, 8), scheme="unstructured").restore(
            tmp_path / "a.safetensors"
        )
    with pytest.raises(mest.MestError, match="another sparsity scheme"):
        small_step(sparsity=0.7).restore(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.2}, "sparsity is 1.2; wanted"),
        ({"scheme": "blok"}, "no scheme"),
        ({"target": "toaster"}, "no target"),
        ({"dense_layers": ["conv9"]}, "no layer"),
        ({"dense_layers": []}, "multiples of 4 output"),
        ({"threads": 0}, "threads"),
        ({"scheme": "dense"}, "sparsity 0"),
        ({"distribution": "magic"}, "no distribution"),
    ],
)
def test_bad_options_are_refused_before_anything_is_compiled(options, message):
    with pytest.raises(mest.MestError, match=message) as caught:
        small_step(**options)
    assert "\n" not in str(caught.value)


def test_a_memory_budget_is_met_by_computing_again_with_the_same_bits():
    plain = small_step(deep_net, threads=1)
    needs = plain.memory()["total"]
    steps = [plain]
    for share in (0.92, 0.8):
        steps.append(small_step(deep_net, threads=1, memory_budget=int(share * needs)))
        assert steps[-1].memory()["total"] <= share * needs
        assert len(steps[-1].describe()["recomputed"]) > len(steps[-2].describe()["recomputed"])
    for batch in make_batches((8, 3, 8, 8), 10, 3):
        assert len({step(*batch).loss for step in steps}) == 1
    for name, value in plain.state_dict().items():
        for step in steps[1:]:
            np.testing.assert_array_equal(step.state_dict()[name], value)


def test_a_budget_that_cannot_be_met_is_refused_or_lowers_the_density():
    with pytest.raises(mest.MestError, match="memory_budget is 100000 bytes; the step needs at least"):
        small_step(memory_budget=100_000, lower_density=True)
    lean = small_step(memory_budget=10**9)
    assert lean.describe()["recomputed"] == small_step().describe()["recomputed"]

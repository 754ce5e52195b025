"""Batches of fewer examples than a step was compiled for, and steps of several passes, against torch."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from test_schemes_step import RULES, MaskedTorch, Small, assert_gradients_are_torchs
from test_step import assert_like_torch, make_batches
from torch import nn

import mest_compile as mest
from mest_compile.ir.program import FUNCTIONS, function_name
from mest_compile.operators.dropout import draws

SHAPE = (8, 3, 8, 8)


def batches_of(*sizes):
    return [make_batches((size, *SHAPE[1:]), 10, 1, seed=place)[0] for place, size in enumerate(sizes)]


def test_batches_of_any_size_train_as_in_torch_also_after_a_mutation(tmp_path):
    torch.manual_seed(0)
    model = Small(8)
    step = mest.compile(model, SHAPE, scheme="block", sparsity=0.75, optimizer=RULES["sgd"], threads=1)
    whole, few, one, later = batches_of(8, 5, 1, 5)
    twin = MaskedTorch(model, step.masks(), step.optimizer)
    for batch in (whole, few, one):
        result = step(*batch)
        assert result.loss == pytest.approx(twin.step(*batch), rel=1e-4) and result.correct.shape == (len(batch[1]),)
    before = step.masks()
    masks = {name: np.roll(mask, 4, axis=0) for name, mask in before.items()}
    step.set_masks(masks)
    twin.exchange(masks, {name: mask & masks[name] for name, mask in before.items()}, None)
    step.save(tmp_path / "a.safetensors")
    assert_gradients_are_torchs(step, model, few)
    loss = step(*later).loss
    assert loss == pytest.approx(twin.step(*later), rel=1e-4)
    assert mest.load(tmp_path / "a.safetensors")(*later).loss == loss  # its program compiled anew, bit for bit
    assert_like_torch(step, model, whole[0])


def test_a_smaller_batch_is_clipped_and_told_apart_by_a_loss_of_numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 3))
    step = mest.compile(model, SHAPE, scheme="dense", loss="mse", optimizer=mest.SGD(1.0, 0.0, 0.0), threads=1)
    twin = deepcopy(model)
    rule = torch.optim.SGD(twin.parameters(), 1.0)
    for images, _ in batches_of(8, 3):
        targets = np.ones((len(images), 3), np.float32)
        answers = twin(torch.from_numpy(images))
        loss = nn.functional.mse_loss(answers, torch.from_numpy(targets))
        rule.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
        rule.step()
        result = step(images, targets, clip_norm=0.01)
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        np.testing.assert_allclose(result.outputs, answers.detach().numpy(), atol=1e-5)
    for name, value in twin.state_dict().items():
        np.testing.assert_allclose(step.state_dict()[name], value.numpy(), atol=1e-6)


def test_programs_of_the_last_four_sizes_are_kept():
    step = mest.compile("mlp", (8, 1, 4, 4), scheme="dense", threads=1)
    for size in (1, 2, 3, 4, 1, 5):
        step(*make_batches((size, 1, 4, 4), 10, 1)[0])
    kept = {function_name(name, size) for name in ("train", "gradients", "backward") for size in (3, 4, 1, 5)}
    assert kept == set(step._runner._programs) - set(FUNCTIONS) == set(step._runner._machines) - set(FUNCTIONS)


@pytest.mark.parametrize("size", [0, 9])
def test_what_is_no_batch_of_the_step_is_refused(size):
    step = mest.compile("mlp", (8, 1, 4, 4), scheme="dense", threads=1)
    with pytest.raises(mest.MestError, match=r"this step was compiled for \(8, 1, 4, 4\), or fewer examples"):
        step(np.zeros((size, 1, 4, 4), np.float32), np.zeros(size, np.int64))


def test_one_value_a_channel_has_no_statistics_and_changes_nothing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    step = mest.compile(model, (8, 1, 4, 4), scheme="dense", threads=1)
    before = step.state_dict()
    with pytest.raises(mest.MestError, match="batch_norm needs more than 1 value per channel"):
        step(np.zeros((1, 1, 4, 4), np.float32), np.zeros(1, np.int64))
    for name, value in step.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


class Grouped(nn.Module):
    """Nothing in it is of several examples: a group norm, a learned scale, a depthwise layer, dropout of nothing."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.conv2, self.deep = nn.Conv2d(8, 16, 3, 2, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.scale, self.fc = nn.Parameter(torch.ones(16, 1, 1)), nn.Linear(16, 10)

    def forward(self, x):
        x = self.conv2(self.norm(self.conv1(x)).relu()).relu()
        return self.fc((self.deep(x).relu() * self.scale).mean((2, 3)))


LOSSES = {
    "plain": mest.CrossEntropy(0.1),
    "weighted": mest.CrossEntropy(weight=[1.0, 0.5] * 5, ignore_index=3),
    "distilled": mest.Distill(2.0, 0.3),
    "numbers": mest.MSE(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_passes_over_a_net_without_batch_statistics_are_the_whole_batch(loss):
    """Loss, answers and gradients, of whole batches and of fewer examples."""
    torch.manual_seed(0)
    model, rng = Grouped(), np.random.default_rng(0)
    common = {"scheme": "unstructured", "sparsity": 0.5, "loss": LOSSES[loss], "threads": 1}
    whole, passes = (mest.compile(model, SHAPE, microbatch=size, **common) for size in (None, 2))
    assert (passes.batch, passes.microbatch, passes.input_shape) == (8, 2, SHAPE) and whole.microbatch is None
    assert passes.output_shape == whole.output_shape and passes.describe()["microbatch"] == 2
    for size in (8, 5):
        (images, labels), logits = batches_of(size)[0], rng.standard_normal((size, 10)).astype(np.float32)
        given = {"distilled": (labels, logits), "numbers": logits}.get(loss, labels)
        wanted = whole.gradients(images, given)
        for name, gradient in passes.gradients(images, given).items():
            np.testing.assert_allclose(gradient, wanted[name], atol=2e-6 * max(1, np.abs(wanted[name]).max()))
        one, other = whole(images, given, clip_norm=0.05), passes(images, given, clip_norm=0.05)
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        if loss == "numbers":
            np.testing.assert_allclose(other.outputs, one.outputs, atol=1e-5)
        else:
            np.testing.assert_array_equal(other.correct, one.correct)
    for name, value in whole.state_dict().items():
        np.testing.assert_allclose(passes.state_dict()[name], value, atol=1e-5)
    np.testing.assert_allclose(passes.predict(images), whole.predict(images), atol=1e-4)


class Ghost(MaskedTorch):
    """Torch on passes of four: each normalises by its own statistics."""

    def step(self, images, labels):
        self.rule.zero_grad()
        total = 0.0
        for start in range(0, len(labels), 4):
            x, y = (torch.from_numpy(one[start : start + 4]) for one in (images, labels))
            loss = nn.functional.cross_entropy(self.model(x), y) * (len(y) / len(labels))
            loss.backward()
            total += loss.item()
        for name, mask in self.masks.items():
            self.parameters[name].grad *= mask
        self.rule.step()
        return total


@pytest.mark.parametrize("scheme", ["block", "filter"])
def test_batch_statistics_are_each_passs_own(scheme, tmp_path):
    check_passes(scheme, tmp_path, threads=1)


def check_passes(scheme, tmp_path, **options):
    torch.manual_seed(0)
    model = Small(8)
    step = mest.compile(model, SHAPE, scheme=scheme, sparsity=0.75, optimizer=RULES["sgd"], microbatch=4, **options)
    whole, few, again, later = batches_of(8, 7, 8, 8)
    twin = Ghost(model, step.masks(), step.optimizer)
    for batch in (whole, few, again):
        assert step(*batch).loss == pytest.approx(twin.step(*batch), rel=1e-4)
    assert_like_torch(step, model, whole[0])
    assert step.state_dict()["bn1.num_batches_tracked"] == 6
    step.mutate(prune_to=0.85, grow_to=0.65, rng=np.random.default_rng(1))
    step.save(tmp_path / "a.safetensors")
    loaded = mest.load(tmp_path / "a.safetensors")
    assert loaded.microbatch == 4 and loaded(*later).loss == step(*later).loss
    for name, value in step.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name], value)


def test_passes_need_the_memory_of_one_and_are_timed_whole():
    plain, passes = (
        mest.compile("resnet8", (32, 3, 16, 16), scheme="block", microbatch=size, threads=1) for size in (None, 8)
    )
    one, other = plain.memory(), passes.memory()
    assert plain.memory_by_microbatch() == pytest.approx(passes.memory_by_microbatch(), rel=0.01)
    told = plain.memory_by_microbatch()
    assert list(told) == [32, 16, 8, 4, 2, 1] and told[32] == one["total"] and told[8] == other["total"]
    assert other["activations"] <= 0.26 * one["activations"] and other["gradients"] == one["gradients"]
    batch = make_batches((32, 3, 16, 16), 10, 1)[0]
    before = passes.state_dict()
    seconds = passes.profile(*batch, repeats=1)
    assert {call.name for call in passes.program.calls if call.stage != "clip"} == seconds.keys() - {"rest"}
    for name, value in passes.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_dropout_drops_other_elements_in_each_pass():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 10))
    step = mest.compile(model, SHAPE, scheme="dense", microbatch=4, threads=1)
    found = [draws(step.graph, 0, 1, turn) for turn in range(2)]
    assert found[0] == draws(step.graph, 0, 1) and found[0] != found[1]
    images, labels = batches_of(4)[0]
    step(np.concatenate([images, images]), np.concatenate([labels, labels]))
    used = {name: step._state.get(name) for name in found[1]}
    assert used == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatch": 3}, "a batch of 8 is no multiple of it; give one of 1, 2, 4, 8"),
        ({"microbatch": 0}, "microbatch"),
        ({"microbatch": "many"}, "microbatch"),
        ({"microbatch": "auto"}, "the largest that a memory_budget has room for"),
    ],
)
def test_passes_that_cannot_be_are_refused(options, message):
    with pytest.raises(mest.MestError, match=message):
        mest.compile("mlp", (8, 1, 4, 4), **options)


def test_a_step_of_passes_goes_on_in_larger_batches_of_the_same_passes(tmp_path):
    step = mest.compile("mlp", (8, 1, 4, 4), scheme="dense", microbatch=4, threads=1)
    step.save(tmp_path / "a.safetensors")
    loaded = mest.load(tmp_path / "a.safetensors", batch=12)
    assert (loaded.batch, loaded.microbatch) == (12, 4)
    with pytest.raises(mest.MestError, match="batch is 10, and the step makes passes of 4 examples"):
        mest.load(tmp_path / "a.safetensors", batch=10)


def test_passes_and_what_is_left_go_on_bit_for_bit_specialized_and_frozen():
    steps = [mest.compile("mlp", (8, 1, 6, 6), scheme="filter", microbatch=4, threads=1) for _ in range(2)]
    steps[0].specialize(10**6)
    assert steps[0]._specializer._runs == 2 * 10**6  # a kernel runs in each pass
    assert "specialized" in {one.choice.variant for one in steps[0].plan()}
    sizes = (8, 7, 8)
    for frozen in (False, True):
        for step in steps if frozen else ():
            step.freeze("fc1.*")
        for size in sizes:
            batch = make_batches((size, 1, 6, 6), 10, 1, seed=size)[0]
            one, other = (step(*batch).loss for step in steps)
            assert one == other
    for name, value in steps[0].state_dict().items():
        np.testing.assert_array_equal(value, steps[1].state_dict()[name])

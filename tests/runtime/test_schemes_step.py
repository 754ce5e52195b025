"""Whole steps of every scheme, a mutation between them, against masked dense torch; then a checkpoint."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from masks import assert_starts, survivors
from optimizers import twin
from test_step import assert_like_torch, make_batches
from torch import nn

import mest_compile as mest
from mest_compile.models.catalog import build_model

RATE = 0.002  # small, as in test_step: ReLUs that flip by rounding would make the comparison chaotic
RULES = {
    "sgd": mest.SGD(lr=RATE, momentum=0.9, weight_decay=1e-3),
    "adamw": mest.AdamW(lr=RATE, betas=(0.9, 0.99), eps=1e-4, weight_decay=1e-2),
    "adam": mest.Adam(lr=RATE, betas=(0.9, 0.99), eps=1e-4, weight_decay=1e-2),
    "rmsprop": mest.RMSprop(lr=RATE / 4, alpha=0.9, eps=1e-3, weight_decay=1e-2),
}  # a small eps makes steps of what rounding leaves


class Small(nn.Module):
    """A residual net in little: a block, a block with a stride and a 1x1 shortcut, the classifier.

    No biases before batch_norm: a dead filter's variance is 0, and what rounding leaves of its bias's gradient is
    multiplied by 1 / sqrt(eps), so that torch in float32 and in float64 part ways as well.
    """

    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 2 * width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.conv4, self.bn4 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.shortcut, self.bn5 = nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = (self.bn2(self.conv2(x)) + x).relu()
        y = self.bn3(self.conv3(x)).relu()
        x = (self.bn4(self.conv4(y)) + self.bn5(self.shortcut(x))).relu()
        return self.fc(x.mean((2, 3)))


def small(width):
    return lambda: Small(width)


def linear():
    return build_model("mlp", (16, 1, 6, 6), width=30)


CASES = {  # scheme, model, input_shape, dense_layers
    "pattern": ("pattern", small(8), (8, 3, 8, 8), None),
    "filter": ("filter", small(8), (8, 3, 8, 8), ["conv1", "fc"]),
    "channel": ("channel", small(8), (8, 3, 8, 8), ["conv1", "fc"]),
    "block:1x4": ("block:1x4", small(8), (8, 3, 8, 8), ["conv1", "fc"]),
    "block:4x4": ("block:4x4", small(8), (8, 3, 8, 8), ["conv1", "fc"]),
    "block:8x1": ("block:8x1", small(8), (8, 3, 8, 8), ["conv1", "fc"]),
    "filter-linear": ("filter", linear, (16, 1, 6, 6), ["fc3"]),
    "channel-linear": ("channel", linear, (16, 1, 6, 6), ["fc3"]),
}


class MaskedTorch:
    """Dense torch, weights, gradients and optimizer state masked."""

    def __init__(self, model, masks, optimizer):
        self.model, self.parameters = model.train(), dict(model.named_parameters())
        self.rule = twin(optimizer, model.parameters())
        self.exchange(masks, masks, None)

    def exchange(self, masks, stay, state):
        """`masks` count from now on; outside `stay` optimizer state becomes 0, and weights what `state` has there, 0
        where that is None."""
        self.masks = {name: torch.from_numpy(mask) for name, mask in masks.items()}
        for name, mask in stay.items():
            with torch.no_grad():
                self.parameters[name] *= torch.from_numpy(mask)
                self.parameters[name] += 0 if state is None else torch.from_numpy(np.where(mask, 0, state[name]))
                for array in self.rule.state[self.parameters[name]].values():
                    if array is not None and array.shape == mask.shape:  # torch counts its steps there too
                        array *= torch.from_numpy(mask)

    def step(self, images, labels):
        self.rule.zero_grad()
        loss = F.cross_entropy(self.model(torch.from_numpy(images)), torch.from_numpy(labels))
        loss.backward()
        for name, mask in self.masks.items():
            self.parameters[name].grad *= mask
        self.rule.step()
        return loss.item()


def assert_gradients_are_torchs(step, model, batch):
    """Of live weights, at the step's own state."""
    twin = deepcopy(model)
    mest.to_torch(step, twin)
    twin.train().zero_grad()
    F.cross_entropy(twin(torch.from_numpy(batch[0])), torch.from_numpy(batch[1])).backward()
    got, masks = step.gradients(*batch), step.masks()
    for name, parameter in twin.named_parameters():
        wanted = parameter.grad.numpy() * masks.get(name, True)
        assert np.abs(got[name] - wanted).max() <= 1e-3 * max(np.abs(wanted).max(), 1e-3), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_steps_with_a_mutation_between_them_equal_masked_torch_and_continue_from_a_checkpoint(case, rule, tmp_path):
    check_steps(*CASES[case], RULES[rule], tmp_path, threads=1)


def check_steps(scheme, make, shape, dense_layers, rule, tmp_path, **options):
    """options: what else the step is compiled with."""
    torch.manual_seed(3)
    model = make()
    step = mest.compile(
        model, shape, scheme=scheme, sparsity=0.75, dense_layers=dense_layers, optimizer=rule, **options
    )
    before, batches = step.masks(), make_batches(shape, 10, 8)
    twin = MaskedTorch(model, before, step.optimizer)
    np.testing.assert_allclose(
        [step(*batch).loss for batch in batches[:4]], [twin.step(*batch) for batch in batches[:4]], rtol=1e-4
    )

    weights = step.state_dict()
    report = step.mutate(prune_to=0.85, grow_to=0.65, rng=np.random.default_rng(1))
    assert set(report.layers.values()) == {"re-indexed"}
    after, state = step.masks(), step.state_dict()
    stay = survivors(weights, before, state, after)
    for name, mask in after.items():
        assert mask.mean() > before[name].mean() > stay[name].mean() > 0, name
        assert assert_starts(state[name], mask, stay[name]).any() or scheme != "filter", name
        layer = step._compiled.layers[name]  # legal still: the scheme reads its own mask
        layer.scheme.collapse(layer.spec, mask.reshape(layer.spec.weight_shape))
    twin.exchange(after, stay, state)
    assert_gradients_are_torchs(step, model, batches[7])
    np.testing.assert_allclose(
        [step(*batch).loss for batch in batches[4:6]], [twin.step(*batch) for batch in batches[4:6]], rtol=1e-4
    )

    assert_like_torch(step, model, batches[6][0])

    step.save(tmp_path / "a.safetensors")
    loaded = mest.load(tmp_path / "a.safetensors")
    for one in (step, loaded):
        one.mutate(prune_to=0.8, grow_to=0.75)
    assert [step(*batch).loss for batch in batches[6:]] == [loaded(*batch).loss for batch in batches[6:]]
    for name, mask in step.masks().items():
        np.testing.assert_array_equal(loaded.masks()[name], mask)
    for name, value in step.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dense_layers": ["conv1", "fc"]},
            "shortcut.weight: scheme pattern is for 3x3 kernels, the layer's are 1x1; .* list the layer in dense",
        ),
        ({"sparsity": 0.5}, "starts at 1 - 4/9"),
    ],
)
def test_pattern_names_the_layer_that_it_cannot_prune(options, message):
    with pytest.raises(mest.MestError, match=message) as caught:
        mest.compile(Small(8), (8, 3, 8, 8), **{"scheme": "pattern", "sparsity": 0.8, **options})
    assert "\n" not in str(caught.value)


def test_a_mutation_that_pattern_cannot_follow_changes_nothing():
    step = mest.compile(Small(8), (8, 3, 8, 8), scheme=mest.Pattern(), sparsity=0.8)
    before = step.masks()
    with pytest.raises(mest.MestError, match="starts at 1 - 4/9"):
        step.mutate(prune_to=0.8, grow_to=0.5)
    unbalanced = {name: mask.copy() for name, mask in before.items()}
    unbalanced["conv4.weight"][2] = False
    with pytest.raises(mest.MestError, match="the same number in every filter"):
        step.set_masks(unbalanced)
    for name, mask in step.masks().items():
        np.testing.assert_array_equal(mask, before[name])

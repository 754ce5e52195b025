"""Batches of fewer examples than a step was compiled for, against torch."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from test_schemes_step import RULES, MaskedTorch, Small, assert_gradients_are_torchs
from test_step import assert_like_torch, make_batches
from torch import nn

import mest_compile as mest
from mest_compile.ir.program import OF_BATCH, function_name

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
    kept = {function_name(name, size) for name in OF_BATCH for size in (3, 4, 1, 5)}
    assert (
        set(step._runner._programs) - {*OF_BATCH, "update", "predict"}
        == kept
        == set(step._runner._machines)
        - {
            *OF_BATCH,
            "update",
            "predict",
        }
    )


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

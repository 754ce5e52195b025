"""What training methods ask of a compiled step: smoothed labels, bounded gradients, gradients of dead weights; against
torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_schemes_step import Small
from test_step import make_batches, relative

import mest_compile as mest
from mest_compile.base.errors import UsageError
from mest_compile.training.loop import Trainer
from mest_compile.training.recipe import Recipe

SHAPE = (8, 3, 8, 8)
SCHEMES = {
    "unstructured": None,
    "filter": ["conv1", "fc"],
    "channel": ["conv1", "fc"],
    "pattern": None,
    "block": ["conv1", "fc"],
}


def make(scheme="filter", **options):
    torch.manual_seed(5)
    model = Small(10)  # of ten filters 3 live at 0.7: the last of them is computed twice
    chosen = {"scheme": scheme, "sparsity": 0.7, "dense_layers": SCHEMES[scheme], "threads": 1, **options}
    if scheme == "block":
        model = Small(8)
    return mest.compile(model, SHAPE, **chosen), model


def masked_gradients(model, masks, images, labels, smoothing=0.0):
    model.zero_grad()
    loss = F.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels), label_smoothing=smoothing)
    loss.backward()
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameters[name].grad *= torch.from_numpy(mask)
    return loss.item(), parameters


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothed_labels_give_torchs_loss_and_gradients(smoothing):
    step, model = make("unstructured", label_smoothing=smoothing)
    mest.to_torch(step, model)
    images, labels = make_batches(SHAPE, 10, 1)[0]
    loss, parameters = masked_gradients(model, step.masks(), images, labels, smoothing)
    got = step.gradients(images, labels)
    assert all(relative(got[name], value.grad.numpy()) < 1e-4 for name, value in parameters.items())
    assert step(images, labels).loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0, np.nan])
def test_a_smoothing_that_is_no_share_is_refused(share):
    if share == 0.0:
        assert make(label_smoothing=share)[0].describe()["label_smoothing"] == 0
        return
    with pytest.raises(UsageError, match="label_smoothing"):
        make(label_smoothing=share)


def test_the_gradient_term_changes_which_weights_die():
    """By hand: equal logits, so both classes have probability 1/2 and the gradient of class 0's row is (1/2 - 1) x, of
    class 1's 1/2 x."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False))
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    image, label = np.float32([[4, -2, -2, 4]]), np.array([0])  # both logits are 1
    kept = {}
    for lam in (0.0, 0.5):
        step = mest.compile(model, (1, 4), scheme="unstructured", sparsity=0.0, dense_layers=[], threads=1)
        step.load_state_dict({"1.weight": weights.numpy()})
        step(image, label, lr=0.0)
        step.mutate(0.5, 0.5, importance_lambda=lam)
        kept[lam] = step.masks()["1.weight"].astype(int).tolist()
    assert kept[0.0] == [[0, 0, 1, 1], [1, 1, 0, 0]]  # the four largest |w|
    # |w| + |g|/2, |g| = 2, 1, 1, 2 in both rows: 1.1, 0.7, 0.8, 1.4 and 1.4, 0.8, 0.7, 1.1
    assert kept[0.5] == [[1, 0, 0, 1], [1, 0, 0, 1]]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("share", [0.3, 3.0], ids=["above", "below"])
def test_gradients_are_bounded_as_torch_bounds_them(scheme, share):
    step, model = make(scheme, optimizer=mest.SGD(lr=0.002, momentum=0.9, weight_decay=1e-3))
    mest.to_torch(step, model)
    rule = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9, weight_decay=1e-3)
    for images, labels in make_batches(SHAPE, 10, 3):
        _, parameters = masked_gradients(model, step.masks(), images, labels)
        norm = torch.nn.utils.get_total_norm([value.grad for value in parameters.values()]).item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), share * norm)
        for name, mask in step.masks().items():  # weight decay keeps dead weights at 0, they start there
            assert not parameters[name].detach().numpy()[~mask].any()
        rule.step()
        step(images, labels, clip_norm=share * norm)
    state = step.state_dict()
    for name, value in model.state_dict().items():
        assert relative(state[name], value.numpy()) < 1e-3, name


def test_a_bound_that_is_not_met_changes_nothing():
    one, other = make()[0], make()[0]
    for batch in make_batches(SHAPE, 10, 3):
        assert one(*batch).loss == other(*batch, clip_norm=1e9).loss
    for name, value in one.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dense_gradients_are_those_of_every_weight_and_the_largest_grow(scheme):
    step, model = make(scheme)
    images, labels = make_batches(SHAPE, 10, 1)[0]
    mest.to_torch(step, model)
    before = step.state_dict()
    found, size_bytes = step.dense_gradients(images, labels)
    _, parameters = masked_gradients(model, {}, images, labels)
    assert set(found) == set(step.masks()) and size_bytes > step.memory()["gradients"]
    for name, gradient in found.items():
        assert relative(gradient, parameters[name].grad.numpy()) < 1e-4, name
    assert any(gradient[~step.masks()[name]].any() for name, gradient in found.items())
    for name, value in step.state_dict().items():
        np.testing.assert_array_equal(before[name], value)

    masks = step.masks()
    step.mutate(prune_to=0.7, grow_to=0.6, gradients=found)
    for name, mask in step.masks().items():
        layer = step.layers[name]
        grown, dead = mask & ~masks[name], ~mask
        assert grown.any(), name
        assert (step.state_dict()[name][grown] != 0).all() == (scheme == "filter")
        axes = {"filter": (1, 2, 3), "channel": (0, 2, 3)}.get(scheme)
        strength = np.square(found[name], dtype=np.float64)
        if axes:
            strength = np.broadcast_to(strength.sum(axes, keepdims=True), strength.shape)
        elif scheme == "block":
            strength = np.repeat(layer.scheme.energy(layer.spec, found[name]), 4, axis=0)
        elif scheme == "pattern":  # in every filter the kernels whose best pattern has most
            continue
        assert strength[grown].min() >= strength[dead].max(), name


def sample(count, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    return rng.integers(0, 256, (count, 3, 8, 8), np.uint8), labels


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_methods_keep_the_target_sparsity(method):
    step = make("unstructured", label_smoothing=0.1)[0]
    recipe = Recipe(4, method, lr=0.01, mutate_every=1, label_smoothing=0.1, clip_norm=1.0)
    run = Trainer(step, recipe).fit(sample(32, 0), sample(16, 1))
    target = run.history[0]["sparsity"]
    assert all(metrics["sparsity"] == target for metrics in run.history)
    mutations = [metrics["mutation"] for metrics in run.history]
    assert mutations[0] is None and all(mutation["layers"] for mutation in mutations[1:])
    assert [("dense_gradient_bytes" in mutation) for mutation in mutations[1:]] == [method == "rigl"] * 3
    survival = [np.mean(list(metrics["survival"].values())) for metrics in run.history]
    assert survival[0] == 1 and survival == sorted(survival, reverse=True) and survival[-1] < 1


def test_a_recipe_and_a_step_of_different_smoothing_are_refused():
    with pytest.raises(
        UsageError, match=r"label_smoothing 0.2, the step was compiled with 0.0; compile it with label_smoothing=0.2"
    ):
        Trainer(make()[0], Recipe(1, "static", label_smoothing=0.2))

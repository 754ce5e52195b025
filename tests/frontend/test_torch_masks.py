"""Modules whose masks are still attached are read as the plain ones that they amount to, and stay as they are."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import mest_compile as mest
from mest_compile.base.errors import SparsityError, StateError, UnsupportedOperator
from mest_compile.frontend import from_torch
from mest_compile.frontend.torch_masks import attached_masks, plainly, trained_parameters

SHAPE = (4, 3, 6, 6)


class Mask(nn.Module):
    """A parametrization as torch.ao.pruning's."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        assert weight.shape == self.mask.shape
        return self.mask * weight


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 5),
    )


def pruned():
    """(by torch.nn.utils.prune, twice, after a forward; by parametrizations), of the same weights."""
    hooked, other = net(), net()
    prune.l1_unstructured(hooked[2], "weight", amount=0.5)
    prune.random_unstructured(hooked[2], "weight", amount=0.5)
    prune.ln_structured(hooked[5], "weight", amount=0.4, n=2, dim=0)
    hooked(torch.zeros(SHAPE))  # now it cannot be copied
    for place in 2, 5:
        parametrize.register_parametrization(other[place], "weight", Mask(hooked[place].weight_mask.clone()))
    return hooked, other


@pytest.mark.parametrize("kind", ["hook", "property"])
def test_masks_are_multiplied_in_and_the_module_stays_as_it_was(kind):
    model = pruned()[kind == "property"]
    wanted = {place: (pruned()[0][place].weight_orig * pruned()[0][place].weight_mask).detach() for place in (2, 5)}
    images = torch.randn(SHAPE)
    said = model(images).detach()
    if kind == "hook":
        with torch.no_grad():
            model[2].weight += 1  # stale
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def inside():
        return [(type(part), {key: id(value) for key, value in vars(part).items()}) for part in model.modules()]

    was = inside()
    _, state = from_torch(model, SHAPE)
    assert inside() == was
    assert state.keys() == net().state_dict().keys()
    for place, weight in wanted.items():
        assert torch.equal(torch.from_numpy(state[f"{place}.weight"]), weight)
        assert (weight == 0).any()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(images), said)


def test_a_failure_meanwhile_leaves_the_module_as_it_was():
    for model in pruned():
        keys, inside = list(model.state_dict()), []
        with contextlib.suppress(ZeroDivisionError), plainly(model):
            inside = list(model.state_dict())
            raise ZeroDivisionError
        assert set(inside) == set(net().state_dict())
        assert list(model.state_dict()) == keys and attached_masks(model).keys() == {"2.weight", "5.weight"}


def test_what_is_no_mask_is_no_mask():
    for make in (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal):
        assert not attached_masks(nn.Sequential(make(nn.Linear(4, 4))))
    for other in (nn.Identity(), nn.Tanh(), nn.Dropout(0.5)):
        layer = nn.Linear(4, 4)
        parametrize.register_parametrization(layer, "weight", other)
        assert not attached_masks(layer)
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Mask(torch.eye(4)))
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    assert not attached_masks(layer)


def test_looking_at_a_parametrization_does_not_train_it():
    layer = parametrizations.spectral_norm(nn.Linear(4, 4)).train()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    attached_masks(layer)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_what_else_is_attached_is_refused_as_without_masks():
    model = pruned()[0]
    model[2].weight_orig.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(UnsupportedOperator, match="2.weight has a gradient hook"):
        from_torch(model, SHAPE)
    model = pruned()[0]
    model[2].register_forward_pre_hook(lambda module, given: None)
    with pytest.raises(UnsupportedOperator, match="layer '2' has a forward-pre hook"):
        from_torch(model, SHAPE)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    for place in 0, 2:
        prune.custom_from_mask(model[place], "weight", torch.eye(4))
    with pytest.raises(UnsupportedOperator, match="are one parameter"):
        from_torch(model, (2, 4))


def test_what_is_frozen_and_in_which_group_of_an_optimizer_is_told_by_plain_names():
    for model in pruned():
        model[5].requires_grad_(False)
        graph, _ = from_torch(model, SHAPE)
        assert graph.frozen.keys() == {"5.weight", "5.bias"}
        names = trained_parameters(model)
        assert names.keys() == dict(net().named_parameters()).keys()
        assert {id(one) for one in names.values()} == {id(one) for one in model.parameters()}


@pytest.mark.parametrize("kind", ["hook", "property"])
def test_a_mask_that_the_step_would_not_keep_is_refused(kind):
    model = pruned()[kind == "property"]
    with pytest.raises(SparsityError, match="2.weight has a mask attached, .* pass sparsity='as-given'"):
        mest.compile(model, SHAPE, scheme="unstructured", sparsity=0.9)
    with pytest.raises(SparsityError, match="5.weight has a mask that nothing would keep: it is to be dense"):
        mest.compile(model, SHAPE, scheme="unstructured", sparsity="as-given", dense_layers=["5"])
    prune.random_unstructured(model[0], "bias", amount=2)
    with pytest.raises(SparsityError, match="0.bias has a mask that nothing would keep: is not the weight"):
        mest.compile(model, SHAPE, scheme="unstructured", sparsity="as-given")


@pytest.mark.parametrize("kind", ["hook", "property"])
def test_trained_weights_go_back_into_masked_modules(kind):
    model = pruned()[kind == "property"]
    groups = [{"params": model[:3].parameters()}, {"params": model[5].parameters(), "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    step = mest.compile(model, SHAPE, scheme="unstructured", sparsity="as-given", threads=1, optimizer=optimizer)
    images = torch.randn(SHAPE)
    for _ in range(2):
        step(images, torch.arange(4))
    mest.to_torch(step, model)
    trained = torch.from_numpy(step.state_dict()["2.weight"])
    assert torch.equal(model[2].weight, trained)  # without a forward
    torch.testing.assert_close(model(images).detach(), torch.from_numpy(step.predict(images)))
    step.mutate(prune_to=0.8, grow_to=0.7)
    if kind == "property":
        step(images, torch.arange(4))
        with pytest.raises(StateError, match="2.weight is parametrized by a mask that is not the step's: call"):
            mest.to_torch(step, model)
        assert torch.equal(model[2].weight, trained)
        return
    mest.to_torch(step, model)
    for place in 2, 5:
        assert torch.equal(model[place].weight_mask != 0, torch.from_numpy(step.masks()[f"{place}.weight"]))
    torch.testing.assert_close(model(images).detach(), torch.from_numpy(step.predict(images)))


@pytest.mark.filterwarnings("ignore")
def test_what_torch_ao_has_pruned_is_taken_while_its_masks_are_attached_and_after():
    pruning = pytest.importorskip("torch.ao.pruning", reason="this torch has no torch.ao.pruning")
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    sparsifier = pruning.WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.step()
    options = {"scheme": "2:4", "sparsity": "as-given", "threads": 1}
    step = mest.compile(model, (4, 16), **options)
    assert step.sparsity() == {"0.weight": 0.5, "2.weight": 0.5}
    step(torch.randn(4, 16), torch.arange(4))
    mest.to_torch(step, model)
    images = torch.randn(4, 16)
    torch.testing.assert_close(model(images).detach(), torch.from_numpy(step.predict(images)))
    sparsifier.squash_mask()
    again = mest.compile(model, (4, 16), **options)
    for name, mask in step.masks().items():
        assert (again.masks()[name] == mask).all()
        assert (again.state_dict()[name] == step.state_dict()[name]).all()

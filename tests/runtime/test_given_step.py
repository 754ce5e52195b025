"""Steps of pruned models: what is outside the mask stays 0, what lives trains as masked torch, files keep it."""

import numpy as np
import pytest
import torch
from nets import short_resnet
from test_schemes_step import MaskedTorch, survivors
from test_step import assert_like_torch, make_batches
from torch.nn.utils import prune

import mest_compile as mest
from mest_compile.base.errors import UsageError
from mest_compile.options import StepOptions

SHAPE = (8, 3, 8, 8)
RULE = mest.SGD(lr=0.01, momentum=0.9, weight_decay=1e-2)


def pruned():
    """By torch, globally: some layers keep more than others, one has whole filters without a weight."""
    torch.manual_seed(1)
    net = short_resnet(SHAPE)
    layers = [(part, "weight") for part in net.modules() if isinstance(part, torch.nn.Conv2d)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=0.9)
    prune.ln_structured(net.layer2[0].conv2, "weight", amount=5, n=2, dim=0)
    for part, name in layers:
        prune.remove(part, name)
    return net


def compiled(net, **options):
    return mest.compile(net, SHAPE, scheme="unstructured", sparsity="as-given", threads=1, optimizer=RULE, **options)


def test_a_pruned_net_trains_as_masked_torch_and_not_one_weight_outside_its_mask(builder, tmp_path):
    net = pruned()
    step = compiled(net, builder=builder)
    given = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}
    masks = {name: given[name] != 0 for name in step.masks()}
    assert len(masks) == 9 and len({round(mask.mean(), 3) for mask in masks.values()}) > 4
    assert not masks["layer2.0.conv2.weight"].any((1, 2, 3)).all()  # whole filters may be dead
    for name, array in step.state_dict().items():  # nothing was trained: the weights are what they were
        np.testing.assert_array_equal(array, given[name], err_msg=name)
        assert array[array != 0].tobytes() == given[name][given[name] != 0].tobytes()
        assert not np.signbit(array[array == 0]).any()
    twin, batches = MaskedTorch(net, masks, RULE), make_batches(SHAPE, 10, 6)
    np.testing.assert_allclose(
        [step(*batch).loss for batch in batches[:4]], [twin.step(*batch) for batch in batches[:4]], rtol=1e-4
    )
    assert_like_torch(step, net, batches[5][0])
    state = step.state_dict()
    for name, mask in masks.items():
        np.testing.assert_array_equal(step.masks()[name], mask)
        assert not state[name][~mask].any() and (state[name] != given[name])[mask].all()

    step.save(tmp_path / "a.safetensors")
    step.export(tmp_path / "artifact")
    after = [step(*batches[4]).loss]
    for other in (mest.load(tmp_path / "a.safetensors", builder=builder), mest.open_artifact(tmp_path / "artifact")):
        assert [other(*batches[4]).loss] == after
        assert all((other.masks()[name] == mask).all() for name, mask in masks.items())


def test_masks_that_mutate_keep_their_proportions(builder):
    step = compiled(pruned(), builder=builder)
    given, sparsity = step.masks(), step.sparsity()
    elems = {name: mask.size for name, mask in given.items()}
    overall = sum(sparsity[name] * elems[name] for name in given) / sum(elems.values())
    step(*make_batches(SHAPE, 10, 1)[0])
    before = step.state_dict()
    step.mutate(prune_to=overall + 0.2 * (1 - overall), grow_to=overall, rng=np.random.default_rng(0))
    after = step.masks()
    stay = survivors(before, given, step.state_dict(), after)
    for name, mask in given.items():
        assert abs(int(after[name].sum()) - int(mask.sum())) <= 1  # `overall` is told to six digits
        assert abs(stay[name].sum() - 0.8 * mask.sum()) <= 1 and (after[name] & ~mask).any()


def test_a_run_of_a_pruned_net_resumes(tmp_path, builder):
    rng = np.random.default_rng(0)
    data = rng.standard_normal((24, *SHAPE[1:])).astype(np.float32), rng.integers(0, 10, 24)
    recipe = mest.Recipe(epochs=3, method="em", augment=False, mutate_every=1, drop_last=True)

    def trainer(folder):
        return mest.Trainer(compiled(pruned(), builder=builder), recipe, tmp_path / folder)

    whole = trainer("whole")
    whole.fit(data, data)
    begun = trainer("begun")
    stop = begun._keep

    def after_one(run, *others):
        stop(run, *others)
        if len(run.history) == 1:
            raise KeyboardInterrupt

    begun._keep = after_one
    with pytest.raises(KeyboardInterrupt):
        begun.fit(data, data)
    resumed = mest.Trainer.resume(tmp_path / "begun")
    resumed.fit(data, data)
    for name, array in whole.step.state_dict().items():
        np.testing.assert_array_equal(array, resumed.step.state_dict()[name])


def test_a_recipe_leaves_the_masks_to_the_model():
    options = mest.Recipe(epochs=4, method="em").step_options(StepOptions("unstructured", "as-given"))
    assert options.sparsity == "as-given" and options.grow_to is None
    with pytest.raises(UsageError, match="lower_density"):
        mest.compile("mlp", SHAPE, sparsity="as-given", memory_budget=10**9, lower_density=True)

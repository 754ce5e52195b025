"""Steps of 2:4 nets against masked dense torch, a mutation between them."""

import numpy as np
import pytest
from test_schemes_step import MaskedTorch, Small, survivors
from test_step import make_batches

import mest_compile as mest
from mest_compile.base.errors import SparsityError

SHAPE = (8, 3, 8, 8)


def test_steps_with_a_mutation_between_them_equal_masked_torch(builder, tmp_path):
    model, rule = Small(8), mest.SGD(lr=0.002, momentum=0.9, weight_decay=1e-3)
    step = mest.compile(model, SHAPE, scheme="2:4", dense_layers=["conv1"], optimizer=rule, threads=1, builder=builder)
    before, batches = step.masks(), make_batches(SHAPE, 10, 6)
    assert len(before) == 5 and all(mask.mean() == 0.5 for mask in before.values())
    twin = MaskedTorch(model, before, rule)
    np.testing.assert_allclose(
        [step(*batch).loss for batch in batches[:3]], [twin.step(*batch) for batch in batches[:3]], rtol=1e-4
    )
    weights = step.state_dict()
    step.mutate(prune_to=0.6, grow_to=0.5, rng=np.random.default_rng(1))
    after, state = step.masks(), step.state_dict()
    twin.exchange(after, survivors(weights, before, state, after), state)
    np.testing.assert_allclose(
        [step(*batch).loss for batch in batches[3:]], [twin.step(*batch) for batch in batches[3:]], rtol=1e-4
    )
    for name, mask in after.items():
        assert (mask != before[name]).any()
        groups = mask.reshape(mask.shape[0], -1, 4, *mask.shape[2:]).sum(2)
        assert (groups == 2).all(), name
    step.save(tmp_path / "a.safetensors")
    loaded = mest.load(tmp_path / "a.safetensors", builder=builder)
    assert loaded.describe()["schemes"] == step.describe()["schemes"]
    assert loaded(*batches[0]).loss == step(*batches[0]).loss


def test_a_method_that_grows_beyond_the_groups_is_refused_before_training():
    step = mest.compile("mlp", (4, 1, 4, 4), scheme="2:4", dense_layers=["fc3"], threads=1)
    with pytest.raises(SparsityError, match="fc1.weight: sparsity is 0.45; scheme 2:4 has room for 0.5 and more"):
        mest.Trainer(step, mest.Recipe(epochs=8, method="em_s"))

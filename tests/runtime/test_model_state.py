"""A model's names and state, from torch and back: layers of any name, and what the forward pass does not use, bit for
bit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import mest_compile as mest
from mest_compile.base.errors import SpecError, StateError
from mest_compile.frontend import from_torch

SHAPE = (4, 8)


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def compiled(module, shape=SHAPE, **options):
    return mest.compile(module, shape, **({"scheme": "dense", "sparsity": 0} | options))


class Named(nn.Module):
    """Layers of any name, one after another."""

    def __init__(self, *names):
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        for name in self.names:
            x = F.relu(self.get_submodule(name)(x))
        return x


def test_layers_may_have_any_name():
    torch.manual_seed(0)
    module = Named("input", "input_", "a:b", "a_b", "onnx::Conv_1", "images")
    x, y = torch.randn(SHAPE), torch.arange(4)
    step = compiled(module, scheme="unstructured", sparsity=0.5, dense_layers=["input.weight"])
    mest.to_torch(step, module)
    np.testing.assert_allclose(step.predict(x), module(x).detach().numpy(), rtol=0, atol=1e-6)
    loss = F.cross_entropy(module(x), y)
    loss.backward()
    gradients = step.gradients(x, y)
    assert sorted(gradients) == sorted(module.state_dict())
    masks = step.masks()
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(
            gradients[name], parameter.grad * torch.from_numpy(masks.get(name, np.array(1))), rtol=0, atol=1e-6
        )


def test_names_of_the_steps_own_arrays_are_refused():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.images = nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            return F.linear(x, self.images)

    with pytest.raises(SpecError, match="'images' cannot be a parameter's name here.*rename"):
        from_torch(Root(), SHAPE)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_wrappers_are_looked_into(wrap):
    module = net()
    step = compiled(wrap(module))
    assert sorted(step.state_dict()) == sorted(module.state_dict())
    step(torch.randn(SHAPE), torch.arange(4))
    mest.to_torch(step, wrap(module))
    np.testing.assert_array_equal(module[0].weight.detach().numpy(), step.state_dict()["0.weight"])


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.old, self.norm = nn.Linear(8, 4), nn.Linear(3, 3), nn.BatchNorm1d(3).eval()
        self.old.requires_grad_(False)
        for name, value in KEPT.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.layer(x)

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        pass


KEPT = {
    "best": torch.full((1,), 7.0),
    "count": torch.tensor(2**53 + 1),
    "flags": torch.tensor([True, False]),
    "small": torch.arange(3).byte(),
    "wide": torch.tensor([1 / 3], dtype=torch.float64),
    "narrow": torch.tensor([[0.1, float("nan")]], dtype=torch.float16),
    "empty": torch.zeros(0, 4),
}


def assert_kept(found):
    for name, value in KEPT.items():
        array = np.asarray(found[name])
        assert (array.dtype, array.shape, array.tobytes()) == (
            value.numpy().dtype,
            tuple(value.shape),
            value.numpy().tobytes(),
        ), name


@pytest.fixture(scope="module")
def unused():
    torch.manual_seed(0)
    module = Unused()
    step = compiled(module)
    step(torch.randn(SHAPE), torch.arange(4))
    return module, step


def test_what_forward_does_not_use_stays_bit_for_bit(unused, tmp_path):
    module, step = unused
    state = step.state_dict()
    assert list(state) == [name for name in module.state_dict() if name != "_extra_state"]
    assert_kept(state)
    np.testing.assert_array_equal(state["old.weight"], module.old.weight.numpy())

    step.save(tmp_path / "step")
    opened = mest.load(tmp_path / "step")
    assert_kept(opened.state_dict())
    np.testing.assert_array_equal(opened.state_dict()["old.weight"], module.old.weight.numpy())

    target = Unused()
    for buffer in target.buffers():
        buffer.zero_()
    mest.to_torch(opened, target)
    assert_kept(target.state_dict())
    np.testing.assert_array_equal(target.old.weight, module.old.weight)


def test_what_forward_does_not_use_is_loaded_and_restored(unused, tmp_path):
    _, step = unused
    other = compiled(Unused())
    changed = {name: array + array if array.dtype.kind == "f" else array for name, array in step.state_dict().items()}
    other.load_state_dict(changed)
    assert_same_bits(other.state_dict(), changed)
    step.save(tmp_path / "step")
    other.restore(tmp_path / "step")
    assert_same_bits(other.state_dict(), step.state_dict())
    with pytest.raises(StateError, match="count is no array of int64"):
        other.load_state_dict(changed | {"count": "seven"})
    with pytest.raises(StateError, match="missing .'count'."):
        other.load_state_dict({name: array for name, array in changed.items() if name != "count"})


def assert_same_bits(found, wanted):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape, found[name].tobytes()) == (
            array.dtype,
            array.shape,
            array.tobytes(),
        ), name


def test_a_checkpoint_without_what_the_model_does_not_use_is_refused(unused, tmp_path):
    from mest_compile.runtime import checkpoint

    _, step = unused
    step.save(tmp_path / "step")
    arrays, facts = checkpoint.read(tmp_path / "step")
    del arrays["kept/old.weight"]
    checkpoint.write(tmp_path / "old", arrays, facts)
    with pytest.raises(StateError, match="lacks kept/old.weight"):
        step.restore(tmp_path / "old")


def test_state_that_no_checkpoint_can_hold_is_refused():
    for kind in ("complex64", "bfloat16"):
        module = net()
        module.register_buffer("odd", torch.zeros(3, dtype=getattr(torch, kind)))
        with pytest.raises(SpecError, match=f"odd is {kind}"):
            from_torch(module, SHAPE)
    module = net()
    module.register_buffer("odd", torch.eye(3).to_sparse())
    with pytest.raises(SpecError, match="odd is sparse_coo"):
        from_torch(module, SHAPE)


def counters(state):
    return {name: value for name, value in state.items() if name.endswith("num_batches_tracked")}


def test_batches_are_counted_as_torch_counts_them(tmp_path):
    torch.manual_seed(0)
    module = net()
    module.unused = nn.BatchNorm1d(16)
    module.forward = lambda x: module[3](module[2](module[1](module[0](x))))
    module[1].num_batches_tracked.fill_(2**40)
    step = compiled(module)
    x, y = torch.randn(SHAPE), torch.arange(4)
    for clip_norm in (None, 1.0, None):
        step(x, y, clip_norm=clip_norm)
    step.predict(x), step.gradients(x, y), step.profile(x, y)
    want = {"1.num_batches_tracked": 2**40 + 3, "unused.num_batches_tracked": 0}
    assert counters(step.state_dict()) == want
    step.save(tmp_path / "step")
    step(x, y)
    opened = mest.load(tmp_path / "step")
    assert counters(opened.state_dict()) == want
    opened(x, y)
    mest.to_torch(opened, module)
    found = counters(module.state_dict())
    assert found == counters(step.state_dict()) == want | {"1.num_batches_tracked": 2**40 + 4}
    assert all(value.dtype == torch.int64 and value.shape == () for value in found.values())


def test_a_state_without_counters_leaves_them_as_they_are():
    torch.manual_seed(0)
    step = compiled(net())
    step(torch.randn(SHAPE), torch.arange(4))
    state = step.state_dict()
    step.load_state_dict({name: array for name, array in state.items() if name not in counters(state)})
    assert counters(step.state_dict()) == {"1.num_batches_tracked": 1}
    step.load_state_dict(state | {"1.num_batches_tracked": 7})
    assert counters(step.state_dict()) == {"1.num_batches_tracked": 7}


def test_a_module_that_computes_its_weights_is_told_how_to_take_them():
    step = compiled(net())
    for name in ("weight", "bias"):
        module = net()
        parametrize.register_parametrization(module[3], name, nn.Identity())
        with pytest.raises(StateError, match="it is parametrized: .*remove_parametrizations"):
            mest.to_torch(step, module)

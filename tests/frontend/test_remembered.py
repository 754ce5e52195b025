"""Graphs that are kept between processes: the same as what is read, and never another module's."""

import pytest
import torch
from torch import nn

import mest_compile.frontend.torch_import as torch_import
from mest_compile.base.errors import SpecError
from mest_compile.frontend import from_torch, import_model
from mest_compile.frontend.remembered import key_of
from mest_compile.models.catalog import BuiltIn, build_model

SHAPE = (2, 3, 8, 8)


def net(**changed):
    stride, activation = changed.get("stride", 1), changed.get("activation", nn.ReLU())
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride, 1),
        nn.BatchNorm2d(8),
        activation,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


@pytest.fixture(autouse=True)
def cold(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mest-compile" / "graphs"


@pytest.fixture
def unread(monkeypatch):
    """After this call no module is read any more."""

    def refuse():
        monkeypatch.setattr(torch_import, "read_module", lambda *_: pytest.fail("the module was read again"))

    return refuse


@pytest.mark.parametrize(("name", "shape"), [("resnet8", (2, 3, 32, 32)), ("mobilenetv3-small", (1, 3, 32, 32))])
def test_what_is_kept_is_what_was_read(name, shape, unread):
    read, _ = from_torch(build_model(name, shape), shape)
    unread()
    module = build_model(name, shape, seed=1)
    kept, state = from_torch(module, shape)
    assert kept == read
    assert all((array == module.state_dict()[name].numpy()).all() for name, array in state.items())


def test_a_built_in_model_that_was_read_by_its_name_is_not_made_again(cold, monkeypatch):
    read = import_model(BuiltIn("resnet8", SHAPE, 4, 8, seed=3), SHAPE)
    made = build_model("resnet8", SHAPE, 4, 8, seed=3).state_dict()
    monkeypatch.setattr(BuiltIn, "made", lambda self: pytest.fail(f"{self} was made"))
    graph, state = import_model(BuiltIn("resnet8", SHAPE, 4, 8, seed=3), SHAPE)
    assert graph == read[0] and list(state) == list(read[1])
    assert all(
        (array == made[name].numpy()).all() and array.dtype == read[1][name].dtype for name, array in state.items()
    )
    for other in ({"seed": 4}, {"classes": 5}, {"width": 16}, {"name": "resnet20"}, {"input_shape": (2, 1, 8, 8)}):
        model = BuiltIn(**{"name": "resnet8", "input_shape": SHAPE, "classes": 4, "width": 8, "seed": 3} | other)
        with pytest.raises(pytest.fail.Exception):
            import_model(model, model.input_shape)
    (weights,) = (cold.parent / "fresh").iterdir()
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(pytest.fail.Exception):
        import_model(BuiltIn("resnet8", SHAPE, 4, 8, seed=3), SHAPE)


def frozen(module):
    module[0].weight.requires_grad_(False)
    return module


def evaluating(module):
    module[1].eval()
    return module


def shared(module):
    module[2] = module[1]
    return module


@pytest.mark.parametrize(
    "other",
    [
        lambda: net(stride=2),
        lambda: net(activation=nn.LeakyReLU(0.1)),
        lambda: frozen(net()),
        lambda: evaluating(net()),
        lambda: shared(net()),
        lambda: net().requires_grad_(False),
    ],
)
def test_what_is_read_otherwise_has_another_key(other):
    assert key_of(net(), SHAPE) == key_of(net(), SHAPE) is not None
    assert key_of(other(), SHAPE) not in (None, key_of(net(), SHAPE))
    assert key_of(net(), SHAPE) != key_of(net(), (4, 3, 8, 8))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        return self.inner(x)


def hooked(module):
    module[0].register_forward_hook(lambda *_: None)
    return module


def pruned(module):
    torch.nn.utils.parametrize.register_parametrization(module[0], "weight", nn.Identity())
    return module


def patched(module):
    module[2].forward = lambda x: x
    return module


@pytest.mark.parametrize("module", [Own, *(lambda make=make: make(net()) for make in (hooked, pruned, patched))])
def test_what_somebody_wrote_has_none(module):
    assert key_of(module(), SHAPE) is None


def test_a_file_that_is_damaged_or_cannot_be_written_costs_the_cache_alone(cold, unread):
    read, _ = from_torch(net(), SHAPE)
    (path,) = cold.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert from_torch(net(), SHAPE)[0] == read
    (path,) = cold.iterdir()
    path.unlink()
    cold.rmdir()
    cold.write_text("no folder")
    assert from_torch(net(), SHAPE)[0] == read
    unread()
    with pytest.raises(pytest.fail.Exception):
        from_torch(net(), SHAPE)


def test_weights_are_looked_at_each_time():
    from_torch(net(), SHAPE)
    module = net()
    with torch.no_grad():
        module[5].weight[0, 0] = torch.nan
    with pytest.raises(SpecError, match=r"5\.weight"):
        from_torch(module, SHAPE)

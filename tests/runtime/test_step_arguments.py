"""What a step is handed: read as what it is, or refused in one line that says what was wanted, with nothing changed."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import mest_compile as mest
from mest_compile import compiling

SHAPE = (4, 1, 8, 8)
INFINITE, NAN = float("inf"), float("nan")
BEYOND = 1e39  # finite in float64, infinite in float32


@pytest.fixture(scope="module")
def given():
    """A step, a batch, and what a caller may have at hand beside them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    step = mest.compile(net, SHAPE, scheme="unstructured", sparsity=0.5, dense_layers=["3"], threads=1)
    x, y = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32), np.array([0, 1, 2, 0])
    step(x, y)
    return SimpleNamespace(step=step, x=x, y=y, t=torch.from_numpy(x), masks=step.masks(), state=step.state_dict())


def all_of(step):
    return [step._state.get(name).tobytes() for name in step._state.own()] + [
        str(step._rng.bit_generator.state),
        str(step.masks()),
    ]


def masked(x):
    return np.ma.masked_array(x, np.arange(x.size).reshape(x.shape) == 3)


def wide(g, value):
    return {name: np.full(mask.shape, value) for name, mask in g.masks.items()}


def changed(g, value):
    return g.state | {"3.bias": np.full(3, value)}


RATES = {
    f"lr={value!r}": (lambda g, value=value: g.step(g.x, g.y, lr=value), "lr is")
    for value in (BEYOND, NAN, INFINITE, -1, "0.1", True, [1])
}
BOUNDS = {
    f"clip_norm={value!r}": (lambda g, value=value: g.step(g.x, g.y, clip_norm=value), "clip_norm is")
    for value in (0, 0.0, -1.0, NAN, INFINITE, BEYOND, "a", np.float32(0))
}
SHARES = {
    f"mutate{pair!r}": (lambda g, pair=pair: g.step.mutate(*pair), "prune_to|grow_to")
    for pair in (("a", "b"), (0.5, NAN), (1.0, 0.5), (0.6, -0.1), (None, 0.5), (0.5, 0.6), (True, 0.5))
}
REFUSED = (
    RATES
    | BOUNDS
    | SHARES
    | {
        "importance": (lambda g: g.step.mutate(0.6, 0.5, importance_lambda=NAN), "importance_lambda is"),
        "rng": (lambda g: g.step.mutate(0.6, 0.5, rng="a"), "default_rng"),
        "rng as seed": (lambda g: g.step.mutate(0.6, 0.5, rng=3), "default_rng"),
        "no gradients": (lambda g: g.step.mutate(0.6, 0.5, gradients={}), "gradients lack 1.weight"),
        "gradients are a list": (lambda g: g.step.mutate(0.6, 0.5, gradients=[1]), "gradients lack 1.weight"),
        "shape of gradients": (
            lambda g: g.step.mutate(0.6, 0.5, gradients={"1.weight": np.ones((2, 2))}),
            r"\(2, 2\), the weight \(8, 64\)",
        ),
        "NaN in gradients": (
            lambda g: g.step.mutate(0.6, 0.5, gradients=wide(g, NAN)),
            "1.weight have values that are NaN",
        ),
        "gradients beyond float32": (lambda g: g.step.mutate(0.6, 0.5, gradients=wide(g, BEYOND)), "NaN or infinite"),
        "room": (lambda g: g.step.check_room("a"), "grow_to is"),
        "no state": (lambda g: g.step.load_state_dict(None), "the state is None; wanted a dict"),
        "NaN in the state": (
            lambda g: g.step.load_state_dict(changed(g, NAN)),
            "NaN or infinite in float32: in 3.bias",
        ),
        "state beyond float32": (lambda g: g.step.load_state_dict(changed(g, BEYOND)), "in 3.bias"),
        "text in the state": (lambda g: g.step.load_state_dict(changed(g, "1")), "3.bias have type <U1"),
        "complex state": (lambda g: g.step.load_state_dict(changed(g, 1j)), "real numbers"),
        "no masks": (lambda g: g.step.set_masks(None), "masks is None; wanted a dict"),
        "scores": (
            lambda g: g.step.set_masks({"1.weight": np.full((8, 64), 0.5, "f")}),
            "512 values are others: compare scores",
        ),
        "counts": (lambda g: g.step.set_masks({"1.weight": np.full((8, 64), 2)}), "a mask is True"),
        "NaN in a mask": (lambda g: g.step.set_masks({"1.weight": np.full((8, 64), NAN)}), "a mask is True"),
        "mask of objects": (lambda g: g.step.set_masks({"1.weight": None}), "the mask's values"),
        "shape of a mask": (
            lambda g: g.step.set_masks({"1.weight": np.ones((64, 8), bool)}),
            r"\(64, 8\), the weight \(8, 64\)",
        ),
        "dead layer": (lambda g: g.step.set_masks({"1.weight": np.zeros((8, 64), bool)}), "no live weight"),
        "complex images": (
            lambda g: g.step(g.x.astype(complex), g.y),
            "images have type complex128; wanted real numbers",
        ),
        "complex tensor": (lambda g: g.step(g.t.to(torch.complex64).conj(), g.y), "complex64"),
        "masked images": (lambda g: g.step(masked(g.x), g.y), "images have masked values"),
        "masked labels": (lambda g: g.step(g.x, masked(g.y)), "labels have masked values"),
        "images of texts": (lambda g: g.step(np.full(SHAPE, "1"), g.y), "images have type <U1"),
        "images of dates": (lambda g: g.step(np.zeros(SHAPE, "m8[s]"), g.y), "timedelta"),
        "images of objects": (lambda g: g.step(g.x.astype(object), g.y), "object"),
        "images without numbers": (lambda g: g.step(g.t.to("meta"), g.y), "meta device"),
        "images beyond float32": (
            lambda g: g.step(np.full(SHAPE, BEYOND), g.y),
            "256 image values are NaN or infinite",
        ),
        "no images": (lambda g: g.step(None, g.y), "images have type object"),
        "labels of booleans": (lambda g: g.step(g.x, np.zeros(4, bool)), "wanted whole numbers"),
        "complex to predict": (lambda g: g.step.predict(g.x.astype(complex)), "real numbers"),
        "masked to predict": (lambda g: g.step.predict(masked(g.x)), "masked"),
        "repeats": (lambda g: g.step.profile(g.x, g.y, repeats=0), "repeats is 0"),
        "steps": (lambda g: g.step.plan(steps=1.5), "steps is 1.5"),
        "extra": (lambda g: g.step.save("nowhere/a", extra={"a": {1}}), "extra cannot be written"),
        "rate of the optimizer": (lambda g: mest.SGD(lr=BEYOND), "lr is"),
        "decay of the optimizer": (lambda g: mest.SGD(weight_decay=INFINITE), "weight_decay is"),
        "momentum of the optimizer": (lambda g: mest.SGD(momentum=NAN), "momentum is"),
        "nesterov of the optimizer": (lambda g: mest.SGD(nesterov="no"), "nesterov is"),
    }
)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_one_line_and_changes_nothing(case, given):
    call, said = REFUSED[case]
    before = all_of(given.step)
    with pytest.raises(mest.MestError, match=said) as caught:
        call(given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert all_of(given.step) == before


ALIKE = {
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "float16": lambda t: t.half(),
    "sparse": lambda t: t.to_sparse(),
    "negated": torch._neg_view,
    "trained": lambda t: t.clone().requires_grad_(),
    "strided": lambda t: t.transpose(2, 3),
    "list": lambda t: t.tolist(),
    "masked without a mask": lambda t: np.ma.masked_array(t.numpy()),
    "uint8": lambda t: t.abs().to(torch.uint8),
    "big-endian": lambda t: t.numpy().astype(">f4"),
    "booleans": lambda t: t > 0,
}


@pytest.mark.parametrize("kind", ALIKE)
def test_images_of_any_type_are_read_as_what_they_are(kind, given):
    images = ALIKE[kind](given.t)
    dense = images.to_dense() if kind == "sparse" else images
    plain = np.array(dense if kind == "list" else dense.tolist(), np.float32)
    np.testing.assert_array_equal(given.step.predict(images), given.step.predict(plain))


@pytest.mark.parametrize("kind", [bool, np.float32, np.int64, torch.tensor])
def test_masks_of_ones_and_zeros_are_masks(kind, given):
    mask = given.masks["1.weight"]
    given.step.set_masks({"1.weight": torch.tensor(mask) if kind is torch.tensor else mask.astype(kind)})
    np.testing.assert_array_equal(given.step.masks()["1.weight"], mask)


def test_numbers_of_numpy_are_numbers(given):
    given.step(given.x, given.y, lr=np.float32(0.1), clip_norm=np.float64(1))
    given.step.mutate(np.float32(0.5), np.float64(0.5), importance_lambda=np.int64(1))
    rule = mest.SGD(lr=np.float32(0.5), momentum=np.float64(0.5))
    assert (type(rule.lr), rule.momentum) == (float, 0.5)


def test_a_next_batch_that_is_wrong_is_told_by_its_own_call(given, monkeypatch):
    sent = []
    monkeypatch.setattr(given.step._runner, "put_ahead", lambda name, array: sent.append(name), raising=False)
    monkeypatch.setattr(given.step._runner, "turn", lambda: None, raising=False)
    following = np.full(SHAPE, NAN), given.y
    assert np.isfinite(given.step(given.x, given.y, ahead=following).loss) and not sent
    with pytest.raises(mest.MestError, match="NaN"):
        given.step(*following)


def test_threads_are_checked_by_whoever_opens_a_step(given, tmp_path):
    given.step.save(tmp_path / "a")
    for threads in (1.5, "2", 0, -1, True):
        with pytest.raises(mest.MestError, match="threads is"):
            mest.load(tmp_path / "a", threads=threads)


def test_a_checkpoint_that_lacks_arrays_is_refused_before_anything_is_changed(given, tmp_path):
    from mest_compile.runtime import checkpoint

    given.step.save(tmp_path / "a")
    arrays, facts = checkpoint.read(tmp_path / "a")
    before = all_of(given.step)
    for lacking in ("order/1.weight", "held/1.weight:momentum"):
        checkpoint.write(tmp_path / "b", {name: array for name, array in arrays.items() if name != lacking}, facts)
        with pytest.raises(mest.MestError, match=f"lacks {lacking}"):
            given.step.restore(tmp_path / "b")
    checkpoint.write(tmp_path / "b", arrays, facts | {"rng": {}})
    with pytest.raises(mest.MestError, match="random generator"):
        given.step.restore(tmp_path / "b")
    assert all_of(given.step) == before


def test_what_compiling_needed_is_given_back(monkeypatch):
    """When nothing holds the model's own weights any more."""
    planned, held, found = compiling.planned_step, [], []

    def watched(*arguments):
        plan, state, masks = planned(*arguments)
        state = {name: array.copy() for name, array in state.items()}
        held.extend(weakref.ref(array) for array in state.values())
        return plan, state, masks

    monkeypatch.setattr(compiling, "planned_step", watched)
    monkeypatch.setattr(compiling, "give_memory_back", lambda: found.append([one() for one in held]))
    mest.compile(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), SHAPE, threads=1)
    assert found == [[None, None]]

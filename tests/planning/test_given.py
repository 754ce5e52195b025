"""Zeros of the weights as masks: which layers are sparse then, and what is said of masks that a scheme cannot have."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mest_compile as mest
from mest_compile.base.errors import SparsityError, UnknownName, UsageError
from mest_compile.frontend import import_model
from mest_compile.ir.graph import LayerSpec
from mest_compile.options import StepOptions
from mest_compile.planning.given import first_masks, nearest
from mest_compile.planning.plan import plan_step
from mest_compile.sparsity import parse_scheme
from mest_compile.sparsity.scheme import SCHEMES

SHAPE = (2, 8, 6, 6)
NAMES = ("0.weight", "1.weight", "3.weight")
VARIANTS = [one for name in SCHEMES.names() if name != "dense" for one in SCHEMES.find(name).variants()]
SPEC = LayerSpec("1.weight", (16, 16, 3, 3), (2, 16, 6, 6), (1, 1), (1, 1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(), nn.Linear(576, 4)
    )


def masked(masks):
    model = net()
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name)[~torch.from_numpy(mask)] *= 0  # half of these zeros are -0.0
    return model


@cache
def graph():
    return import_model(net(), SHAPE)[0]


def given(masks, **options):
    state = {name: tensor.numpy() for name, tensor in masked(masks).state_dict().items()}
    return first_masks(
        None, graph(), state, StepOptions(**{"scheme": "unstructured", "sparsity": "as-given", **options})
    )


def random_mask(scheme, spec=SPEC, seed=0):
    rng = np.random.default_rng(seed)
    energy = scheme.energy(spec, rng.standard_normal(spec.weight_shape))
    return scheme.expand(spec, scheme.start(spec, energy, scheme.live_units(spec, scheme.fixed or 0.75), rng))


def drawn(*shape, live=0.3, seed=1):
    return np.random.default_rng(seed).random(shape) < live


def test_layers_with_zeros_are_sparse_at_what_they_have_and_the_others_dense():
    masks = {"0.weight": drawn(16, 8, 3, 3), "3.weight": drawn(4, 576, live=0.999)}
    assert 0 < (~masks["3.weight"]).sum() < 10  # a handful is a mask as well
    options, found = given(masks)
    assert found.keys() == masks.keys()  # the first convolution and the classifier too
    for name, mask in masks.items():
        np.testing.assert_array_equal(found[name].reshape(mask.shape), mask)
        assert options.sparsity[name] == 1 - mask.sum() / mask.size
    layers = plan_step(graph(), options).layers
    assert {name: str(layer.scheme) for name, layer in layers.items()} == dict.fromkeys(NAMES, "unstructured") | {
        "1.weight": "dense"
    }
    for name, mask in masks.items():
        assert layers[name].scheme.live_units(layers[name].spec, layers[name].sparsity) == mask.sum()


def test_dense_layers_stay_dense():
    masks = {"0.weight": drawn(16, 8, 3, 3), "3.weight": drawn(4, 576)}
    assert given(masks, dense_layers=["3"])[1].keys() == {"0.weight"}
    with pytest.raises(UnknownName, match="dense_layers names '4'"):
        given(masks, dense_layers=["4"])


@pytest.mark.parametrize("scheme", VARIANTS, ids=str)
def test_every_scheme_is_found_again_by_its_masks(scheme):
    mask = random_mask(scheme)
    found = parse_scheme(nearest([SPEC], {SPEC.name: mask}))
    assert scheme.fault(SPEC, mask) is None and found.fault(SPEC, mask) is None
    assert found.unit_cells(SPEC) * found.cell_elems(SPEC) >= scheme.unit_cells(SPEC) * scheme.cell_elems(SPEC)
    _, masks = given({"1.weight": mask}, scheme=scheme)
    np.testing.assert_array_equal(masks["1.weight"], mask)


@pytest.mark.parametrize(
    ("scheme", "mask", "message"),
    [
        ("block", drawn(16, 16, 3, 3), r"cuts 4\d\d of 576 in two; pass scheme='unstructured'$"),
        ("block", random_mask(parse_scheme("block:2x2")), "cuts .* in two; pass scheme='block:2x2'$"),
        ("block", random_mask(parse_scheme("1:4")), "cuts .* in two; pass scheme='1:4'$"),
        (
            "block",
            random_mask(parse_scheme("1:4")) & drawn(16, 16, 3, 3),
            "cuts .* in two; pass scheme='unstructured'$",
        ),
        ("2:4", drawn(16, 16, 3, 3), "has 46 of 576 groups of 4 input .*; pass scheme='unstructured'$"),
        ("filter", random_mask(parse_scheme("pattern")), "cuts 16 of 16 in two; pass scheme='pattern'$"),
        (
            "pattern",
            random_mask(parse_scheme("filter")),
            "64 of 256 kernels with none of the eight .*; pass scheme='filter'$",
        ),
        ("block:3x1", drawn(16, 16, 3, 3), "the layer has 16 and 16; pass scheme='unstructured'$"),
    ],
)
def test_a_mask_that_the_scheme_cannot_have_is_refused_with_one_that_can(scheme, mask, message):
    with pytest.raises(SparsityError, match=message) as caught:
        given({"1.weight": mask}, scheme=scheme)
    assert str(caught.value).startswith("1.weight: the mask given ") and "\n" not in str(caught.value)


def test_the_scheme_that_is_named_can_have_the_masks_of_all_layers():
    masks = {"0.weight": random_mask(parse_scheme("filter"), LayerSpec("0", (16, 8, 3, 3), (2, 8, 6, 6)))}
    with pytest.raises(SparsityError, match="pass scheme='filter'"):
        given(masks, scheme="channel")
    masks["3.weight"] = drawn(4, 576)
    with pytest.raises(SparsityError, match="pass scheme='unstructured'"):
        given(masks, scheme="channel")


def test_schemes_of_layers_hold_the_masks_of_layers():
    masks = {"1.weight": random_mask(parse_scheme("filter")), "3.weight": drawn(4, 576)}
    scheme = {"[01]": "filter", "*": "unstructured"}
    options, found = given(masks, scheme=scheme)
    assert found.keys() == masks.keys()
    assert {name: str(one) for name, one in options.scheme.items()} == {
        "1.weight": "filter",
        "3.weight": "unstructured",
    }
    assert {str(layer.scheme) for layer in plan_step(graph(), options).layers.values()} == {
        "dense",
        "filter",
        "unstructured",
    }
    with pytest.raises(SparsityError, match=r"pass scheme=\{'1.weight': 'filter'\}$"):
        given(masks, scheme={"1": "channel", "*": "unstructured"})
    assert given(masks, scheme={"1": "dense", "*": "unstructured"})[1].keys() == {"3.weight"}
    with pytest.raises(UsageError, match="3.weight is to be sparse, and no pattern of scheme matches it"):
        given(masks, scheme={"1": "filter"})


@pytest.mark.parametrize(
    ("masks", "options", "error", "message"),
    [
        ({}, {}, SparsityError, "but no weight of the model is 0; prune it first, or give sparsity a number"),
        (
            {"3.weight": drawn(4, 576)},
            {"dense_layers": ["3"]},
            SparsityError,
            "no weight of the model outside of dense",
        ),
        (
            {"3.weight": np.zeros((4, 576), bool)},
            {},
            SparsityError,
            "3.weight: all of its weights are 0, .* dense_layers",
        ),
        ({}, {"distribution": "erk"}, UsageError, "and distribution would have others"),
        ({}, {"lower_density": True, "memory_budget": 10**9}, UsageError, "and lower_density would have others"),
        ({}, {"scheme": "dense"}, UsageError, "and scheme dense would have others"),
        ({}, {"sparsity": "as given"}, SparsityError, "sparsity is 'as given'; wanted .*, or 'as-given'"),
    ],
)
def test_what_cannot_be_is_refused(masks, options, error, message):
    with pytest.raises(error, match=message) as caught:
        given(masks, **options)
    assert "\n" not in str(caught.value)


def test_who_has_no_weights_says_so():
    with pytest.raises(SparsityError, match="'as-given' is of weights, which are not looked at here"):
        plan_step(graph(), StepOptions(sparsity="as-given"))


def test_an_onnx_file_is_taken_by_its_zeros(tmp_path):
    pytest.importorskip("onnx")
    mask = drawn(16, 16, 3, 3)
    step = mest.compile(masked({"1.weight": mask}), SHAPE, scheme="unstructured", sparsity="as-given", threads=1)
    mest.to_onnx(step, tmp_path / "net.onnx")
    again = mest.compile(Path(tmp_path / "net.onnx"), SHAPE, scheme="unstructured", sparsity="as-given", threads=1)
    assert again.masks().keys() == {"1.weight"}
    np.testing.assert_array_equal(again.masks()["1.weight"], mask)

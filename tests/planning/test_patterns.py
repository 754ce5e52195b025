"""Schemes and sparsities by shell pattern: which counts where, and what is refused."""

import json

import numpy as np
import pytest

import mest_compile as mest
from mest_compile.base.errors import SparsityError, UnknownName, UsageError
from mest_compile.frontend import import_model
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.planning.plan import plan_step
from mest_compile.training.recipe import Recipe

SHAPE = (2, 3, 8, 8)


@pytest.fixture(scope="module")
def graph():
    return import_model(build_model("resnet20", SHAPE, 10, 8), SHAPE)[0]


@pytest.fixture(scope="module")
def planned(graph):
    def plan(**options):
        layers = plan_step(graph, StepOptions(**options)).layers
        return {
            name.removesuffix(".weight"): (str(layer.scheme), layer.sparsity)
            for name, layer in layers.items()
            if str(layer.scheme) != "dense"
        }

    return plan


def convolutions(*stages):
    return [f"layer{stage}.{block}.conv{place}" for stage in stages for block in range(3) for place in (1, 2)]


def test_the_first_pattern_that_matches_counts_and_a_name_beats_all(planned):
    scheme = {"layer1.*": "pattern", "*.conv2": "block", "*": "unstructured", "layer2.0.conv2": "filter"}
    found = planned(scheme=scheme, sparsity={"layer1.0.*": 0.6, "*.weight": 0.8, "layer3.2.conv2.weight": 0.7})
    assert list(found) == convolutions(1, 2, 3)  # patterns leave dense what is dense by default
    for name, (scheme, sparsity) in found.items():
        wanted = "pattern" if name.startswith("layer1") else "block:4x1" if name.endswith("2") else "unstructured"
        assert scheme == ("filter" if name == "layer2.0.conv2" else wanted)
        assert sparsity == (0.6 if name.startswith("layer1.0") else 0.7 if name == "layer3.2.conv2" else 0.8)


def test_one_sparsity_is_of_all_of_them_together_and_dense_is_a_scheme(planned):
    found = planned(scheme={"layer1.*": "dense", "*": "unstructured"}, sparsity=0.8)
    assert list(found) == convolutions(2, 3) and set(found.values()) == {("unstructured", 0.8)}
    found = planned(scheme={"*": "unstructured", "fc": "block:2x1"}, sparsity=0.8)
    assert found["fc"] == ("block:2x1", 0.8) and "conv1" not in found
    assert list(planned(scheme={"layer3.*": "unstructured", "*": "dense"}, distribution="erk")) == convolutions(3)


def test_without_a_sparsity_each_scheme_has_its_own(planned):
    found = planned(scheme={"layer1.*": "2:4", "*": "block"})
    assert {found[name] for name in convolutions(1)} == {("2:4", 0.5)}
    assert {found[name] for name in convolutions(2, 3)} == {("block:4x1", 0.9)}
    assert StepOptions(scheme={"a*": "block", "*": "pattern"}).sparsity == 0.9
    assert StepOptions(scheme={"*": "dense"}).sparsity == 0


def test_dense_layers_decide_which_patterns_leave_out(planned):
    assert "fc" in planned(sparsity={"*": 0.75}, scheme="unstructured", dense_layers=["conv1"])
    assert list(planned(sparsity={"layer1.*": 0.75}, scheme="unstructured")) == convolutions(1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": {"layer4.*": 0.9}}, UnknownName, r"sparsity: no layer matches 'layer4\.\*'; .*: .*layer\d\.\*"),
        ({"scheme": {"layer4.*": "block", "*": "dense"}}, UnknownName, "scheme: no layer matches"),
        ({"scheme": {"layer4": "block"}}, UnknownName, "scheme names 'layer4', which is no layer"),
        (
            {"sparsity": {"*": 0.9, "layer1.*": 0.8}},
            UsageError,
            r"sparsity: 'layer1\.\*' never counts, since '\*' takes",
        ),
        (
            {"sparsity": {"layer1.0.conv[1]": 0.9, "layer1.0.conv1": 0.8}},
            UsageError,
            r"'layer1\.0\.conv\[1\]' never counts, since 'layer1\.0\.conv1\.weight' takes",
        ),
        (
            {"sparsity": {"fc*": 0.9, "*": 0.8}},
            UsageError,
            r"sparsity: 'fc\*' matches fc.weight alone, which stays dense",
        ),
        ({"scheme": {"fc*": "block", "*": "block"}}, UsageError, r"scheme: 'fc\*' matches fc.weight alone"),
        (
            {"scheme": {"layer1.*": "block"}, "sparsity": 0.9},
            UsageError,
            "layer2.0.conv1.weight is to be sparse, and no pattern of scheme matches it; add one",
        ),
        (
            {"scheme": {"layer1.*": "2:4", "*": "block"}, "sparsity": 0.9},
            SparsityError,
            "layer1.0.conv1.weight: scheme 2:4 has",
        ),
        (
            {"scheme": {"layer1.*": "block:3x1", "*": "block"}},
            UsageError,
            "'layer1.*' matches .* alone, which stays dense",
        ),
        ({"scheme": {"fc": "pattern", "*": "block"}}, SparsityError, "fc.weight: scheme pattern is for 3x3 kernels"),
        (
            {"scheme": {"fc": "block", "*": "block"}, "dense_layers": ["fc"]},
            UsageError,
            "scheme names fc.weight, and so does dense_layers",
        ),
        (
            {"scheme": {"layer1.*": "dense", "*": "block"}, "sparsity": {"layer1.0.conv1": 0.5, "*": 0.9}},
            UsageError,
            "sparsity names layer1.0.conv1.weight, and so does scheme",
        ),
        ({"scheme": {}}, UsageError, "scheme is {}; wanted"),
        ({"scheme": {"*": "blok"}}, UnknownName, "no scheme 'blok'"),
        ({"scheme": {"*": 4}}, UsageError, "a scheme is a name or a mest.Scheme, not int"),
        ({"sparsity": {"*": 1.0}}, SparsityError, "conv1.weight: sparsity is 1.0; wanted"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(planned, options, error, message):
    with pytest.raises(error, match=message) as caught:
        planned(**{"scheme": "unstructured", **options})
    assert "\n" not in str(caught.value)


def test_options_with_tables_go_through_files():
    options = StepOptions(scheme={"a.*": "block:2x2", "*": mest.NM(1, 4)}, sparsity={"a.*": 0.9, "*": 0.75})
    assert StepOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
    assert options.scheme_text == "mixed" and options.sparse and options.dense().scheme_text == "dense"


def test_a_step_of_several_schemes_trains_and_mutates_in_proportion(builder):
    step = mest.compile(
        "mlp",
        (8, 1, 4, 4),
        scheme={"fc1": "unstructured", "fc[2-9]": "block:2x1"},
        sparsity={"fc1": 0.5, "*": 0.8},
        threads=1,
        builder=builder,
    )
    schemes = {"fc1.weight": "unstructured", "fc2.weight": "block:2x1", "fc3.weight": "dense"}
    assert step.describe()["schemes"] == schemes
    images = np.random.default_rng(0).standard_normal((8, 1, 4, 4)).astype(np.float32)
    assert step(images, np.arange(8)).loss > step(images, np.arange(8)).loss > step(images, np.arange(8)).loss
    elems = {name: mask.size for name, mask in step.masks().items()}
    overall = (0.5 * elems["fc1.weight"] + 0.8 * elems["fc2.weight"]) / sum(elems.values())
    sparser = overall + 0.25 * (1 - overall)
    step.mutate(sparser, sparser)
    assert step.sparsity() == pytest.approx({"fc1.weight": 0.625, "fc2.weight": 0.85}, abs=1e-3)
    assert not (step.masks()["fc2.weight"][::2] ^ step.masks()["fc2.weight"][1::2]).any()


@pytest.mark.parametrize(
    ("text", "sparsity"),
    [
        ("sparsity = 0.7", 0.7),
        ('sparsity = "as-given"', "as-given"),
        ('[run.sparsity]\n"layer1.*" = 0.8\n"*" = 0.9', {"layer1.*": 0.8, "*": 0.9}),
    ],
)
def test_recipes_have_tables(tmp_path, text, sparsity):
    path = tmp_path / "recipe.toml"
    path.write_text(f'epochs = 2\n[run]\n{text}\n[run.scheme]\n"layer1.*" = "pattern"\n"*" = "block"\n')
    said = Recipe.run_options(path)
    assert said == {"sparsity": sparsity, "scheme": {"layer1.*": "pattern", "*": "block"}}
    assert list(said["scheme"]) == ["layer1.*", "*"]
    path.write_text('epochs = 2\n[run]\nsparsity = "as given"\n')
    with pytest.raises(UsageError, match="run: sparsity must be a number, not 'as given'"):
        Recipe.run_options(path)

"""benchmarks/coverage.py: its list, what it says of a model, and the table that it writes."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import coverage
import numpy as np
import pytest
import torch
import torchbeside
from torch import nn

from mest_compile.base import exclusive

FAILED, TAKEN = {"taken": False, "failed": "TypeError: no"}, {"taken": True}
MODELS = {
    "timm:a": {"source": "timm", "family": "one", "refused": {"cat": 3, "softmax": 1}, "taken": False},
    "timm:b": {"source": "timm", "family": "one"} | TAKEN,
    "boards:c": {"source": "boards", "family": "two", "refused": {"cat": 1}, "taken": False},
    "boards:d": {"source": "boards", "family": "three"} | FAILED,
}


def test_there_are_160_models_of_five_sources():
    cases = coverage.cases()
    assert len(cases) == len({case.name for case in cases}) == 160
    assert len({case.source for case in cases}) == 5 and all(case.family for case in cases)


def test_what_is_missing_is_ranked_by_the_models_that_lack_it():
    assert coverage.missing(MODELS) == [("cat", 2, 1, 2), ("(TypeError)", 1, 1, 1), ("softmax", 1, 0, 1)]
    assert coverage.summary(MODELS).startswith("taken: 1 of 4 models, 1 of 3 families\n")


def test_the_table_says_of_each_source_what_is_taken():
    text = coverage.table(MODELS)
    assert "| timm | 1 of 2 | 1 of 1 | a: cat, softmax |" in text
    assert "| boards | 0 of 2 | 0 of 2 | c: cat; d: TypeError: no |" in text
    document = (Path(coverage.__file__).parents[1] / "docs" / "models.md").read_text()
    assert "<!-- coverage table: begin -->\n" in document and "<!-- coverage table: end -->" in document


class Sums(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


def case(*middle):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), *middle, nn.Linear(8, 3))
    return coverage.Case("own", "boards", "mlp", lambda: (net, (4, 6)))


def test_a_model_is_asked_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(exclusive, "_used", False)  # in the benchmark's own process nothing is compiled
    found = coverage.apart(coverage.examine, case(Sums()), 120)
    assert not found["taken"] and found["refused"] == {"cumsum": 1} and found["parameters"] == 83
    assert coverage.examine(case())["taken"]

    def crash(case):
        raise RuntimeError("no such model")

    assert coverage.apart(crash, case(), 60)["failed"] == "RuntimeError: no such model"


def test_three_steps_are_compared_with_torch(monkeypatch, tmp_path):
    """With the same elements dropped."""
    found = coverage.verify(case(), 5, tmp_path)
    assert found["verified"] and found["batch"] == 5 and found["errors"].keys() == {"gradients", "steps"}
    assert all(0 < ours < 1e-3 and 0 < theirs < 1e-3 for _, ours, theirs, _ in found["errors"].values())
    monkeypatch.setattr(torchbeside, "dropping", lambda net, graph, update: nullcontext())
    found = coverage.verify(case(), 5, tmp_path)
    assert not found["verified"] and found["noisy"] == torchbeside.NOISY


def test_a_number_at_a_jump_is_no_error_and_others_are(monkeypatch):
    """Of two gradients that a rounding decides between, ours is one and torch's float32 and float64 the other."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    near = 1 - 2**-24  # of which 1 is 2**-24 more
    start = {"0.weight": np.array([[1, -near], [0, 1]], np.float32), "2.weight": np.eye(2, dtype=np.float32)}
    images = np.array([[1, 1], *[[3, 1]] * 7], np.float32)
    batches = [((images,), np.zeros(8, np.int64))]
    monkeypatch.setattr(torchbeside, "ROUNDING", 2**-20)
    stepped = partial(torchbeside.torchs, net, start, {}, SimpleNamespace(nodes=[]), batches, False)
    exact, theirs = stepped(torch.float64), stepped(torch.float32)
    noisy = [stepped(torch.float32, noise=seed) for seed in range(8)]
    ours = next(one[0] for one in noisy if torchbeside.worst(one[0], theirs[0], exact[0])[1] > 0.01)
    name, mine, _, allowed = torchbeside.worst(ours, theirs[0], exact[0])
    assert name == "0.weight" and mine > allowed
    name, mine, worst, allowed = torchbeside.worst(ours, theirs[0], exact[0], [one[0] for one in noisy])
    assert mine <= allowed and worst > torchbeside.TOLERANCE


def test_noise_may_reach_farther_than_what_is_an_error_without_it():
    exact = {"near": np.ones(4), **{f"{place}": np.ones(4) for place in range(9)}}
    ours, noisy, worse = ({**exact, "near": np.full(4, 1 + size)} for size in (0.4, 0.25, 0.55))
    assert torchbeside.worst(ours, exact, exact)[1] > torchbeside.MOST
    for made, right in ((ours, True), (worse, False)):
        name, mine, torchs, allowed = torchbeside.worst(made, exact, exact, [noisy])
        assert (name, torchs, allowed) == ("near", 0.25, 0.5) and (mine <= allowed) == right


def test_a_tensor_that_is_wrong_is_found_among_others():
    exact = {"large": np.full(1000, 100.0), "small": np.array([0.1, -0.2]), "none": np.zeros(4)}
    theirs = {name: value + 1e-6 for name, value in exact.items()}
    name, ours, _, allowed = torchbeside.worst(theirs, theirs, exact)
    assert ours <= allowed
    name, ours, others, allowed = torchbeside.worst({**theirs, "small": exact["small"] * 1.01}, theirs, exact)
    assert (name, allowed) == ("small", torchbeside.TOLERANCE) and ours == pytest.approx(0.01) and others < 1e-4


def test_what_torch_itself_cannot_tell_from_0_is_no_error_of_ours():
    exact = {"large": np.full(1000, 100.0), "none": np.zeros(4)}
    noisy, noise = ({**exact, "none": np.full(4, size)} for size in (0.02, 0.03))
    name, ours, theirs, allowed = torchbeside.worst(noise, noisy, exact)
    assert name == "none" and theirs > torchbeside.MOST and ours <= allowed
    name, ours, theirs, allowed = torchbeside.worst(noise, exact, exact)
    assert name == "none" and ours > allowed


@pytest.mark.parametrize(("others", "right"), [(9, True), (8, False)])
def test_what_torch_has_no_digit_of_says_nothing_where_the_rest_does(others, right):
    exact = {"lost": np.ones(4), **{f"{place}": np.ones(4) for place in range(others)}}
    ours, theirs = ({**exact, "lost": np.full(4, size)} for size in (1.6, 1.5))
    name, mine, torchs, allowed = torchbeside.worst(ours, theirs, exact)
    assert name == "lost" and torchs == 0.5 and (mine <= allowed) == right
    name, mine, _, allowed = torchbeside.worst({**ours, "0": np.full(4, 1.01)}, theirs, exact)
    assert name == "0" and mine > allowed


def test_more_examples_are_tried_where_torch_itself_is_far_from_float64():
    def found(theirs, verified=False):
        return {"verified": verified, "errors": {"steps": ["a", 1.0, theirs, 0.3]}}

    assert coverage._asks_for_more(found(0.46)) and coverage._asks_for_more({"failed": coverage.ONE_VALUE})
    assert not coverage._asks_for_more(found(0.01)) and not coverage._asks_for_more(found(0.46, verified=True))


def test_the_document_says_what_was_compared():
    compared = {"timm:b": MODELS["timm:b"] | {"verified": True}, "boards:d": MODELS["boards:d"] | {"verified": False}}
    text = coverage.compared(MODELS | compared)
    assert text == "Trained beside torch: 2 of 3 families; 1 came out as torch's. Others: three. Not yet: two."


def test_packages_that_are_missing_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(coverage, "PACKAGES", tmp_path / "none")
    with pytest.raises(SystemExit, match=r"environments.sh coverage makes it"):
        coverage.packages()

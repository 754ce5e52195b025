"""What examples/flower exchanges between a server and its clients; Flower itself has an environment of its own."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).resolve().parents[2] / "examples" / "flower" / "exchange.py"
SPEC = importlib.util.spec_from_file_location("exchange", PATH)
exchange = importlib.util.module_from_spec(SPEC)
sys.modules["exchange"] = exchange  # as dataclasses want it
SPEC.loader.exec_module(exchange)

RNG = np.random.default_rng(0)
MASKS = {name: RNG.random(shape) < 0.1 for name, shape in (("b.weight", (64, 33)), ("a.weight", (8, 4, 3, 3)))}
STATE = {name: np.where(mask, RNG.normal(size=mask.shape), 0).astype(np.float32) for name, mask in MASKS.items()}
STATE |= {"a.bias": np.ones(8, np.float32), "count": np.array(3, np.int64)}
LAYOUT = exchange.Layout.of(STATE, MASKS)


def test_live_values_and_a_bitmap_come_back_as_they_were():
    values, bitmap = exchange.pack_values(LAYOUT, STATE, MASKS), exchange.pack_masks(LAYOUT, MASKS)
    live = sum(int(mask.sum()) for mask in MASKS.values())
    assert values.size == live + 8 and len(bitmap) == -(-(64 * 33 + 288) // 8)
    masks = exchange.unpack_masks(LAYOUT, bitmap)
    state = exchange.unpack_values(LAYOUT, values, masks)
    assert masks.keys() == MASKS.keys() and all(np.array_equal(masks[name], MASKS[name]) for name in MASKS)
    assert state.keys() == STATE.keys() - {"count"} and all(np.array_equal(state[name], STATE[name]) for name in state)
    assert LAYOUT.dense_bytes == 4 * (64 * 33 + 288 + 8)


def test_what_another_model_sent_is_refused():
    values, bitmap = exchange.pack_values(LAYOUT, STATE, MASKS), exchange.pack_masks(LAYOUT, MASKS)
    for wrong in (values[1:], values.reshape(1, -1)):
        with pytest.raises(ValueError, match=rf"wanted {values.size} finite values, got \({wrong.shape[0]},"):
            exchange.unpack_values(LAYOUT, wrong, MASKS)
    for number in (np.nan, np.inf):
        with pytest.raises(ValueError, match=f"1 of {values.size} are not; a lower rate"):
            exchange.unpack_values(LAYOUT, np.where(np.arange(values.size) == 3, number, values), MASKS)
    with pytest.raises(ValueError, match="bitmap"):
        exchange.unpack_masks(LAYOUT, bitmap[1:])
    with pytest.raises(ValueError, match="equally many"):
        exchange.average([values, values[1:]], [1, 1])


def test_the_mean_is_by_examples_and_of_equal_clients_is_what_each_has():
    values = exchange.pack_values(LAYOUT, STATE, MASKS)
    assert np.array_equal(exchange.average([values] * 3, [1, 5, 9]), values)
    assert exchange.average([np.zeros(1, np.float32), np.ones(1, np.float32)], [3, 1]) == pytest.approx(0.25)


def test_a_mutation_drops_the_smallest_and_keeps_the_count():
    state, masks = exchange.mutate(STATE, MASKS, 0.2, np.random.default_rng(1))
    for name, mask in MASKS.items():
        gone, new = mask & ~masks[name], masks[name] & ~mask
        assert gone.sum() == new.sum() == round(0.2 * mask.sum()) and not state[name][~masks[name]].any()
        assert np.abs(STATE[name][gone]).max() <= np.abs(STATE[name][mask & masks[name]]).min()
        assert not state[name][new].any()


def test_a_client_works_out_the_mask_that_the_server_has_and_says_where_it_cannot():
    values, bitmap, drawn_by = exchange.pack_values(LAYOUT, STATE, MASKS), exchange.pack_masks(LAYOUT, MASKS), (7, 3)
    state, masks = exchange.mutate(STATE, MASKS, 0.2, np.random.default_rng(drawn_by))
    wanted = exchange.digest(LAYOUT, masks)
    got, here = exchange.take(LAYOUT, values, bitmap, 0.2, drawn_by, wanted)
    assert all(np.array_equal(here[name], masks[name]) for name in masks) and wanted != exchange.digest(LAYOUT, MASKS)
    assert all(np.array_equal(got[name], state[name]) for name in got)
    assert (
        exchange.take(LAYOUT, values, bitmap, 0.0, drawn_by, exchange.digest(LAYOUT, MASKS))[1].keys() == MASKS.keys()
    )
    with pytest.raises(ValueError, match="not the server's"):
        exchange.take(LAYOUT, values, bitmap, 0.2, (7, 4), wanted)
    with pytest.raises(ValueError, match="bitmap of"):  # who has no mask of the round before
        exchange.take(LAYOUT, values, b"", 0.2, drawn_by, wanted)


def test_every_example_has_one_client_and_classes_are_not_alike():
    labels = np.repeat(np.arange(10), 100)
    parts = exchange.partitions(labels, 10, 0.3, seed=0)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000)) and min(map(len, parts)) > 0
    assert max(np.bincount(labels[part], minlength=10).max() / len(part) for part in parts) > 0.3


RESULTS = PATH.parents[2] / "benchmarks" / "results"
PAGE = PATH.with_name("README.md").read_text(encoding="utf-8")


def recorded(name, **wanted):
    """A fleet's recorded run, which all ten clients have come through."""
    run = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert {line["clients"] for line in run["rounds"]} == {10} and run["sparsity"] == 0.9
    assert run["command"].endswith(f"--out benchmarks/results/{name}.json") and run.items() >= wanted.items()
    return run


def end(run):
    return run["rounds"][-1]["accuracy"]


def test_the_page_quotes_ten_unlike_clients_on_fashion_mnist_beside_dense_ones():
    gaps = []
    for seed, suffix in enumerate(("", "-seed1", "-seed2")):
        same = {"model": "mlp", "width": 512, "data": "fashion-mnist", "alpha": 0.5, "epochs": 1, "seed": seed}
        sparse = recorded(f"fleet-fashion-mnist{suffix}", scheme="unstructured", lr=1.0, **same)
        dense = recorded(f"fleet-fashion-mnist-dense{suffix}", scheme="dense", lr=0.3, **same)
        assert len(sparse["rounds"]) == len(dense["rounds"]) == 12
        assert f"| {seed} | {end(sparse):.2%} | {end(dense):.2%} |" in PAGE
        gaps.append(100 * (end(sparse) - end(dense)))
        shares = f"{sparse['down_share']:.3f} of the bytes to a client and {sparse['up_share']:.3f} from it"
        assert shares in PAGE and max(sparse["down_share"], sparse["up_share"]) <= 0.14 < 1 <= dense["down_share"]
    assert f"by {min(gaps):+.2f} to {max(gaps):+.2f} points" in PAGE and min(gaps) > -0.5


def test_the_page_quotes_the_other_runs():
    for (name, model, width), dense in (
        (("fleet-digits", "mlp", 256), "fleet-digits-dense"),
        (("fleet-vgg11", "vgg11", 32), None),
    ):
        run = recorded(name, model=model, width=width, scheme="unstructured")
        beside = "not run to the end" if dense is None else f"{end(recorded(dense, model=model, scheme='dense')):.1%}"
        shares = f"{run['down_share']:.3f}, {run['up_share']:.3f}"
        assert f"`{model}` of width {width}, {len(run['rounds'])} rounds" in PAGE
        assert f"`--lr {run['lr']}`" in PAGE and f"| {end(run):.1%} | {beside} | {shares} |" in PAGE

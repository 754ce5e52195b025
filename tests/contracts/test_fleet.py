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
    for wrong in (values[1:], values.reshape(1, -1), np.where(np.arange(values.size) == 3, np.nan, values)):
        with pytest.raises(ValueError, match="finite values"):
            exchange.unpack_values(LAYOUT, wrong, MASKS)
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


def test_the_page_quotes_what_was_recorded():
    page, results = PATH.with_name("README.md").read_text(), PATH.parents[2] / "benchmarks" / "results"
    sparse, dense = (json.loads((results / f"fleet-digits{kind}.json").read_text()) for kind in ("", "-dense"))
    ends = (f"{run['rounds'][-1]['accuracy']:.1%}" for run in (sparse, dense))
    assert "{} of the test part at 90% sparsity, still rising, beside {} dense".format(*ends) in page
    shares = f"in {sparse['down_share']:.3f} of the bytes to a client and {sparse['up_share']:.3f} from it"
    assert shares in page and max(sparse["down_share"], sparse["up_share"]) <= 0.14 < 1 < dense["down_share"] < 1.001
    assert all(run["sparsity"] == 0.9 and run["clients"] == 10 and run["model"] == "mlp" for run in (sparse, dense))

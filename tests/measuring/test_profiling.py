"""A profile accounts for the whole step, names its parts, and leaves the state as it was."""

import numpy as np
import pytest

import mest_compile as mest
from mest_compile.measuring.case import Case
from mest_compile.measuring.profiling import LayerTime, profile
from mest_compile.models.catalog import build_model

CASE = Case("resnet20", (8, 3, 16, 16), width=8)


@pytest.fixture(scope="module")
def step():
    return mest.compile(
        build_model("resnet20", CASE.input_shape, 10, 8), CASE.input_shape, scheme="block:4x1", sparsity=0.75, threads=1
    )


def test_every_call_of_the_step_is_counted_and_the_shares_add_up(step):
    found = profile(step, *CASE.batch(), repeats=2)
    # All but what only a bound on the gradients needs.
    assert sum(row.calls for row in found.operators) == sum(call.stage != "clip" for call in step.program.calls)
    assert sum(row.share for row in found.operators) == pytest.approx(1)
    assert sum(row.seconds for row in found.operators) == pytest.approx(found.step_seconds)
    by_name = {(row.kernel, row.phase): row for row in found.operators}
    assert by_name["gather.conv", "forward"].calls == 22 and by_name["gather.conv", "grad_input"].calls == 21
    assert by_name["gather.grad", "grad_weight"].calls == 22 and by_name["values.turn", "backward"].calls == 21
    seconds = [row.seconds for row in found.operators]
    assert seconds == sorted(seconds, reverse=True)


def test_layers_count_live_weights_only(step):
    found = {row.layer: row for row in profile(step, *CASE.batch(), repeats=1).layers}
    masks = step.masks()
    layer = found["layer2.1.conv1.weight"]
    assert layer.live_weights == masks["layer2.1.conv1.weight"].sum() == 16 * 16 * 9 // 4
    assert layer.flop == 2 * layer.live_weights * 8 * 8 * 8  # 8 x 8 pixels, 8 examples
    assert set(layer.seconds) == {"forward", "grad_input", "grad_weight"}
    assert set(found["conv1.weight"].seconds) == {"forward", "grad_weight"}
    assert found["fc.weight"].live_weights == 10 * 32 and found["fc.weight"].output_size == (1, 1)


def test_rate_is_useful_operations_over_time():
    assert LayerTime("a", (1, 1, 1, 1), (1, 1), 5, 3_000_000, {"forward": 0.002}, {}).gflops(
        "forward"
    ) == pytest.approx(1.5)


def test_profiling_changes_neither_state_nor_what_comes_after(step, tmp_path):
    images, labels = CASE.batch()
    step(images, labels)  # momentum and statistics are not 0 any more
    step.save(tmp_path / "before")
    before = mest.load(tmp_path / "before")
    profile(step, images, labels, repeats=1)
    for name, array in before.state_dict().items():
        assert np.array_equal(step.state_dict()[name], array), name
    assert step(images, labels).loss == before(images, labels).loss
    for name, array in before.state_dict().items():  # momentum was kept, too
        assert np.array_equal(step.state_dict()[name], array), name


def test_the_command_prints_tables_and_json(mest_compile_command):
    options = ("bench", "--model", "resnet20", "--width", 8, "--batch", 8, "--profile", "--repeats", 1)
    document = mest_compile_command(*options, "--json").document
    assert {"step_seconds", "operators", "layers"} == set(document)
    assert document["layers"][0]["layer"] == "conv1.weight" and document["layers"][0]["gflops"]["forward"] > 0
    printed = mest_compile_command(*options).out
    assert "gather.conv" in printed and "layer3.2.conv2" in printed and "GFLOP/s" in printed

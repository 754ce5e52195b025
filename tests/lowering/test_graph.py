"""Fusing and the memory plan."""

import itertools

import numpy as np
import pytest

from mest_compile.frontend import import_model
from mest_compile.ir.arena import ALIGNED_BYTES, plan_memory
from mest_compile.ir.graph import ForwardGraph, LayerSpec, Node
from mest_compile.ir.program import Buffer, Call, Program
from mest_compile.lowering.fusing import fuse
from mest_compile.operators.layers.geometry import reaching_passes

SHAPE = (2, 4, 5, 5)


def norm(name, source):
    return Node("batch_norm", name, (source,), SHAPE, {"weight": f"{name}.weight"}, {"eps": 1e-5, "momentum": 0.1})


def fused(*nodes):
    return {node.name: node for node in fuse(ForwardGraph(nodes, SHAPE, {})).nodes}


def test_batch_norm_takes_in_the_addition_and_relu_behind_it():
    found = fused(
        norm("bn", "input"),
        norm("down", "input"),
        Node("add", "sum", ("bn", "down"), SHAPE),
        Node("relu", "out", ("sum",), SHAPE),
        Node("relu", "last", ("out",), SHAPE),
    )
    assert list(found) == ["bn", "down", "last"]
    assert found["down"].inputs == ("input", "bn") and found["down"].attrs["activation"] == "relu"
    assert found["bn"].attrs["activation"] is None and found["last"].inputs == ("down",)


def test_batch_norm_whose_value_is_used_elsewhere_stays_alone():
    found = fused(norm("bn", "input"), Node("relu", "a", ("bn",), SHAPE), Node("add", "sum", ("a", "bn"), SHAPE))
    assert list(found) == ["bn", "a", "sum"] and found["bn"].attrs["activation"] is None


def test_a_joined_node_stands_behind_everything_that_it_reads():
    found = fused(
        norm("bn", "input"), Node("relu", "side", ("input",), SHAPE), Node("add", "sum", ("bn", "side"), SHAPE)
    )
    assert list(found) == ["side", "bn"] and found["bn"].inputs == ("input", "side")


@pytest.mark.parametrize("whole", [False, True])
def test_no_two_buffers_that_live_together_overlap_and_memory_is_reused(whole):
    rng = np.random.default_rng(5)
    buffers = [Buffer(f"b{i}", int(rng.integers(1, 2000))) for i in range(60)]
    spans = [tuple(sorted(rng.integers(0, 80, 2))) for _ in buffers]
    calls = [
        Call(f"c{t}", "k", None, tuple(b for b, span in zip(buffers, spans) if t in span), "forward") for t in range(80)
    ]
    program = Program("p", calls)
    plan_memory(program, whole=whole)

    def ends(buffer):
        slot, start = program.places[buffer]
        return slot, start, start + buffer.size_bytes

    for (a, span_a), (b, span_b) in itertools.combinations(zip(buffers, spans), 2):
        (slot, start, stop), (other_slot, other_start, other_stop) = ends(a), ends(b)
        if slot == other_slot and start < other_stop and other_start < stop:
            assert span_a[1] < span_b[0] or span_b[1] < span_a[0], (a.name, b.name)
    for buffer in buffers:
        slot, start, stop = ends(buffer)
        assert stop <= program.slots[slot] and start % ALIGNED_BYTES == 0 and not (whole and start), buffer.name
    live = max(sum(b.size_bytes for b, (first, last) in zip(buffers, spans) if first <= t <= last) for t in range(80))
    assert program.arena_bytes < (1.6 if whole else 1.05) * live
    assert whole or len(program.slots) == 1


@pytest.mark.parametrize("whole", [False, True])
def test_a_second_program_runs_in_the_memory_of_the_first(whole):
    first, second = Buffer("a", 1000), Buffer("b", 900)
    program = Program("q", [Call("c", "k", None, (second,), "forward")])
    plan_memory(program, [first.size_bytes], whole)
    assert program.slots == [first.size_bytes] and program.places[second] == (0, 0)


def test_strided_1x1_convolutions_are_the_last_to_add_to_the_gradient_of_what_they_read():
    graph = fuse(import_model("resnet20", (4, 3, 32, 32))[0])
    names = [node.name for node in graph.nodes]
    for block in ("layer2.0", "layer3.0"):
        assert names.index(f"{block}.downsample.0") < names.index(f"{block}.conv1")
    place = {name: index for index, name in enumerate(names)}
    assert all(place.get(source, -1) < place[node.name] for node in graph.nodes for source in node.inputs)


def test_a_gradient_that_is_added_leaves_out_pixels_that_no_tap_reaches():
    spec = LayerSpec("ds", (8, 4, 1, 1), (2, 4, 6, 6), (2, 2))
    assert [grid_pass.grid for grid_pass in reaching_passes(spec)] == [(3, 3), (0, 0), (0, 0), (0, 0)]

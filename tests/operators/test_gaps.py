"""Channels that would lie a power of two apart do not."""

import pytest

from mest_compile.frontend import import_model
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.planning.plan import plan_step


@pytest.mark.parametrize(("target", "activations"), [("avx2", "float32"), ("avx2", "float16"), ("opencl", "float32")])
def test_no_map_of_a_bottleneck_has_its_channels_in_one_set_of_a_cache(target, activations):
    shape = (8, 3, 32, 32)
    graph, _ = import_model(build_model("resnet50", shape, width=8), shape)
    plan = plan_step(graph, StepOptions(target=target, activations=activations))
    images = {buffer.image for call in plan.train.calls for buffer in call.buffers if buffer.image}
    maps = [image for image in images if image.height * image.width > 1]
    together = [image for image in maps if image.channel_elems * image.item_bytes % 1024 == 0]
    assert maps
    assert bool(together) == (target == "opencl")

"""Frozen parts of every kind on an OpenCL device: ten steps equal torch."""

import pytest
from test_frozen import check, compiled, every_kind, made

pytest.importorskip("pyopencl", reason="pyopencl is not installed")


@pytest.mark.parametrize("scheme", ["block:1x4", "pattern", "filter", "channel"])
def test_ten_steps_train_what_torch_trains(scheme):
    model = made(every_kind)
    check(compiled(model, scheme, target="opencl"), model, made(every_kind))

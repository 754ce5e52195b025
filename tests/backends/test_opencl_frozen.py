"""Frozen parts of every kind on an OpenCL device: ten steps equal torch; what freezes later does so as on the CPU."""

import numpy as np
import pytest
from test_freezing import FRONT, run
from test_frozen import BATCHES, check, compiled, every_kind, made

pytest.importorskip("pyopencl", reason="pyopencl is not installed")


@pytest.mark.parametrize("scheme", ["block:1x4", "pattern", "filter", "channel"])
def test_ten_steps_train_what_torch_trains(scheme):
    model = made(every_kind)
    check(compiled(model, scheme, target="opencl"), model, made(every_kind))


def test_a_step_freezes_as_on_the_cpu():
    losses = []
    for where in {"target": "opencl"}, {}:
        step = compiled(made(lambda model: None), "block:1x4", **where)
        losses.append(run(step, BATCHES[:2]))
        need = step.memory()["total"]
        step.freeze([*FRONT, "conv3.*", "bn3.*"])
        losses[-1] += run(step, BATCHES[2:5])
        assert step.memory()["total"] < need
    np.testing.assert_allclose(*losses, rtol=1e-5)

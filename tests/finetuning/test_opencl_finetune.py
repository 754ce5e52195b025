"""A fine-tuning on an OpenCL device is that of the processor."""

import numpy as np
from tiny import INPUTS, pictures, tiny

import mest_compile as mest


def test_it_gives_the_same_net(tmp_path, builder):
    found = [
        mest.finetune(
            tiny(),
            pictures(24),
            test=pictures(12, seed=1),
            out=tmp_path / target,
            inputs=INPUTS,
            batch=8,
            epochs=1,
            threads=1,
            scheme="dense",
            trainable="last:1",
            target=target,
            builder=builder,
        )
        for target in ("opencl", "local")
    ]
    ours, theirs = (one.step.state_dict() for one in found)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.allclose(value, theirs[name], atol=2e-3), name  # Adam's steps of small gradients are not small

"""The random layers of test_fuzz.py on OpenCL: every scheme, odd sizes, strides, padding and batches, against torch in
float64."""

import pytest
from test_fuzz import SCHEMES, check_random_layer

pytest.importorskip("pyopencl", reason="pyopencl is not installed")
SEEDS = range(27, 27 + len(SCHEMES))  # other layers than the CPU's; each scheme once


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_layer_computes_what_torch_computes_in_float64(seed):
    check_random_layer(seed, "opencl")

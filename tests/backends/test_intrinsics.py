"""exp, tanh and erf of kernels for this CPU, by the digit."""

import math
import threading
import time

import numpy as np
import pytest

from mest_compile.backends.cpu import intrinsics
from mest_compile.backends.cpu.code import compile_cpu
from mest_compile.hardware.target import find_target
from mest_compile.kernels.linkers import link_here
from mest_compile.kernels.loading import load_library
from mest_compile.kernels.source import object_code

COUNT, LANES = 1 << 16, 8
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -100.0, -87.5, 88.7, 89.0, 0.921875, -0.921875, 3.95, 1e-40]
# name -> (float64, largest error in units of the last place)
WANTED = {"exp": (np.exp, 1.0), "tanh": (np.tanh, 2.6), "erf": (np.vectorize(math.erf, [np.float64]), 1.2)}


def kernel(name, lanes):
    loop = f"for i in T.vectorized({lanes})" if lanes > 1 else "for i in T.serial(1)"
    return (
        f'@T.prim_func\ndef kernel(x: T.Buffer(({COUNT},), "float32"), y: T.Buffer(({COUNT},), "float32")):\n'
        f"    for t in T.serial({COUNT // lanes}):\n        {loop}:\n"
        f"            y[t * {lanes} + i] = T.{name}(x[t * {lanes} + i])\n"
    )


@pytest.mark.parametrize("lanes", [1, LANES])
@pytest.mark.parametrize("name", WANTED)
def test_numbers_are_right_to_a_few_units_in_the_last_place(name, lanes):
    import tvm

    rng, target = np.random.default_rng(0), find_target("local")
    near, anywhere = rng.standard_normal(COUNT // 2) * 4, rng.integers(0, 2**32, COUNT // 2, np.uint32).view(np.float32)
    x = np.concatenate([near, anywhere]).astype(np.float32)
    x[: len(SPECIAL)] = SPECIAL
    library = load_library(link_here(object_code(compile_cpu(kernel(name, lanes), "kernel", target)), target))
    held = tvm.runtime.tensor(np.zeros(COUNT, np.float32))
    library["kernel"](tvm.runtime.tensor(x), held)
    got, (compute, most) = held.numpy(), WANTED[name]
    with np.errstate(all="ignore"):
        wanted = compute(x.astype(np.float64))
        single = wanted.astype(np.float32)
        assert np.array_equal(np.isnan(got), np.isnan(x)) and np.array_equal(np.isinf(got), np.isinf(single))
        told = np.isfinite(single)
        unit = np.spacing(np.maximum(abs(single[told]), np.float32(1e-45))).astype(np.float64)
    assert (abs(got[told] - wanted[told]) / unit).max() <= most


def test_threads_teach_one_after_another(monkeypatch):
    """TVM takes an operator's attribute once."""
    inside, met = [], []

    def teach():
        inside.append(1)
        time.sleep(0.02)
        met.append(len(inside))
        inside.pop()

    monkeypatch.setattr(intrinsics, "_teach", teach)
    threads = [threading.Thread(target=intrinsics.teach_tvm) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert met == [1, 1, 1]

"""Kernels that compute an activation once more and leave its slope where its input was."""

import numpy as np
import pytest
from test_operators import FEW, SHAPES, assert_close, draw, other_halo, pack, rng, run, unpack  # noqa: F401

from mest_compile.operators.activation import (
    ACTIVATIONS,
    ActivationBackward,
    ActivationForward,
    ActivationSloped,
    FormulaBackward,
    FormulaForward,
    FormulaSloped,
    SlopeTimes,
    activation_of,
)

WHOLE = [shape for shape in SHAPES if shape.dtype == "float32"]
NAMES = [name for name, row in ACTIVATIONS.load().items() if not row.from_result]
KINDS = ActivationForward, ActivationBackward, ActivationSloped
FORMULA_TEXT = "x * tanh(x + x)"


@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_value_and_slope_of_gelu_are_those_of_the_reference(run, rng, shape):  # noqa: F811
    x, row, other = 4 * draw(rng, shape), activation_of("gelu"), other_halo(shape)
    slope, y = run("gelu.sloped", ActivationSloped(shape, other), pack(shape, x, -1), pack(other, x))
    assert_close(unpack(other, y), row.forward_reference(x))
    assert_close(unpack(shape, slope), row.slope.evaluate(x=x))


@pytest.mark.parametrize("name", [*NAMES, FORMULA_TEXT])
def test_value_and_slope_are_to_the_bit_those_of_the_kernels_for_one(run, rng, name):  # noqa: F811
    """Which the reference is asked about: the gradient is the slope where that of the result is 1."""
    shape = FEW[0]
    op, told = ("formula", {"formula": name}) if name == FORMULA_TEXT else (name, {})
    forward, backward, sloped = (FormulaForward, FormulaBackward, FormulaSloped) if told else KINDS
    x, ones = pack(shape, 4 * draw(rng, shape), -1), pack(shape, np.ones((2, 9, 8, 12)), 0)
    slope, y = run(f"{op}.sloped", sloped(shape, shape, **told), x, x)
    np.testing.assert_array_equal(y, run(f"{op}.forward", forward(shape, shape, **told), x, x)[1])
    wanted = run(f"{op}.backward", backward(shape, shape, shape, **told), ones, x, ones)[2]
    np.testing.assert_array_equal(unpack(shape, slope), unpack(shape, wanted))


@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_a_gradient_times_a_slope_is_exact_in_place_and_elsewhere(run, rng, shape):  # noqa: F811
    dy, slope, other = draw(rng, shape), draw(rng, shape), other_halo(shape)
    arrays = pack(shape, dy, 0), pack(other, slope, 0)
    assert_close(unpack(shape, run("slope.times", SlopeTimes(shape, other), *arrays)[0], True), dy * slope, terms=0)
    dx = run("slope.times", SlopeTimes(shape, other, other), *arrays, pack(other, dy, 0))[2]
    assert_close(unpack(other, dx, True), dy * slope, terms=0)

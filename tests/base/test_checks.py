"""What counts as a number, a list of names, a flag: whatever comes, the answer is a value or one line."""

import math

import numpy as np
import pytest
import torch

from mest_compile.base import checks
from mest_compile.base.errors import InputError, UsageError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.int16(3)])
def test_a_whole_number_of_any_kind_becomes_an_int(value):
    found = checks.whole("threads", value, 1)
    assert found == 3 and type(found) is int


@pytest.mark.parametrize(
    "value", [True, np.True_, 3.0, np.float32(3), -1, "3", None, [3], np.array([3, 4]), torch.tensor(3)]
)
def test_what_is_no_whole_number_is_one_line(value):
    with pytest.raises(UsageError, match="^seed is .*; wanted a whole number of 0 or more$") as caught:
        checks.whole("seed", value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5)])
def test_a_number_of_any_kind_becomes_a_float(value):
    found = checks.number("share", value, below=1)
    assert found == 0.5 and type(found) is float


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        np.float32("nan"),
        1e39,
        10**400,
        -0.1,
        1j,
        True,
        "a",
        None,
        [],
        np.zeros((3, 3)),
        torch.zeros(1),
    ],
)
def test_what_is_no_number_of_0_or_more_is_one_line(value):
    with pytest.raises(InputError, match="^lr is .*; wanted a finite number of 0 or more, or None$") as caught:
        checks.number("lr", value, also=", or None", error=InputError)
    assert "\n" not in str(caught.value)


def test_bounds_are_said_and_kept():
    with pytest.raises(UsageError, match="share is 1; wanted a finite number of 0 or more and below 1$"):
        checks.number("share", 1, below=1)
    with pytest.raises(UsageError, match="x is 2; wanted a finite number below 2$"):
        checks.number("x", 2, -math.inf, 2)
    assert checks.number("x", -5, -math.inf) == -5.0


@pytest.mark.parametrize("value", [5, "conv1", b"conv1", None, [1], {"conv1": 0.5}])
def test_names_are_a_list_of_strings(value):
    with pytest.raises(UsageError, match="dense_layers is .*; wanted a list of names"):
        checks.names("dense_layers", value)
    assert checks.names("dense_layers", ("a", "b")) == ["a", "b"]


@pytest.mark.parametrize("value", [0, 1, None, "yes"])
def test_a_flag_is_true_or_false(value):
    with pytest.raises(UsageError, match="wanted True or False"):
        checks.flag("lower_density", value)
    assert checks.flag("lower_density", True) is True


def test_a_long_value_is_cut_and_its_type_is_told():
    assert checks.shown(np.arange(1000.0)).endswith("... (ndarray)") and len(checks.shown("x" * 10**6)) < 120

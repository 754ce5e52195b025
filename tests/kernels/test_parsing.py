"""Kernel text is read as TVM itself reads it."""

import json
from pathlib import Path

import numpy as np
import pytest
import reading

from mest_compile.backends.cpu.intrinsics import teach_tvm
from mest_compile.kernels.reader import parse
from mest_compile.kernels.source import SCHEDULES, kernel_source


def problems(device):
    """Those that every kernel of a kind of device is tried with: (where they are from, [(kernel, problem)]). All with
    images stored in the first type, one of each kernel in the others: TVM takes 0.1 s a kernel."""
    if device == "cpu":
        import test_nonfinite as given
    else:
        from test_opencl_kernels import _nonfinite as given
    with np.errstate(all="ignore"):
        return given, [
            (kernel, problem)
            for kernel in given.KERNELS
            for turn, dtype in enumerate(given.DTYPES)
            for place, (problem, *_) in enumerate(given.CASES[kernel](kernel, np.random.default_rng(11), dtype))
            if place == 0 or turn == 0
        ]


@pytest.mark.parametrize("device", ["cpu", pytest.param("opencl", marks=pytest.mark.opencl)])
def test_every_kernel_is_the_function_that_tvm_reads(device):
    import tvm
    import tvm_ffi
    from tvm.script import tirx

    teach_tvm()
    (given, found), read = problems(device), set()
    for source in {each.key: each for each in (kernel_source(*one, given.TARGET) for one in found)}.values():
        theirs = tvm.script.from_source(source.text, extra_vars={"T": tirx}).with_attr("global_symbol", "kernel")
        assert tvm_ffi.structural_equal(parse(source.text, "kernel"), theirs), source.text
        read.add(f"{device}/{source.kernel}")
    assert {schedule for schedule in SCHEDULES if schedule.startswith(f"{device}/")} == read


def test_the_architecture_page_quotes_the_recorded_times_and_they_are_measured_so():
    recorded = json.loads(reading.RESULT.read_text())["kernels"]
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    assert len(recorded) == 3 and all(reading.row(name, found) in page for name, found in recorded.items())
    given, found = problems("cpu")
    again = reading.measure([kernel_source(*found[0], given.TARGET)] * 2, turns=1)
    assert again.keys() == next(iter(recorded.values())).keys() and again["kernels"] == 1
    assert 0 < again["reader_share"] < 1 and 0 < again["tvm_share"] < 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("while True: y[0] = x[0]", "SyntaxError: line 4: a kernel has no While"),
        ("y[0] = z[0]", "NameError: line 4: nothing has the name z"),
        ("z = y[0] + x[0]", "SyntaxError: line 4: a name of a value is written `name: T.let = value`"),
    ],
)
def test_what_is_not_of_a_kernel_is_refused_with_its_line(line, said):
    text = (
        "@T.prim_func\ndef kernel(x: T.Buffer((4,), 'float32'), y: T.Buffer((4,), 'float32')):\n    "
        "T.func_attr({})\n    "
    )
    with pytest.raises((SyntaxError, NameError)) as error:
        parse(text + line, "kernel")
    assert f"{error.type.__name__}: {error.value}" == said

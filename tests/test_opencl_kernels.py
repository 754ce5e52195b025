"""Every operator's OpenCL kernels against float64, on whatever driver there is: the CPU tests' claims, made for the target opencl."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from mest_compile import hardware
from mest_compile.building import Builder, kernel_source
from mest_compile.graph.program import Buffer, Call, Program

pytest.importorskip("pyopencl", reason="pyopencl is not installed")

TARGET = hardware.find_target("opencl")
CPU_ONLY = {"test_answers_do_not_depend_on_threads", "test_sections_fit_the_first_level_cache",  # its threads and caches,
            "test_activations_in_float16",  # what it stores them in,
            "test_units_of_neighbouring_taps"}  # and the family "pattern", in whose place layers here run on "pattern_groups"


def on_opencl(name, **imported):
    """The test module of that name, once more, with the target opencl in the place of the local one, and `imported` for other tests'."""
    spec = importlib.util.spec_from_file_location(f"{name}_opencl", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    usual = hardware.find_target
    hardware.find_target = lambda target: TARGET
    others = {each: sys.modules.get(each) for each in imported}
    sys.modules.update(imported)
    try:
        spec.loader.exec_module(module)
    finally:
        hardware.find_target = usual
        for each, module_there in others.items():
            if module_there is None:
                del sys.modules[each]
            else:
                sys.modules[each] = module_there
    return module


def launch(builder, kernel, problem, *arrays, **knobs):
    """Runs a kernel on flat copies of the arrays; returns them as they are afterwards."""
    from mest_compile.runtime.opencl import OpenclRunner, find_device

    flat = [np.ascontiguousarray(array).reshape(-1) for array in arrays]
    buffers = tuple(Buffer(f"argument {place}", array.size, str(array.dtype), "values") for place, array in enumerate(flat))
    call = Call("call", kernel, problem, buffers, "forward")
    program = Program("train", [call])
    built = builder.function(kernel_source(kernel, problem, TARGET, **knobs))
    runner = OpenclRunner({"train": {"call": built}}, {"train": (program, ("forward",))}, find_device())
    for buffer, array in zip(buffers, flat, strict=True):
        runner.put(buffer.name, array)
    runner.run("train")
    return [runner.get(buffer.name) for buffer in buffers]


_operators, _gather = on_opencl("test_operators"), on_opencl("test_gather")


def shaped_launch(builder, kernel, problem, *arrays, **knobs):
    got = launch(builder, kernel, problem, *arrays, **knobs)
    return [each.reshape(array.shape) for each, array in zip(got, arrays, strict=True)]


_gather.call = shaped_launch
_compact = on_opencl("test_compact", test_gather=_gather)


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return Builder(folder=tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def run(builder):
    return lambda kernel, problem, *arrays: launch(builder, kernel, problem, *arrays)


for _module in (_operators, _gather, _compact):
    globals().update({name: item for name, item in vars(_module).items() if name.startswith("test_") and name not in CPU_ONLY})


KNOBS = [{"staged": 0, "accumulators": 4}, {"staged": 32, "threads": 32, "accumulators": 16}, {"pieces": 2, "staged": 128}]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("seed", [1, 6, 14])  # with statistics, of several rows, of several source channels
def test_knobs_change_speed_alone(builder, seed, knobs):
    conv, grad, index = _gather.random_problem(seed)
    _gather.check_conv(builder, conv, index, np.random.default_rng(seed), **knobs)
    others = {name: value for name, value in knobs.items() if name in ("accumulators", "threads")}
    _gather.check_grad(builder, grad, index, np.random.default_rng(seed), splits=3, **others)


def test_a_device_whose_compiler_refuses_everything_is_passed_over(monkeypatch):
    import pyopencl

    from mest_compile.errors import NotInstalled
    from mest_compile.runtime import opencl

    said = "error: unknown target CPU 'generic'"
    usual, refusing = opencl.find_device(), []

    def refusal(device):
        refusing.append(device)
        return said

    monkeypatch.setattr(opencl, "_refusal", refusal)
    with pytest.raises(NotInstalled, match=f"compiles nothing: {said}.*apt install pocl-opencl-icd"):
        opencl.find_device()
    assert usual in refusing
    monkeypatch.setattr(opencl, "_refusal", lambda device: None if device == refusing[-1] else said)
    assert opencl.find_device() == refusing[-1]
    monkeypatch.setattr(pyopencl, "get_platforms", list)
    with pytest.raises(NotInstalled, match="no OpenCL driver found"):
        opencl.find_device()

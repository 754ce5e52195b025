"""Every operator's OpenCL kernels against float64, on whatever driver there is: the CPU tests' claims, made for the
target opencl."""

import importlib.util
import inspect
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from mest_compile.hardware import target as hardware
from mest_compile.ir.program import Buffer, Call, Program
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import kernel_source

pytest.importorskip("pyopencl", reason="pyopencl is not installed")

TARGET = hardware.find_target("opencl")
CPU_ONLY = {
    "test_answers_do_not_depend_on_threads",
    "test_sections_fit_the_first_level_cache",  # its threads and caches,
    "test_activations_in_float16",  # what it stores them in,
    "test_nobody_writes_between_channels",  # the gaps between their channels,
    "test_weight_gradients_of_small_images_without_a_halo_keep_no_sums",
    "test_units_of_neighbouring_taps",
    "test_tiles_change_speed_alone",
}  # and the family "pattern", in whose place layers here run on "pattern_groups"


def on_opencl(name, **imported):
    """The test module of that name, once more, with the target opencl in the place of the local one, and `imported` for
    other tests'."""
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


LAST = {}  # the runner of the last kernel that ran: a driver takes as long for one that it knows as for a small new one


def launch(builder, kernel, problem, *arrays, **knobs):
    """Runs a kernel on flat copies of the arrays; returns them as they are afterwards."""
    from mest_compile.backends.opencl.runner import OpenclRunner, find_device

    flat = [np.ascontiguousarray(array).reshape(-1) for array in arrays]
    buffers = tuple(
        Buffer(f"argument {place}", array.size, str(array.dtype), "values") for place, array in enumerate(flat)
    )
    source = kernel_source(kernel, problem, TARGET, **knobs)
    known = source.key, tuple((array.size, array.dtype) for array in flat)
    if known not in LAST:
        program = Program("train", [Call("call", kernel, problem, buffers, "forward")])
        runner = OpenclRunner(
            {"train": {"call": builder.function(source)}}, {"train": (program, ("forward",))}, find_device()
        )
        LAST.clear()
        LAST[known] = runner
    runner = LAST[known]
    for buffer, array in zip(buffers, flat, strict=True):
        runner.put(buffer.name, array)
    runner.run("train")
    return [runner.get(buffer.name) for buffer in buffers]


_operators, _gather = on_opencl("test_operators"), on_opencl("test_gather")


def shaped_launch(builder, kernel, problem, *arrays, **knobs):
    got = launch(builder, kernel, problem, *arrays, **knobs)
    return [each.reshape(array.shape) for each, array in zip(got, arrays, strict=True)]


_gather.call = shaped_launch
_compact, _depthwise = (on_opencl(name, test_gather=_gather) for name in ("test_compact", "test_depthwise"))
_nonfinite = on_opencl(
    "test_nonfinite",
    test_gather=_gather,
    test_compact=_compact,
    test_depthwise=_depthwise,
    test_operators=_operators,
)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def run(builder):
    return lambda kernel, problem, *arrays: launch(builder, kernel, problem, *arrays)


for _module in (
    _operators,
    _gather,
    _compact,
    _depthwise,
    _nonfinite,
):  # references and comparators are no device's: what runs no kernel is said there
    globals().update(
        {
            name: item
            for name, item in vars(_module).items()
            if name.startswith("test_")
            and name not in CPU_ONLY
            and {"run", "builder", "usual_builder"} & inspect.signature(item).parameters.keys()
        }
    )


KNOBS = [
    {"staged": 0, "accumulators": 4},
    {"staged": 32, "threads": 32, "accumulators": 16},
    {"pieces": 2, "staged": 128},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("seed", [1, 6, 14])  # with statistics, of several rows, of several source channels
def test_knobs_change_speed_alone(builder, seed, knobs):
    conv, grad, index = _gather.random_problem(seed)
    _gather.check_conv(builder, conv, index, np.random.default_rng(seed), **knobs)
    others = {name: value for name, value in knobs.items() if name in ("accumulators", "threads")}
    _gather.check_grad(builder, grad, index, np.random.default_rng(seed), splits=3, **others)


def test_a_device_whose_compiler_refuses_everything_is_passed_over(monkeypatch):
    import pyopencl

    from mest_compile.backends.opencl import runner as opencl
    from mest_compile.base.errors import NotInstalled

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


class Listed:
    """A device or a platform of pyopencl's, by what of it is asked for."""

    def __init__(self, **facts):
        vars(self).update(facts)


def test_a_device_is_chosen_by_a_part_of_its_name_or_its_platforms(monkeypatch):
    import pyopencl

    from mest_compile.backends.opencl import runner as opencl
    from mest_compile.base.errors import NotInstalled

    def platform(name, *devices):
        made = Listed(name=name, version=f"OpenCL 3.0 {name}")
        made.get_devices = lambda: [Listed(name=device, type=kind, platform=made) for device, kind in devices]
        return made

    kinds = pyopencl.device_type
    platforms = [
        platform("Portable", ("cpu-epyc", kinds.CPU)),
        platform("Clover"),
        platform("Arm", ("Mali-G78", kinds.GPU)),
    ]
    monkeypatch.setattr(pyopencl, "get_platforms", lambda: platforms)
    monkeypatch.setattr(opencl, "_refusal", lambda device: None)
    found = {name: opencl.find_device(name).name for name in (None, "epyc", "portable", "MALI")}
    assert found == {None: "Mali-G78", "epyc": "cpu-epyc", "portable": "cpu-epyc", "MALI": "Mali-G78"}
    with pytest.raises(
        NotInstalled, match="platform Clover has no device; Mali-G78 .* is not named 'adreno'; .*give gpu.name"
    ):
        opencl.find_device("adreno")
    monkeypatch.setattr(pyopencl, "get_platforms", lambda: platforms[1:2])
    with pytest.raises(NotInstalled, match="^platform Clover has no device; install your GPU's driver"):
        opencl.find_device()


def test_a_target_file_names_its_device_and_a_wrong_name_is_told_before_anything_is_compiled(tmp_path):
    import mest_compile as mest
    from mest_compile.backends.opencl import runner as opencl

    text = (resources.files("mest_compile.targets") / "opencl.toml").read_text()
    for name, file in (("no such gpu", "other.toml"), (opencl.find_device().platform.name, "this.toml")):
        (tmp_path / file).write_text(f'{text}name = "{name}"\n')
    with pytest.raises(mest.MestError, match="is not named 'no such gpu'"):
        mest.compile("mlp", (4, 64), target=tmp_path / "other.toml", builder=Builder(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
    step = mest.compile("mlp", (4, 64), target=tmp_path / "this.toml")
    assert np.isfinite(step(np.ones((4, 64), np.float32), np.arange(4)).loss)
    (tmp_path / "bad.toml").write_text(f'{text}name = " "\n')
    with pytest.raises(mest.MestError, match="gpu.name is ' '; wanted a part of the device's name"):
        hardware.find_target(tmp_path / "bad.toml")

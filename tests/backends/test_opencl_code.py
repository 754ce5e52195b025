"""What the code of a step's OpenCL kernels may not have: float64, atomics, private arrays that a compiler cannot keep
in registers."""

import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from mest_compile.backends.opencl.code import OpenclKernel, compile_opencl, compile_opencl_library
from mest_compile.base.errors import BuildError
from mest_compile.frontend import import_model
from mest_compile.hardware import target as hardware
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import kernel_source
from mest_compile.models.catalog import build_model
from mest_compile.operators.activation import ACTIVATIONS
from mest_compile.operators.losses.cross_entropy import CrossEntropy, SoftmaxCrossEntropy
from mest_compile.options import StepOptions
from mest_compile.planning.plan import plan_step
from mest_compile.schedules.opencl.text import number, rectified, spelled

CLANG = next(filter(None, map(shutil.which, ("clang", *(f"clang-{version}" for version in range(21, 13, -1))))), None)
SHAPE = (8, 3, 16, 16)
PRIVATE = re.compile(r"^  (?!__local)\w+ (\w+)\[\d+\];", re.MULTILINE)
FORBIDDEN = {
    "an image": r"\bimage2d\w*|\bread_image\w*",
    "float64": r"\bdouble\b|convert_double",
    "an atomic": r"\batom(ic)?_\w+",
}


def kernels_of_a_step(target: str, scheme: str, folder) -> dict[str, OpenclKernel]:
    """{kernel name and number: OpenclKernel} of training and prediction of a small ResNet."""
    there = hardware.find_target(target)
    graph, _ = import_model(build_model("resnet20", SHAPE, 10, 8), SHAPE)
    programs = plan_step(graph, StepOptions(scheme, 0.8, target=there)).programs
    kinds = sorted({(call.kernel, call.problem) for program in programs for call in program.calls}, key=repr)
    sources = [kernel_source(*kind, there) for kind in kinds]
    built = Builder(folder).build(sources)
    return {f"{source.kernel} {number}": built[source.key] for number, source in enumerate(sources)}


def faults(source: str) -> list[str]:
    """What stands in OpenCL C that must not."""
    found = [f"{what}: {match}" for what, pattern in FORBIDDEN.items() for match in re.findall(f"({pattern})", source)]
    for name in set(PRIVATE.findall(source)):
        found += [
            f"private {name} at [{index}]" for index in re.findall(rf"\b{name}\[(.*?)\]", source) if not index.isdigit()
        ]
        found += [f"address of private {name}"] * len(re.findall(rf"\b{name}\b(?!\[)", source))
    return found


def kept_in_memory(source: str) -> list[str]:
    """Private arrays that an optimising compiler leaves in memory: "alloca" in LLVM's code for an OpenCL device. Fails
    on a warning."""
    ran = subprocess.run(
        [
            CLANG,
            "-x",
            "cl",
            "-cl-std=CL1.2",
            "-O2",
            "-target",
            "spir64-unknown-unknown",
            "-Wall",
            "-Werror",
            "-Wno-unused-variable",
            "-Wno-parentheses-equality",
            "-S",
            "-emit-llvm",
            "-o",
            "-",
            "-",
        ],
        input=source,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return re.findall(r"= alloca .*", ran.stdout)


@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        ("mali-g78", "block:4x1"),
        ("adreno-740", "pattern"),
        ("mali-g710", "filter"),
        ("adreno-650", "unstructured"),
        ("opencl", "channel"),
    ],
)
def test_code_of_a_step_is_fit_for_a_phone(target, scheme, tmp_path):
    kernels = kernels_of_a_step(target, scheme, tmp_path)
    assert len({name.split()[0] for name in kernels}) > 12
    for name, kernel in kernels.items():
        assert not faults(kernel.source), name
    if CLANG is None:
        pytest.skip("no clang: whether private arrays stay in registers is only seen in the source")
    source = "\n".join(kernel.source for kernel in kernels.values())
    assert not kept_in_memory(source)


BAD = """__kernel void f(__global float* x, __global int* at) {
  float4 sums_ptr[8];
  for (int i = 0; i < 8; ++i) { sums_ptr[i & 7] = vload4(i, x); }
  x[0] = sums_ptr[at[0]].s0;
}
"""


def test_what_is_not_fit_is_found():
    assert len(faults(BAD)) == 2 and "private sums_ptr at [i & 7]" in faults(BAD)
    assert faults("atomic_add(x, 1);") and faults("double y = 1;") and not faults("float y = 1;")
    assert faults("  float w_ptr[4];\n  vstore4(x, 0, w_ptr + 1);") == ["address of private w_ptr"]


@pytest.mark.skipif(CLANG is None, reason="no clang")
def test_a_private_array_in_memory_is_found():
    assert len(kept_in_memory(BAD)) == 1
    assert not kept_in_memory(BAD.replace("at[0]", "3"))


@pytest.mark.parametrize("target", ["mali-g78", "adreno-740"])
def test_a_library_with_a_kernel_beyond_the_limits_is_not_built(target):
    there, logits = hardware.find_target(target), Image(10, 1, 1, 8, (0, 0, 0, 0), 4)
    source = kernel_source("loss.cross_entropy", SoftmaxCrossEntropy(logits, logits), there)
    assert compile_opencl_library({source.symbol: source.text}, there).imports[0].kind == "opencl"
    small = replace(there, gpu=replace(there.gpu, local_bytes=16))
    with pytest.raises(BuildError, match="bytes of local memory"):
        compile_opencl_library({source.symbol: source.text}, small)


def test_constants_arrive_with_all_their_digits():
    """TVM prints seven; what these do not tell is given by its bits."""
    there = hardware.find_target("opencl")
    for value in (1 / 3, 1 / 7, 0.1, 1e-5, 2.0**-30, 16777215, -1 / 9, 0.25, 3):
        text = "\n".join(
            [
                "@T.prim_func(s_tir=True)",
                'def kernel(y: T.Buffer((1,), "float32")):',
                '    T.func_attr({"tirx.noalias": True, "mest.scratch": ""})',
                '    for block in T.thread_binding(1, thread="blockIdx.x"):',
                '        for lane in T.thread_binding(1, thread="threadIdx.x"):',
                f"            y[0] = {number(value)} * y[0]",
            ]
        )
        source = compile_opencl(text, "k", there).source
        ((bits, digits),) = re.findall(r"as_float\(\(uint\)(\d+)\)|(-?\d\.\d+e[+-]\d+)f", source)
        assert (np.uint32(bits).view(np.float32) if bits else np.float32(digits)) == np.float32(value)


@pytest.mark.parametrize("name", list(ACTIVATIONS.load()))
def test_no_activation_asks_a_device_for_a_maximum_which_may_pass_over_nan(name):
    """On PoCL it does not, which running the kernels cannot tell from what other devices may do."""
    row = ACTIVATIONS[name]
    texts = [spelled(formula, vector, x="x", dy="dy") for formula in (row.formula, row.gradient) for vector in (1, 4)]
    texts.append(rectified("x", 4))
    assert not any(call in text for text in texts for call in ("T.max(", "T.min("))


def test_no_kernel_of_a_step_has_a_constant_that_is_cut():
    there = hardware.find_target("opencl")
    graph, _ = import_model(build_model("resnet20", SHAPE, 10, 8), SHAPE)
    programs = plan_step(graph, StepOptions("dense", 0.0, loss=CrossEntropy(0.1), target=there)).programs
    texts = {kernel_source(call.kernel, call.problem, there).text for program in programs for call in program.calls}
    found = {float(constant.strip('"')) for text in texts for constant in re.findall(r"T\.float32\(([^()]*)\)", text)}
    assert len(found) > 3
    assert not [value for value in found if np.float32(f"{value:.6e}") != np.float32(value)]

"""What the innermost loops of the OpenCL convolutions ask of memory, counted in their code.

`python benchmarks/opencl_loads.py` prints a row for each scheme and phase of a 3x3 layer of 32 channels, 32x32 pixels, batch 64, at 90%.
Nothing is run: loads from global memory and multiply-adds are counted in the OpenCL C of the loop over units, one thread's.
"""

from __future__ import annotations

import re

from mest_compile.building import kernel_source
from mest_compile.frontend import import_model
from mest_compile.graph.fusing import fuse
from mest_compile.graph.lowering import lower
from mest_compile.hardware import find_target
from mest_compile.models import build_model
from mest_compile.opencl_kernels import compile_opencl
from mest_compile.planning import plan_layers
from mest_compile.sparsity import parse_scheme

SHAPE, WIDTH, LAYER, TARGET = (64, 3, 32, 32), 32, "layer1.1.conv1", "mali-g78"
SCHEMES = ("unstructured", "block:4x1", "pattern", "filter", "channel")
LOAD_BYTES = {"source": 16, "delta": 16, "offsets": 4, "values": 4, "pointers": 4}
LANES = 4


def innermost(source: str) -> list[str]:
    """Bodies of the loops that multiply and add and hold no other loop."""
    bodies = re.findall(r"for \([^{}]*\) \{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", source)
    inner = []
    for body in bodies:
        nested = innermost(body)
        inner += nested or ([body] if re.search(r"sums_ptr\[\d+\] = \(sums_ptr", body) else [])
    return inner


def counted(source: str) -> tuple[float, float]:
    """(bytes that a thread asks global memory for, its operations), of all innermost loops once each."""
    asked = operations = 0
    for body in innermost(source):
        for name, size in LOAD_BYTES.items():
            asked += size * len(set(re.findall(rf"\b{name}_ptr\[[^;]*?\](?=[;,)\s])", body)))
        operations += 2 * LANES * len(re.findall(r"sums_ptr\[\d+\] = \(sums_ptr", body))
    return asked, operations


def table() -> str:
    target = find_target(TARGET)
    graph, _ = import_model(build_model("resnet20", SHAPE, 10, WIDTH), SHAPE)
    lines = ["| scheme | phase | kernel | bytes asked | FLOP | FLOP a byte |", "|---|---|---|---:|---:|---:|"]
    for scheme in SCHEMES:
        layers = plan_layers(graph, parse_scheme(scheme), 0.9, "uniform", None, target)
        program, _ = lower(fuse(graph), layers, target, frozenset(), 0.0)
        for call in program.calls:
            layer, _, phase = call.name.rpartition(".")
            if layer == LAYER and phase in ("forward", "grad_input", "grad_weight"):
                asked, operations = counted(compile_opencl(kernel_source(call.kernel, call.problem, target).text, "k", target).source)
                lines.append(f"| {scheme} | {phase} | {call.kernel} | {asked} | {operations} | {operations / asked:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

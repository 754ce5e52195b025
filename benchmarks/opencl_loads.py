"""What the innermost loops of the OpenCL convolutions ask of memory, counted in their code.

`python benchmarks/opencl_loads.py` counts them for a 3x3 layer of 32 channels, 32x32 pixels, batch 64, at 90%, writes
them under "now" to benchmarks/results/opencl_loads.json and the table into docs/opencl.md. "before" in that file was
counted the same way in the schedules of commit c1da5ad, each thread of which loaded its own weights and offsets:
`python opencl_loads.py before` in a checkout of it. Nothing is run: loads from global memory and multiply-adds are
counted in the OpenCL C of the loop over units, one thread's.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import documents

from mest_compile.backends.opencl.code import compile_opencl
from mest_compile.frontend import import_model
from mest_compile.hardware.target import find_target
from mest_compile.kernels.source import kernel_source
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.planning.plan import plan_step
from mest_compile.sparsity import parse_scheme

SHAPE, WIDTH, LAYER, TARGET = (64, 3, 32, 32), 32, "layer1.1.conv1", "mali-g78"
SCHEMES = ("unstructured", "block:4x1", "pattern", "filter", "channel")
LOAD_BYTES = {"source": 16, "delta": 16, "offsets": 4, "values": 4, "pointers": 4}
LANES = 4
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "opencl.md"
RESULT = Path(__file__).resolve().parent / "results" / "opencl_loads.json"
embed = partial(documents.embed, what="loads")


def innermost(source: str) -> list[str]:
    """Bodies of the loops that multiply and add and hold no other loop."""
    bodies = re.findall(r"for \([^{}]*\) \{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", source)
    inner = []
    for body in bodies:
        nested = innermost(body)
        inner += nested or ([body] if re.search(r"sums_ptr\[\d+\] = \(sums_ptr", body) else [])
    return inner


def loads(body: str) -> set[tuple[str, int]]:
    """(place, bytes) of every load from global memory in a loop's body; a place that is read twice is loaded once."""
    found = set()
    for match in re.finditer(rf"(vload(\d+)\(0, )?\b({'|'.join(LOAD_BYTES)})_ptr(?=\[| \+ )", body):
        end = start = match.end() if match[1] is None else match.start() + len("vload") + len(match[2])
        depth = 0
        while depth or end == start:  # to the bracket that closes the index, or vload's
            depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(body[end], 0)
            end += 1
        if match[1] is None and re.match(r" = ", body[end:]):
            continue  # a store
        found.add((match[3] + body[start:end], LOAD_BYTES[match[3]] * int(match[2] or 1)))
    return found


def counted(source: str) -> tuple[int, int]:
    """(bytes that a thread asks global memory for, its operations), of all innermost loops once each."""
    bodies = innermost(source)
    asked = sum(size for body in bodies for _, size in loads(body))
    return asked, 2 * LANES * sum(len(re.findall(r"sums_ptr\[\d+\] = \(sums_ptr", body)) for body in bodies)


def rows(schemes: tuple[str, ...] = SCHEMES) -> list[dict[str, Any]]:
    """For every scheme and phase: kernel, bytes asked and operations of its innermost loops, and megabytes asked by one
    call.

    A call's operations are known, so that bytes follow from the ratio in the loop. What a work-group loads once for all
    threads, weights and offsets, is not counted.
    """
    target, found = find_target(TARGET), []
    graph, _ = import_model(build_model("resnet20", SHAPE, 10, WIDTH), SHAPE)
    for scheme in schemes:
        plan = plan_step(graph, StepOptions(parse_scheme(scheme), target=target))
        spec = plan.layers[f"{LAYER}.weight"].spec
        height, width = spec.output_size
        flop = 2 * 0.1 * WIDTH * WIDTH * 9 * height * width * SHAPE[0]
        for call in plan.train.calls:
            if call.layer == f"{LAYER}.weight" and call.phase:
                asked, operations = counted(
                    compile_opencl(kernel_source(call.kernel, call.problem, target).text, "k", target).source
                )
                found.append(
                    {
                        "scheme": scheme,
                        "phase": call.phase,
                        "kernel": call.kernel,
                        "bytes_asked": asked,
                        "flop": operations,
                        "call_megabytes": round(flop * asked / operations / 1e6, 1),
                    }
                )
    return found


def table(recorded: dict[str, list[dict[str, Any]]]) -> str:
    """The markdown between the markers."""
    lines = [
        "| scheme | phase | FLOP a byte asked, before | now | MB asked by a call, before | now |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for old, new in zip(recorded["before"], recorded["now"], strict=True):
        assert (old["scheme"], old["phase"]) == (new["scheme"], new["phase"])
        ratios = [f"{row['flop'] / row['bytes_asked']:.2f}" for row in (old, new)]
        cells = [new["scheme"], new["phase"], *ratios, f"{old['call_megabytes']:.0f}", f"{new['call_megabytes']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(name: str) -> None:
    recorded = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    recorded[name] = rows()
    RESULT.write_text(json.dumps(recorded, indent=1) + "\n")
    if name == "now":
        DOCUMENT.write_text(embed(DOCUMENT.read_text(encoding="utf-8"), table(recorded)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["now"])

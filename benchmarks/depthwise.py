"""Depthwise kernels and a whole step of MobileNetV2: `python benchmarks/depthwise.py measure` times them in turns with
torch's and with copies of the same bytes, in results/depthwise.json, and writes the tables of docs/benchmarks.md;
without `measure` the tables alone. One thread, processor time, two minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from time import process_time
from typing import Any

import documents
import numpy as np
import torch
from neon import HERE
from run import RESULTS

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.frontend import import_model
from mest_compile.hardware.target import find_target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import kernel_source
from mest_compile.measuring.benchmark import machine
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.planning.plan import plan_step

FILE, DOCUMENT = RESULTS / "depthwise.json", HERE.parent / "docs" / "benchmarks.md"
embed = partial(documents.embed, what="depthwise")
MODEL, SHAPE, SCHEME, SPARSITY = "mobilenetv2", (32, 3, 96, 96), "block", 0.9
PHASES = ("forward", "grad_input", "grad_weight")
TORCH = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
WORKING_BYTES = 48 * 2**20  # of arrays that take turns: more than second-level caches hold
ROUNDS = 9


def timed(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of the processor that each side takes, in turns; the first two rounds do not count."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 2):
        for name, run in sides.items():
            begun = process_time()
            run()
            if turn > 1:
                found[name].append(process_time() - begun)
    return found


def _each(run: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Callable[[], None]:
    def go() -> None:
        for arguments in sets:
            run(*arguments)

    return go


def _ours(call: Any, builder: Builder, count: int) -> Callable[[], None]:
    import tvm

    layers = [
        [tvm.runtime.tensor(np.ones(buffer.elems or _taps(call.problem), buffer.dtype)) for buffer in call.buffers]
        for _ in range(count)
    ]
    return _each(builder.function(kernel_source(call.kernel, call.problem, find_target("local"))), layers)


def _taps(problem: Any) -> int:
    """Of all channels of a layer."""
    result = getattr(problem, "delta", None) or problem.result
    return result.channels * problem.window.taps


def _torchs(kernel: str, problem: Any, layout: torch.memory_format, count: int) -> Callable[[], None]:
    wide, narrow = sides(problem)
    window = problem.window

    def image(layout_of: Image) -> torch.Tensor:
        sizes = (layout_of.batch, layout_of.channels, layout_of.height, layout_of.width)
        return torch.ones(sizes).to(memory_format=layout)

    weight = torch.ones(narrow.channels, 1, *window.kernel)
    how = window.stride, window.padding, window.dilation
    if kernel.endswith("forward"):
        return _each(
            lambda x: torch.nn.functional.conv2d(x, weight, None, *how, wide.channels),
            [(image(wide),) for _ in range(count)],
        )
    mask = [kernel.endswith("grad_input"), kernel.endswith("grad_weight"), False]
    return _each(
        lambda dy, x: torch.ops.aten.convolution_backward(
            dy, x, weight, None, *how, False, [0, 0], wide.channels, mask
        ),
        [(image(narrow), image(wide)) for _ in range(count)],
    )


def sides(problem: Any) -> tuple[Image, Image]:
    """The images of a layer's input and output, whatever the phase."""
    source = problem.source if hasattr(problem, "source") else problem.result
    return source, problem.delta if hasattr(problem, "delta") else problem.result


def measure_kernels(
    model: str = MODEL, shape: tuple[int, ...] = SHAPE, rounds: int = ROUNDS, working_bytes: int = WORKING_BYTES
) -> list[dict[str, Any]]:
    """Of every distinct depthwise kernel of a step: seconds of one call, ours, torch's in both layouts, and of a copy
    of as many bytes as its images have without their halos."""
    torch.set_num_threads(1)
    graph, _ = import_model(build_model(model, shape), shape)
    calls = {
        (call.kernel, call.problem): call
        for call in plan_step(graph, StepOptions(SCHEME, SPARSITY)).train.calls
        if call.kernel.startswith("depthwise.") and call.phase in PHASES
    }
    builder, found = Builder(), []
    for (kernel, problem), call in calls.items():
        wide, narrow = sides(problem)
        pixels = sum(image.channels * image.height * image.width * image.batch for image in (wide, narrow))
        count = max(2, working_bytes // (pixels * 4))
        copies = [(np.ones(pixels // 2, np.float32), np.ones(pixels // 2, np.float32)) for _ in range(count)]
        runs = {"ours": _ours(call, builder, count), "copy": _each(np.copyto, copies)}
        runs |= {name: _torchs(kernel, problem, layout, count) for name, layout in TORCH.items()}
        seconds = {name: [one / count for one in each] for name, each in timed(runs, rounds).items()}
        size = (wide.channels, wide.height, wide.width)
        facts = {"phase": call.phase, "input": size, "kernel": problem.window.kernel, "stride": problem.window.stride}
        found.append({**facts, "bytes": 4 * pixels, "seconds": seconds})
    return found


def measure_steps(model: str = MODEL, shape: tuple[int, ...] = SHAPE, rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of whole steps: ours, and dense torch's in both layouts and under bfloat16 autocast."""
    import mest_compile as mest

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal(shape, np.float32), rng.integers(0, 10, shape[0])
    step = mest.compile(build_model(model, shape), shape, scheme=SCHEME, sparsity=SPARSITY, threads=1)

    def dense(layout: torch.memory_format, autocast: bool) -> Callable[[], None]:
        net = build_model(model, shape).to(memory_format=layout).train()
        rule = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        x, y = torch.from_numpy(images).to(memory_format=layout), torch.from_numpy(labels)

        def go() -> None:
            rule.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = net(x)
            torch.nn.functional.cross_entropy(logits.float(), y).backward()
            rule.step()

        return go

    runs = {"ours": lambda: step(images, labels, lr=0.01)}
    runs |= {name: dense(layout, False) for name, layout in TORCH.items()}
    return timed(runs | {"bfloat16 autocast": dense(torch.channels_last, True)}, rounds)


def ratio(upper: Sequence[float], lower: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(upper, lower, strict=True))


def kernel_rows(kernels: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """(layer, phase) -> milliseconds of a call, its share of a copy's speed, how many times torch's better layout takes
    as long."""
    found = {}
    for one in kernels:
        channels, height, width = one["input"]
        stride = f", stride {one['stride'][0]}" if one["stride"][0] > 1 else ""
        name, seconds = f"{channels} channels, {height}x{width}{stride}", one["seconds"]
        found[name, one["phase"]] = {
            "milliseconds": statistics.median(seconds["ours"]) * 1e3,
            "of_copy": ratio(seconds["copy"], seconds["ours"]),
            "torch": min(ratio(seconds[layout], seconds["ours"]) for layout in TORCH),
        }
    return found


def tables(results: dict[str, Any]) -> str:
    """Markdown."""
    rows, steps = kernel_rows(results["kernels"]), results["steps"]
    lines = ["| layer | forward | input gradient | weight gradient |", "|---|---:|---:|---:|"]
    for name in dict.fromkeys(layer for layer, _ in rows):
        cells = [rows.get((name, phase)) for phase in PHASES]
        told = [f"{one['milliseconds']:.2f}, {one['of_copy']:.2f}, {one['torch']:.1f}" if one else "-" for one in cells]
        lines.append(f"| {name} | {' | '.join(told)} |")
    lines += ["", "| a whole step | ms | times ours |", "|---|---:|---:|"]
    for name, seconds in steps.items():
        said = "ours, `block`, 90%" if name == "ours" else f"dense torch, {name}"
        lines.append(f"| {said} | {statistics.median(seconds) * 1e3:.0f} | {ratio(seconds, steps['ours']):.2f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=["measure"])
    results: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    try:
        if parser.parse_args().what:
            results = {
                "command": "python benchmarks/depthwise.py measure",
                "case": {"model": MODEL, "input_shape": SHAPE, "scheme": SCHEME, "sparsity": SPARSITY, "threads": 1},
                "machine": machine(),
                "versions": {name: metadata.version(name) for name in ("apache-tvm", "torch", "numpy")},
                "kernels": measure_kernels(),
                "steps": measure_steps(),
            }
            write_json(FILE, results)
    except MestError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    write_atomically(DOCUMENT, embed(DOCUMENT.read_text(), tables(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Whole steps of mobile nets, and depthwise chains alone: `python benchmarks/depthwise.py measure [net ...]` times them
in turns with torch's, and chains with copies of the same bytes, into results/depthwise.json, and writes the tables of
docs/benchmarks.md; without `measure` the tables alone. One thread, processor time, ten minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
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
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import kernel_source
from mest_compile.measuring.benchmark import machine
from mest_compile.models.catalog import build_model
from mest_compile.operators.layers.normed_depthwise import NormedDepthwiseBackward, NormedDepthwiseForward
from mest_compile.options import StepOptions
from mest_compile.planning.plan import plan_step

FILE, DOCUMENT = RESULTS / "depthwise.json", HERE.parent / "docs" / "benchmarks.md"
embed = partial(documents.embed, what="depthwise")
SCHEME, SPARSITY = "block", 0.9
NETS = {  # model, input, how many times as fast as torch's fastest it is to be
    "mobilenetv2": ("mobilenetv2", (32, 3, 96, 96), 3.5),
    "efficientnet-lite0": ("efficientnet-lite0", (32, 3, 96, 96), 3.5),
    "mobilenetv3-small": ("mobilenetv3-small", (32, 3, 96, 96), 2.5),
    "mobilenetv2 of 224x224": ("mobilenetv2", (8, 3, 224, 224), 3.5),
    "ds-cnn": ("ds-cnn", (32, 1, 49, 10), 3.0),
    "resnet50 of 32x32": ("resnet50", (32, 3, 32, 32), 4.5),
    "deit-tiny of 32x32": ("deit-tiny", (64, 3, 32, 32), 3.0),
    "cct": ("cct", (64, 3, 32, 32), 3.0),
}
CHAINS = "mobilenetv2"  # whose
PHASES = ("forward", "backward")
TORCH = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
WORKING_BYTES = 48 * 2**20  # of arrays that take turns: more than second-level caches hold
ROUNDS = 9
CELLS = """A chain's cells have three numbers: milliseconds of a call; the time over it of a plain copy of the bytes
that it has to read and write, so that 1.00 is the speed of memory; torch's time over it, in the better of its two
layouts. Their arrays are more than the second-level cache holds."""


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
    return problem.source.channels * problem.window.taps


def _torchs(problem: Any, layout: torch.memory_format, count: int) -> Callable[[], None]:
    """Normalisation, ReLU6, convolution, normalisation, ReLU6: forward up to what the last normalisation takes, or all
    of the way back."""
    from torch import nn

    image, window = problem.source, problem.window
    convolution = nn.Conv2d(
        image.channels, image.channels, window.kernel, window.stride, window.padding, groups=image.channels, bias=False
    )
    net = nn.Sequential(nn.BatchNorm2d(image.channels), nn.ReLU6(), convolution)
    net = net.to(memory_format=layout).train()
    inputs = [
        torch.ones(image.batch, image.channels, image.height, image.width).to(memory_format=layout).requires_grad_()
        for _ in range(count)
    ]
    if isinstance(problem, NormedDepthwiseForward):
        return _each(net, [(x,) for x in inputs])
    behind = nn.Sequential(nn.BatchNorm2d(image.channels), nn.ReLU6()).train()
    outputs = [behind(net(x)) for x in inputs]
    gradients = [torch.ones_like(y) for y in outputs]
    return _each(
        lambda y, dy: torch.autograd.backward(y, dy, retain_graph=True), list(zip(outputs, gradients, strict=True))
    )


def measure_chains(rounds: int = ROUNDS, working_bytes: int = WORKING_BYTES) -> list[dict[str, Any]]:
    """Of every distinct depthwise chain of a step: seconds of one call, ours, torch's in both layouts, and of a copy of
    as many bytes as it reads and writes at least."""
    torch.set_num_threads(1)
    model, shape, _ = NETS[CHAINS]
    graph, _ = import_model(build_model(model, shape), shape)
    calls = {
        call.problem: call
        for call in plan_step(graph, StepOptions(SCHEME, SPARSITY)).train.calls
        if isinstance(call.problem, NormedDepthwiseForward | NormedDepthwiseBackward) and call.phase in PHASES
    }
    builder, found = Builder(), []
    for problem, call in calls.items():
        back = isinstance(problem, NormedDepthwiseBackward)
        result = problem.z if back else problem.result
        wide, narrow = (one.channels * one.height * one.width * one.batch for one in (problem.source, result))
        elems = 2 * (wide + narrow) if back else wide + narrow  # z and dz, z and dy; or z and z
        count = max(2, working_bytes // (elems * 4))
        copies = [(np.ones(elems // 2, np.float32), np.ones(elems // 2, np.float32)) for _ in range(count)]
        runs = {"ours": _ours(call, builder, count), "copy": _each(np.copyto, copies)}
        runs |= {name: _torchs(problem, layout, count) for name, layout in TORCH.items()}
        seconds = {name: [one / count for one in each] for name, each in timed(runs, rounds).items()}
        size = (problem.source.channels, problem.source.height, problem.source.width)
        facts = {"phase": call.phase, "input": size, "kernel": problem.window.kernel, "stride": problem.window.stride}
        found.append({**facts, "bytes": 4 * elems, "seconds": seconds})
    return found


def steps_of(net: str) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What builds a step of each side: ours, and dense torch's in both layouts and under bfloat16 autocast."""
    torch.set_num_threads(1)
    model, shape, _ = NETS[net]
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal(shape, np.float32), rng.integers(0, 10, shape[0])

    def ours(activations: str) -> Callable[[], Any]:
        import mest_compile as mest

        how = {"scheme": SCHEME, "sparsity": SPARSITY, "threads": 1, "activations": activations}
        step = mest.compile(build_model(model, shape), shape, **how)
        return lambda: step(images, labels, lr=0.01)

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

    sides = {"ours": partial(ours, "float32"), "ours, bfloat16": partial(ours, "bfloat16")}
    sides |= {name: partial(dense, layout, False) for name, layout in TORCH.items()}
    return sides | {"bfloat16 autocast": partial(dense, torch.channels_last, True)}


def measure_steps(net: str, rounds: int = 5) -> dict[str, list[float]]:
    return timed({name: build() for name, build in steps_of(net).items()}, rounds)


def resident(line: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since it was last cleared."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(entry.split()[1]) for entry in status if entry.startswith(line)) * 1024


def step_peak(net: str, side: str) -> int:
    """Bytes that a process holds at most while it runs two steps, beside what it held when it had imported what it
    uses."""
    import mest_compile as mest

    small = (2, 4, 8, 8)
    tiny = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(256, 4))
    mest.compile(tiny, small, threads=1)(np.ones(small, np.float32), np.zeros(2, np.int64))
    torch.nn.functional.cross_entropy(tiny(torch.ones(small)), torch.zeros(2, dtype=torch.int64)).backward()
    before = resident("VmRSS")
    step = steps_of(net)[side]()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    step()
    return resident("VmHWM") - before


def measure_peaks(net: str) -> dict[str, int]:
    """Each in a process of its own, with kernels compiled before."""
    command = [sys.executable, __file__, "peak", net]
    return {
        side: int(subprocess.run([*command, side], capture_output=True, check=True, text=True).stdout.split()[-1])
        for side in steps_of(net)
    }


def ratio(upper: Sequence[float], lower: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(upper, lower, strict=True))


def chain_rows(chains: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """(layer, phase) -> milliseconds of a call, its share of a copy's speed, how many times torch's better layout takes
    as long."""
    found = {}
    for one in chains:
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
    rivals = (*TORCH, "bfloat16 autocast")
    columns = " | ".join(f"torch, {name}" for name in rivals)
    lines = [
        f"| net | ours, ms | {columns} | wanted | bfloat16 stored | memory |",
        "|---|" + "---:|" * (len(rivals) + 4),
    ]
    for net, found in results["nets"].items():
        _, shape, goal = NETS[net]
        seconds, peaks = found["seconds"], found["peaks"]
        times = [ratio(seconds[name], seconds["ours"]) for name in rivals]
        half = min(ratio(seconds[name], seconds["ours, bfloat16"]) for name in rivals)
        memory = peaks["ours"] / min(peaks[name] for name in TORCH)
        less = peaks["ours, bfloat16"] / peaks["bfloat16 autocast"]
        told = " | ".join(f"{one:.2f}" for one in times)
        lines.append(
            f"| {net.partition(' ')[0]}, {'x'.join(map(str, shape))} | {statistics.median(seconds['ours']) * 1e3:.0f} "
            f"| {told} | {goal} | {half:.2f} | {memory:.2f}, {less:.2f} |"
        )
    rows = chain_rows(results.get("chains", []))
    lines += ["", CELLS, "", "| chain | forward | backward |", "|---|---:|---:|"] if rows else []
    for name in dict.fromkeys(layer for layer, _ in rows):
        cells = [rows.get((name, phase)) for phase in PHASES]
        told = [f"{one['milliseconds']:.2f}, {one['of_copy']:.2f}, {one['torch']:.1f}" if one else "-" for one in cells]
        lines.append(f"| {name} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=["measure", "peak"])
    parser.add_argument("names", nargs="*", metavar="net", help="nets, all by default; of `peak` a net and a side")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    try:
        if arguments.what == "peak":
            print(step_peak(*arguments.names))
            return 0
        if arguments.what:
            results |= {
                "command": "python benchmarks/depthwise.py measure",
                "case": {"scheme": SCHEME, "sparsity": SPARSITY, "threads": 1},
                "machine": machine(),
                "versions": {name: metadata.version(name) for name in ("apache-tvm", "torch", "numpy")},
            }
            for net in arguments.names or NETS:
                found = {"seconds": measure_steps(net), "peaks": measure_peaks(net)}
                results["nets"] = results.get("nets", {}) | {net: found}
                write_json(FILE, results)
            if not arguments.names:
                results["chains"] = measure_chains()
                write_json(FILE, results)
    except MestError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    write_atomically(DOCUMENT, embed(DOCUMENT.read_text(), tables(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

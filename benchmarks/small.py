"""Steps of small batches: `python benchmarks/small.py measure [net ...]` times whole steps of batches 1 to 16 in turns
with dense torch's in both of its layouts, and bytes beside them, into results/small.json, and writes the table of
docs/benchmarks.md; without `measure` the table alone. One thread, processor time, an hour. What is in the file is not
measured again but with --again, so that a measurement that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import documents
import numpy as np
import torch
from depthwise import HERE, RESULTS, TORCH, ratio, resident, timed

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.measuring.benchmark import machine
from mest_compile.models.catalog import build_model

FILE, DOCUMENT = RESULTS / "small.json", HERE.parent / "docs" / "benchmarks.md"
embed = partial(documents.embed, what="small")
SPARSITY = 0.9
BATCHES = (1, 2, 4, 8, 16)
NETS = {  # model, width, input without the batch
    "wide resnet32": ("resnet32", 32, (3, 32, 32)),
    "resnet18 of 96x96": ("resnet18", None, (3, 96, 96)),
    "resnet18 of 224x224": ("resnet18", None, (3, 224, 224)),
    "resnet8": ("resnet8", None, (3, 32, 32)),
    "ds-cnn": ("ds-cnn", None, (1, 49, 10)),
}
OURS = {"block": {"sparsity": SPARSITY}, "unstructured": {"sparsity": SPARSITY}, "dense": {}}
ROUNDS = 7


def built(net: str, batch: int, side: str) -> tuple[Callable[[], Any], int | None]:
    """(a step of that side, the bytes that ours plans)."""
    torch.set_num_threads(1)
    model, width, size = NETS[net]
    shape, rng = (batch, *size), np.random.default_rng(0)
    network = build_model(model, shape, width=width)
    images, labels = rng.standard_normal(shape, np.float32), rng.integers(0, 10, batch)
    if side in OURS:
        import mest_compile as mest

        step = mest.compile(network, shape, scheme=side, threads=1, **OURS[side])
        return lambda: step(images, labels, lr=0.01), step.memory()["total"]
    network = network.to(memory_format=TORCH[side]).train()
    rule = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    x, y = torch.from_numpy(images).to(memory_format=TORCH[side]), torch.from_numpy(labels)

    def go() -> None:
        rule.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        rule.step()

    return go, None


def measure(net: str, batch: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of each side, the bytes that ours plans, and those that torch's process holds at most for its step."""
    sides = {side: built(net, batch, side) for side in (*OURS, *TORCH)}
    return {
        "seconds": timed({side: step for side, (step, _) in sides.items()}, rounds),
        "planned_bytes": {side: planned for side, (_, planned) in sides.items() if planned is not None},
        "torch_bytes": {side: _peak_of(net, batch, side) for side in TORCH},
    }


def _peak_of(net: str, batch: int, side: str) -> int:
    """In a process of its own."""
    command = [sys.executable, __file__, "peak", net, str(batch), side]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[-1])


def peak(net: str, batch: int, side: str) -> int:
    """Bytes that this process holds at most while it runs two steps, beside what it held when torch was ready."""
    layer = torch.nn.Conv2d(4, 4, 3, padding=1)
    layer(torch.ones(1, 4, 8, 8)).sum().backward()
    before = resident("VmRSS")
    step, _ = built(net, batch, side)
    Path("/proc/self/clear_refs").write_text("5")
    step()
    step()
    return resident("VmHWM") - before


def table(results: dict[str, Any]) -> str:
    """Markdown: how many times as long torch's faster layout takes, our bytes of `block`, torch's in the layout that
    needs less."""
    lines = [
        "| net | batch | block, ms | block | unstructured | dense | MB | torch, MB | of torch's |",
        "|---|" + "---:|" * 8,
    ]
    for net, batches in results["nets"].items():
        for batch, found in sorted(batches.items(), key=lambda entry: int(entry[0])):
            seconds = found["seconds"]
            times = {side: min(ratio(seconds[layout], seconds[side]) for layout in TORCH) for side in OURS}
            planned = found["planned_bytes"]["block"]
            told = " | ".join(f"{times[side]:.2f}" for side in OURS)
            theirs = min(found["torch_bytes"].values())
            sizes = f"{planned / 1e6:.1f} | {theirs / 1e6:.0f} | {planned / theirs:.2f}"
            lines.append(f"| {net} | {batch} | {statistics.median(seconds['block']) * 1e3:.1f} | {told} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=["measure", "peak"])
    parser.add_argument("names", nargs="*", metavar="net", help="nets, all by default; of `peak` a net, batch and side")
    parser.add_argument("--again", action="store_true", help="measure what is in the file already as well")
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"nets": {}}
    try:
        if arguments.what == "peak":
            net, batch, side = arguments.names
            print(peak(net, int(batch), side))
            return 0
        if arguments.what:
            results |= {
                "command": "python benchmarks/small.py measure",
                "case": {"schemes": list(OURS), "sparsity": SPARSITY, "threads": 1},
                "machine": machine(),
                "versions": {name: metadata.version(name) for name in ("apache-tvm", "torch", "numpy")},
            }
            wanted = arguments.names or list(NETS)
            if arguments.again:
                results["nets"] = {net: found for net, found in results["nets"].items() if net not in wanted}
            for net in wanted:
                found = results["nets"].setdefault(net, {})
                for batch in BATCHES:
                    if str(batch) not in found:
                        print(f"{net}, batch {batch}", file=sys.stderr)
                        found[str(batch)] = measure(net, batch)
                        write_json(FILE, results)
    except MestError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    write_atomically(DOCUMENT, embed(DOCUMENT.read_text(), table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

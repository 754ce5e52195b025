"""Executed instructions and modelled cycles of convolutions of the wide ResNet-32 on a Cortex-A76, sparse beside dense.

`python benchmarks/neon.py` emulates them (some minutes) and writes results/neon.json and the table of docs/arm.md.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import documents

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically
from mest_compile.frontend import import_model
from mest_compile.measuring.analysis import analyse
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.sparsity import parse_scheme

HERE = Path(__file__).resolve().parent
RESULTS, DOCUMENT = HERE / "results" / "neon.json", HERE.parent / "docs" / "arm.md"
embed = partial(documents.embed, what="neon")
MODEL, WIDTH, SHAPE, SPARSITY, TARGET = "resnet32", 32, (8, 3, 32, 32), 0.9, "cortex-a76"
LAYERS = [f"layer{stage}.1.conv1.weight" for stage in (1, 2, 3)]  # 32x32x32, 64x16x16, 128x8x8
SCHEMES = ("block:4x1", "pattern", "unstructured")
PHASES = {"forward": "forward", "grad_input": "input gradient", "grad_weight": "weight gradient", "all": "all three"}


def measure() -> dict[str, Any]:
    """The document of results/neon.json."""
    graph, _ = import_model(build_model(MODEL, SHAPE, 10, WIDTH, 0), SHAPE)
    found = {}

    def tell(done: int, total: int) -> None:
        print(f"{len(found)} of {len(SCHEMES)} schemes and {done} of {total} kernels done", file=sys.stderr)

    for scheme in SCHEMES:
        found[scheme] = analyse(
            graph, StepOptions(parse_scheme(scheme), SPARSITY, target=TARGET), LAYERS, progress=tell
        ).to_dict()
    return {
        "command": "python benchmarks/neon.py",
        "model": MODEL,
        "width": WIDTH,
        "input_shape": SHAPE,
        "tvm": metadata.version("apache-tvm"),
        "analyses": found,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: a line a scheme and phase, and the worst and best kernel of each."""
    lines = [
        "| scheme | phase | million instructions | million modelled cycles | share of the FMA floor | worst to "
        "best kernel | "
        "dense share | times fewer cycles than dense |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for scheme, analysis in results["analyses"].items():
        for phase, name in PHASES.items():
            total = analysis["totals"][phase]
            shares = [
                kernel["sparse"]["share_of_floor"]
                for kernel in analysis["kernels"]
                if phase in (kernel["phase"], "all")
            ]
            lines.append(
                f"| {scheme} | {name} | {total['sparse_instructions'] / 1e6:.0f} | "
                f"{total['sparse_cycles'] / 1e6:.0f} | "
                f"{total['share_of_floor']:.0%} | {min(shares):.0%} to {max(shares):.0%} | "
                f"{total['dense_share_of_floor']:.0%} | "
                f"{total['times_fewer_cycles']:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    try:
        results = measure()
    except MestError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")
    write_atomically(DOCUMENT, embed(DOCUMENT.read_text(), table(json.loads(RESULTS.read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Activations in bfloat16: `python benchmarks/bfloat16.py speed accuracy` measures parts of results/bfloat16.json and
writes the tables of docs/memory.md; without parts the tables alone.

speed     whole steps of the wide ResNet-32 on one thread, in turns with float32 and with the fastest torch here, in one
          process: its processor time, which others on the machine matter little to
accuracy  trainings on digits with the same seeds
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import documents
from depthwise import timed
from float16 import accuracies, accuracy
from neon import HERE
from run import RESULTS, WIDE

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.measuring.benchmark import machine
from mest_compile.measuring.contestants import CONTESTANTS
from mest_compile.options import ACTIVATIONS

FILE, DOCUMENT = RESULTS / "bfloat16.json", HERE.parent / "docs" / "memory.md"
embed = partial(documents.embed, what="bfloat16")
SCHEMES = ("block:4x1", "block:4x2", "unstructured", "pattern", "filter", "channel")
SIDES = {"bfloat16": "mest", "float32": "mest-float32", "torch": "torch-best"}
DATA, EPOCHS, ROUNDS = "digits", 10, 9


def speed(scheme: str) -> dict[str, Any]:
    """Seconds of each side's steps, what they plan, and what is to be known of them."""
    case = WIDE.but(scheme=scheme, threads=1, activations="bfloat16")
    built = {name: CONTESTANTS[contestant].build(case) for name, contestant in SIDES.items()}
    seconds = timed({name: one.step for name, one in built.items()}, ROUNDS)
    return {
        "scheme": scheme,
        "seconds": seconds,
        "planned_bytes": {name: one.planned_bytes for name, one in built.items()},
        "notes": {name: list(one.notes) for name, one in built.items()},
    }


PARTS: dict[str, Callable[[], Any]] = {
    "speed": lambda: [speed(scheme) for scheme in SCHEMES],
    "accuracy": lambda: accuracy(ACTIVATIONS, DATA, EPOCHS),
}


def table(results: dict[str, Any]) -> str:
    """Markdown: steps, then accuracy."""
    lines = [
        "| scheme | bfloat16 ms | float32 ms | times as fast | torch ms | times as fast | planned MiB | instead of |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in results["speed"]:
        half, full, torch = (statistics.median(one["seconds"][name]) for name in SIDES)
        planned = (one["planned_bytes"][name] / 2**20 for name in ("bfloat16", "float32"))
        times = f"{half * 1e3:.0f} | {full * 1e3:.0f} | {full / half:.2f} | {torch * 1e3:.0f} | {torch / half:.2f}"
        lines.append(f"| {one['scheme']} | {times} | {' | '.join(f'{size:.0f}' for size in planned)} |")
    told = {note.rpartition(": ")[2] for one in results["speed"] for note in one["notes"]["torch"]}
    lines += ["", f"The fastest torch was {' or '.join(sorted(told))}."]
    return "\n".join(lines + accuracies(results["accuracy"])) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "parts", nargs="*", help=f"to measure: {', '.join(PARTS)}; none: the tables are written from what is there"
    )
    wanted = parser.parse_args().parts
    if unknown := set(wanted) - PARTS.keys():
        parser.error(f"there is no part {min(unknown)}")
    results: dict[str, Any] = {"command": "python benchmarks/bfloat16.py speed accuracy", "case": WIDE.to_json()}
    if FILE.exists():
        results = json.loads(FILE.read_text())
    try:
        for part in wanted:
            results |= {part: PARTS[part](), "machine": machine(), "tvm": metadata.version("apache-tvm")}
            write_json(FILE, results)
    except MestError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    if PARTS.keys() <= results.keys():
        write_atomically(DOCUMENT, embed(DOCUMENT.read_text(), table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Activations in bfloat16: `python benchmarks/bfloat16.py speed accuracy` measures parts of results/bfloat16.json and
writes the tables of docs/memory.md; without parts the tables alone.

speed     whole steps of the wide ResNet-32 on one thread, in turns with float32 and with the fastest torch here, in one
          process: its processor time, which others on the machine matter little to
accuracy  trainings on digits with the same seeds
threads   two threads against one, and against the fastest torch with two, in turns, by the clock: wants a machine that
          does nothing else
resident  the highest resident memory of a process that trains, beside that of torch in float32
peak      useful operations of each stage's convolutions, as a share of what a core computes with its registers alone
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from typing import Any

import documents
from depthwise import timed
from float16 import accuracies, accuracy
from neon import HERE
from peak import peak
from run import RESULTS, WIDE

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.compiling import compile_step
from mest_compile.measuring.benchmark import compare, machine
from mest_compile.measuring.case import Case
from mest_compile.measuring.contestants import CONTESTANTS
from mest_compile.measuring.profiling import Profile, profile
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


def beside(case: Case, rival: str) -> dict[str, Any]:
    """Both in processes of their own, in turns: times as fast, its interval, and highest resident bytes of each."""
    found = compare(case, rival, repeats=ROUNDS)
    return {
        "rival": rival,
        "threads": case.threads,
        "ratio": found.ratio,
        "interval": found.ratio_interval,
        "milliseconds": [1e3 * side.median_seconds for side in (found.ours, found.rival)],
        "resident_bytes": [side.training_peak_bytes for side in (found.ours, found.rival)],
        "notes": list(found.rival.notes),
        "others_cores": found.machine["others_cores"],
    }


def shares(profiles: Sequence[Profile], peak_gflops: float) -> list[dict[str, Any]]:
    """Of each stage and phase useful operations a second, 1e9/s, over the stage's sparse layers, and their share of the
    peak: medians of the profiles. A stage is known by the pixels of what its layers give."""
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for one in profiles:
        flop, seconds = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
        for layer in one.layers:
            if layer.live_weights == math.prod(layer.weight_shape):  # dense: the stem, shortcuts, the classifier
                continue
            for phase in ("forward", "grad_input", "grad_weight"):
                if phase in layer.seconds:
                    key = layer.output_size[0], phase
                    flop[key] += layer.flop
                    seconds[key] += layer.seconds[phase]
        for key in flop:
            found[key].append(flop[key] / seconds[key] / 1e9)
    return [
        {"map": size, "phase": phase, "gflops": (middle := statistics.median(rates)), "of_peak": middle / peak_gflops}
        for (size, phase), rates in sorted(found.items(), key=lambda item: -item[0][0])
    ]


def of_peak() -> list[dict[str, Any]]:
    """By scheme and type of activations."""
    found = []
    for activations in ("bfloat16", "float32"):
        most = peak(activations)
        for scheme in SCHEMES:
            case = WIDE.but(scheme=scheme, threads=1, activations=activations)
            step = compile_step(case.network(), case.input_shape, case.options)
            profiles = [profile(step, *case.batch(), repeats=3) for _ in range(3)]
            rows = shares(profiles, most)
            found.append({"scheme": scheme, "activations": activations, "peak_gflops": most, "stages": rows})
    return found


TWO = WIDE.but(scheme="block:4x1", threads=2, activations="bfloat16")
PARTS: dict[str, Callable[[], Any]] = {
    "speed": lambda: [speed(scheme) for scheme in SCHEMES],
    "accuracy": lambda: accuracy(ACTIVATIONS, DATA, EPOCHS),
    "threads": lambda: [beside(TWO, rival) for rival in ("mest-one-thread", "torch-best")],
    "resident": lambda: beside(TWO.but(threads=1), "torch"),
    "peak": of_peak,
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
    lines += accuracies(results["accuracy"])
    for one in results.get("threads", ()):
        low, high, _ = one["interval"]
        lines += ["", f"On two threads {one['ratio']:.2f} ({low:.2f} to {high:.2f}) times as fast as {one['rival']}."]
    if "resident" in results:
        ours, theirs = (size / 2**20 for size in results["resident"]["resident_bytes"])
        lines += [
            "",
            f"Highest resident memory beyond imports: {ours:.0f} MiB, torch {theirs:.0f}: {ours / theirs:.2f}.",
        ]
    if "peak" in results:
        lines += ["", *shown_shares(results["peak"])]
    return "\n".join(lines) + "\n"


def shown_shares(found: Sequence[dict[str, Any]]) -> list[str]:
    """A line a scheme and type of activations."""
    columns = [(row["map"], row["phase"]) for row in found[0]["stages"]]
    head = " | ".join(f"{phase.replace('_', ' ')} {size}x{size}" for size, phase in columns)
    lines = [f"| of the peak | activations | GFLOP/s | {head} |", "|---|---|---:|" + "---:|" * len(columns)]
    for one in found:
        shares = {(row["map"], row["phase"]): row["of_peak"] for row in one["stages"]}
        told = " | ".join(f"{shares[column]:.0%}" for column in columns)
        lines.append(f"| {one['scheme']} | {one['activations']} | {one['peak_gflops']:.0f} | {told} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "parts", nargs="*", help=f"to measure: {', '.join(PARTS)}; none: the tables are written from what is there"
    )
    wanted = parser.parse_args().parts
    if unknown := set(wanted) - PARTS.keys():
        parser.error(f"there is no part {min(unknown)}")
    results: dict[str, Any] = {"command": f"python benchmarks/bfloat16.py {' '.join(PARTS)}", "case": WIDE.to_json()}
    if FILE.exists():
        results = json.loads(FILE.read_text())
    try:
        for part in wanted:
            results |= {part: PARTS[part](), "machine": machine(), "tvm": metadata.version("apache-tvm")}
            write_json(FILE, results)
    except MestError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    if {"speed", "accuracy"} <= results.keys():
        write_atomically(DOCUMENT, embed(DOCUMENT.read_text(), table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

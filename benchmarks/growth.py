"""How the cost of a step grows: `python benchmarks/growth.py measure` changes one thing at a time of a step of the wide
ResNet-32 (batch 64, 32x32, block:4x1 at 90%, one thread), times ours in float32 and in bfloat16 in turns with the
fastest torch of this machine, and keeps every row in results/growth.json as it is finished; what is there is not
measured again but with --again. Then, and without `measure` alone, it writes the tables of docs/benchmarks.md and
their picture. `--quick` measures a small net into a folder, to see that it works.

Seconds are the processor's on one thread, which others on the machine matter little to, and those of the clock on
several: these rows want a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import documents
import matplotlib
from matplotlib.figure import Figure
from peak import peak
from run import RESULTS, WIDE

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.hardware.host import cores
from mest_compile.ir.program import PRODUCTS
from mest_compile.measuring.benchmark import machine
from mest_compile.measuring.case import Case
from mest_compile.measuring.contestants import CONTESTANTS

FILE = RESULTS / "growth.json"
DOCUMENT = RESULTS.parent.parent / "docs" / "benchmarks.md"
PICTURE = DOCUMENT.parent / "pictures" / "growth.svg"
embed = partial(documents.embed, what="growth")
OURS = ("float32", "bfloat16")
SCHEMES = ("block:4x1", "block:4x2", "unstructured", "pattern", "filter", "channel")
LONG_SECONDS, ROUNDS, FEW_ROUNDS = 4.0, 7, 3  # a round that takes so long is not made so often


@dataclass(frozen=True, slots=True)
class Setting:
    """What grows. case: where all of it begins."""

    case: Case
    batches: tuple[int, ...]
    widths: tuple[int, ...]
    images: tuple[int, ...]
    sparsities: tuple[float, ...]
    schemes: tuple[str, ...]
    threads: tuple[int, ...]


def whole() -> Setting:
    return Setting(
        WIDE.but(scheme="block:4x1", sparsity=0.9, threads=1),
        (1, 2, 4, 8, 16, 32, 64, 128, 256),
        (16, 32, 64, 128, 256),
        (16, 32, 64, 128, 224),
        (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99),
        SCHEMES,
        tuple(range(1, cores() + 1)),
    )


def quick() -> Setting:
    case = Case("resnet8", (8, 3, 8, 8), width=8).but(scheme="block:4x1", sparsity=0.9, threads=1)
    return Setting(case, (2, 8), (8,), (8,), (0.3, 0.9), ("block:4x1", "pattern"), (1,))


def cases(setting: Setting) -> Iterator[tuple[str, Any, Case]]:
    """(what grows, its value, the case), what takes long last."""
    one = setting.case
    _, *size = one.input_shape
    for scheme in setting.schemes:
        for sparsity in setting.sparsities:
            yield scheme, sparsity, one.but(scheme=scheme, sparsity=sparsity)
    for threads in setting.threads:
        yield "threads", threads, one.but(threads=threads)
    for batch in setting.batches:
        yield "batch", batch, replace(one, input_shape=(batch, *size))
    for side in setting.images:
        yield "image", side, replace(one, input_shape=(*one.input_shape[:2], side, side))
    for width in setting.widths:
        yield "width", width, replace(one, width=width)


def measure(case: Case) -> dict[str, Any]:
    """Seconds of each side in every round, and what is to be known of them; a scheme that cannot be so says why."""
    steps, notes = {}, {}
    try:
        for stored in OURS:
            steps[stored], notes[stored] = _ours(case.but(activations=stored))
    except MestError as problem:
        return {"refused": str(problem)}
    torch = CONTESTANTS["torch-best"].build(case)
    steps["torch"] = torch.step
    now = time.process_time if case.threads == 1 else time.perf_counter
    return {
        "seconds": in_turns(steps, now),
        "clock": "processor" if case.threads == 1 else "wall",
        "flop": notes[OURS[0]]["flop"],
        "planned_bytes": {stored: notes[stored]["planned_bytes"] for stored in OURS},
        "torch": torch.notes[0].rpartition(": ")[2],
    }


def _ours(case: Case) -> tuple[Callable[[], Any], dict[str, int]]:
    """A step, what it plans, and the operations that its convolutions and linear layers want: 2 a live weight, output
    pixel and example, of each phase; what is computed again does not count."""
    from mest_compile.compiling import compile_step

    step = compile_step(case.network(), case.input_shape, case.options)
    images, labels = case.batch()
    live = step.live_weights()
    of_phase = {
        name: 2 * live[name] * math.prod(layer.spec.output_size) * step.batch for name, layer in step.layers.items()
    }
    useful = PRODUCTS.keys() - {"recompute"}
    flop = sum(
        PRODUCTS[call.phase] * of_phase[call.layer]
        for call in step.program.calls
        if call.phase in useful and call.layer in of_phase
    )
    return lambda: step(images, labels), {"flop": flop, "planned_bytes": step.memory()["total"]}


def in_turns(steps: dict[str, Callable[[], Any]], now: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each in every round but the first, which warms up and tells how many there can be."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    rounds, number = ROUNDS, 0
    while number <= rounds:
        for name, step in steps.items():
            begun = now()
            step()
            found[name].append(now() - begun)
        if number == 0 and sum(seconds[0] for seconds in found.values()) > LONG_SECONDS:
            rounds = FEW_ROUNDS
        number += 1
    return {name: seconds[1:] for name, seconds in found.items()}


def times(row: dict[str, Any], stored: str) -> float:
    """How many times as long torch takes: the median of the rounds' ratios."""
    seconds = row["seconds"]
    return statistics.median(theirs / ours for ours, theirs in zip(seconds[stored], seconds["torch"], strict=True))


def break_even(rows: dict[float, dict[str, Any]], stored: str) -> str:
    """The sparsity from which on a scheme's step is faster than torch's: between two that were measured the logarithm
    of the ratio is a line."""
    ratios = [(sparsity, times(row, stored)) for sparsity, row in sorted(rows.items()) if "seconds" in row]
    if ratios and all(ratio >= 1 for _, ratio in ratios):
        return f"{ratios[0][0]:.0%} or less"
    for (before, lower), (after, upper) in pairwise(ratios):
        if lower < 1 <= upper:
            share = math.log(lower) / (math.log(lower) - math.log(upper))
            return f"{before + share * (after - before):.0%}"
    return "-"


def by_factor(results: dict[str, Any]) -> dict[str, dict[Any, dict[str, Any]]]:
    """{what grows: {its value: the row}}, in the order in which they are measured."""
    found: dict[str, dict[Any, dict[str, Any]]] = {}
    for row in results["rows"].values():
        found.setdefault(row["factor"], {})[row["value"]] = row
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: schemes by sparsity, then the rest."""
    factors = by_factor(results)
    schemes = {name: rows for name, rows in factors.items() if name not in ("threads", "batch", "image", "width")}
    sparsities = sorted({sparsity for rows in schemes.values() for sparsity in rows})
    head = " | ".join(f"{sparsity:.0%}" for sparsity in sparsities)
    lines = [f"| scheme | activations | {head} | faster from |", "|---|---|" + "---:|" * (len(sparsities) + 1)]
    for scheme, rows in schemes.items():
        for stored in OURS:
            told = [f"{times(rows[one], stored):.2f}" if "seconds" in rows.get(one, {}) else "-" for one in sparsities]
            lines.append(f"| {scheme} | {stored} | {' | '.join(told)} | {break_even(rows, stored)} |")
    lines += [
        "",
        "| what grows | to | float32 ms | bfloat16 ms | torch ms | float32, times as fast | bfloat16, times as fast | "
        "float32, of the peak | bfloat16, of the peak | the fastest torch |",
        "|---|" + "---:|" * 8 + "---|",
    ]
    for factor, rows in factors.items():
        for value, row in rows.items() if factor not in schemes else ():
            spent = {side: statistics.median(seconds) for side, seconds in row["seconds"].items()}
            cells = [f"{spent[side] * 1e3:.1f}" for side in (*OURS, "torch")]
            cells += [f"{times(row, stored):.2f}" for stored in OURS]
            cells += [f"{share(row, stored, results['peak']):.0%}" for stored in OURS]
            lines.append(f"| {factor} | {value} | {' | '.join(cells)} | {row['torch']} |")
    return "\n".join(lines) + "\n"


def share(row: dict[str, Any], stored: str, peaks: dict[str, float]) -> float:
    """Of what all of its threads' cores could compute."""
    threads = row["value"] if row["factor"] == "threads" else 1
    return row["flop"] / statistics.median(row["seconds"][stored]) / (peaks[stored] * 1e9 * threads)


def draw(results: dict[str, Any]) -> str:
    """SVG on white: times as fast as torch, one field for sparsity and one for each of what grows."""
    factors = by_factor(results)
    grown = [name for name in ("batch", "image", "width") if name in factors]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "growth"}):
        figure = Figure(figsize=(10, 7), layout="constrained")
        fields = figure.subplots(2, 2).flatten()
        for scheme, rows in factors.items():
            if scheme in ("threads", *grown):
                continue
            shown = {sparsity: row for sparsity, row in rows.items() if "seconds" in row}
            ratios = [times(row, "bfloat16") for row in shown.values()]
            fields[0].plot(list(shown), ratios, marker=".", label=scheme)
        fields[0].set(xlabel="sparsity", title="bfloat16, by scheme", yscale="log")
        for field, name in zip(fields[1:], grown):
            for stored in OURS:
                field.plot(
                    list(factors[name]),
                    [times(row, stored) for row in factors[name].values()],
                    marker=".",
                    label=stored,
                )
            field.set(xlabel=name, xscale="log")
            field.set_xticks(list(factors[name]), map(str, factors[name]), minor=False)
            field.minorticks_off()
        for field in fields:
            field.axhline(1, color="#d62728", linewidth=1)
            field.set_ylabel("times as fast as torch-best")
            field.spines[["top", "right"]].set_visible(False)
            if field.get_legend_handles_labels()[0]:
                field.legend(frameon=False, fontsize=8)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def run(setting: Setting, path: Path, only: str, again: bool) -> dict[str, Any]:
    """What the file then holds."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    order = []
    for factor, value, case in cases(setting):
        name = f"{factor} {value}"
        order.append(name)
        if only not in name or (name in results["rows"] and not again):
            continue
        begun = time.monotonic()
        print(name, end=": ", file=sys.stderr, flush=True)
        found = measure(case)
        results["rows"][name] = {
            "factor": factor,
            "value": value,
            **found,
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "load": os.getloadavg()[0],
        }
        said = found.get("refused") or ", ".join(f"{stored} {times(found, stored):.2f}" for stored in OURS)
        print(f"{said}  ({time.monotonic() - begun:.0f} s)", file=sys.stderr)
        results |= {
            "command": "python benchmarks/growth.py measure",
            "case": setting.case.to_json(),
            "machine": machine(),
            "peak": results.get("peak") or {stored: peak(stored) for stored in OURS},
            "versions": {package: metadata.version(package) for package in ("apache-tvm", "torch", "numpy")},
        }
        rows = results["rows"]
        results["rows"] = {
            one: rows[one] for one in [*order, *(other for other in rows if other not in order)] if one in rows
        }
        write_json(path, results)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=["measure"])
    parser.add_argument("--only", default="", help='rows whose name contains this: "block:4x1 0.9", "width"')
    parser.add_argument("--again", action="store_true", help="measure what is in the file already as well")
    parser.add_argument("--quick", type=Path, metavar="FOLDER", help="a small net, into growth.json of that folder")
    chosen = parser.parse_args()
    try:
        if chosen.quick:
            chosen.quick.mkdir(parents=True, exist_ok=True)
            print(table(run(quick(), chosen.quick / "growth.json", chosen.only, chosen.again)))
            return 0
        if chosen.what:
            run(whole(), FILE, chosen.only, chosen.again)
    except MestError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    results = json.loads(FILE.read_text())
    write_atomically(PICTURE, draw(results))
    write_atomically(DOCUMENT, embed(DOCUMENT.read_text(), table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measures the published figures side by side: `python benchmarks/run.py`, or `make bench`.

Writes benchmarks/results/NAME.json after every case, whole; what is in it already with at least as many rounds is not
measured again, so a run that was stopped goes on where it was. A rival that is not installed is an entry with the
reason and what installs it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mest_compile.base.errors import MestError, NotInstalled, StateError
from mest_compile.base.files import write_json
from mest_compile.measuring.benchmark import compare
from mest_compile.measuring.case import Case
from mest_compile.measuring.rivals import SWAPPED_ABOVE

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMES = ("unstructured", "block:4x1", "pattern", "filter", "channel")
SPARSITIES = (0.8, 0.9, 0.95)
LEAN_BYTES = 135_000_000  # wide ResNet-32, batch 64: met only when a residual block keeps nothing but its input
WIDE, NARROW = Case("resnet32", width=32), Case("resnet32", width=16)


def full() -> Iterator[tuple[Case, str]]:
    """What is published: (case, rival)."""
    for scheme in SCHEMES:
        for sparsity in SPARSITIES:
            yield WIDE.but(scheme=scheme, sparsity=sparsity), "torch"
    yield WIDE.but(scheme="block:4x1", memory_budget=LEAN_BYTES), "torch"
    for net in (NARROW, Case("vgg11")):
        for scheme in SCHEMES:
            yield net.but(scheme=scheme), "torch"
    for scheme in ("unstructured", "block:4x1"):  # a linear layer has no patterns; whole filters of it are neurons
        yield Case("mlp").but(scheme=scheme), "torch"
    for scheme in ("unstructured", "block:4x1"):
        for rival in ("torch", "mest-one-thread"):
            yield WIDE.but(scheme=scheme, threads=2), rival
    for net in (WIDE, NARROW, Case("vgg11")):
        for scheme in SCHEMES:
            yield net.but(scheme=scheme), "mest-untuned"
    for scheme in ("block:4x1", "pattern"):  # tuned on one thread
        yield WIDE.but(scheme=scheme, threads=2), "mest-untuned"
        yield WIDE.but(scheme=scheme), "mest-avx2"
    for net in (NARROW, WIDE):
        for sparsity in SPARSITIES:
            if sparsity > SWAPPED_ABOVE:
                yield net.but(scheme="unstructured", sparsity=sparsity), "sparseprop"
        for rival in ("torch-compile", "onnxruntime-training"):
            yield net.but(scheme="block:4x1"), rival


def quick() -> Iterator[tuple[Case, str]]:
    """That it works, in seconds."""
    yield Case("mlp", (8, 3, 32, 32), width=64).but(scheme="block:4x1"), "torch"
    yield Case("mlp", (8, 3, 32, 32), width=64).but(scheme="unstructured"), "sparseprop"


def key(case: Case, rival: str) -> str:
    width = "" if case.width is None else f" width {case.width}"
    shape = "x".join(map(str, case.input_shape))
    options = case.options
    budget = "" if options.memory_budget is None else f" in {options.memory_budget} bytes"
    return f"{case.model}{width} {shape} {options.scheme} {options.sparsity} threads {case.threads}{budget} vs {rival}"


def is_done(entry: dict[str, Any] | None, case: Case, rounds: int) -> bool:
    """Whether a comparison of this very case with at least as many rounds is there."""
    return bool(entry and len(entry.get("ratios", ())) >= rounds and Case.from_json(entry["case"]) == case)


def measure(case: Case, rival: str, rounds: int) -> dict[str, Any]:
    """`Comparison.to_dict()`, or why there is none."""
    try:
        return compare(case, rival, repeats=rounds).to_dict()
    except NotInstalled as problem:
        return {"case": case.to_json(), "skipped": str(problem)}
    except MestError as problem:
        return {"case": case.to_json(), "failed": str(problem)}


def read(path: Path) -> dict[str, Any]:
    """Entries of an earlier run by key. Raises StateError when the file is damaged."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))["entries"]
    except (ValueError, KeyError, TypeError) as problem:
        raise StateError(f"{path} is no file of results ({problem!r}); move it away") from problem


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--name", help="of the file in the folder of results; default: full or quick")
    parser.add_argument("--quick", action="store_true", help="two tiny cases")
    parser.add_argument(
        "--rounds", type=int, default=9, help="of each case, both sides take a turn in each (default 9)"
    )
    parser.add_argument("--only", default="", help="measure cases whose key contains this")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of results")
    chosen = parser.parse_args(arguments)
    name = chosen.name or ("quick" if chosen.quick else "full")
    path = chosen.folder / f"{name}.json"
    chosen.folder.mkdir(parents=True, exist_ok=True)
    entries = read(path)
    cases = [(case, rival) for case, rival in (quick if chosen.quick else full)() if chosen.only in key(case, rival)]
    for number, (case, rival) in enumerate(cases, 1):
        label = key(case, rival)
        if is_done(entries.get(label), case, chosen.rounds):
            continue
        print(f"[{number}/{len(cases)}] {label}", end=": ", file=sys.stderr, flush=True)
        started = time.monotonic()
        entries[label] = measure(case, rival, chosen.rounds)
        command = shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if arguments is None else arguments)])
        write_json(path, {"name": name, "command": command, "entries": entries})
        found = entries[label]
        said = f"{found['ratio']:.2f}" if "ratio" in found else found.get("skipped") or found["failed"]
        print(f"{said}  ({time.monotonic() - started:.0f} s)", file=sys.stderr)
    print(path)
    return 1 if any("failed" in entries[key(case, rival)] for case, rival in cases) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MestError as error:
        sys.exit(f"error: {error}")

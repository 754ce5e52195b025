"""Time to 92% on Fashion-MNIST, a row a release: `python benchmarks/leaderboard.py`.

Takes the runs that `accuracy.py` has made with the newest release among them, puts their row into
benchmarks/results/leaderboard.json, where those of earlier releases stay, and writes the table in docs/leaderboard.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accuracy
import documents
from packaging.version import Version

from mest_compile.base.errors import MestError, StateError
from mest_compile.base.files import write_atomically, write_json

ROWS = accuracy.RESULTS.with_name("leaderboard.json")
DOCUMENT = accuracy.ROOT / "docs" / "leaderboard.md"
WANTED = 0.92  # test accuracy, after the first epoch that has it


def row(results: Mapping[str, Any]) -> dict[str, Any]:
    """The row of the newest release of which benchmarks/accuracy.py has run dense torch in all seeds, else of the
    newest: its fastest run that comes to WANTED in all seeds, of those whose pace was measured, and dense torch.
    Raises StateError when there is none."""
    if not (pace := results.get("pace")):
        raise StateError("these results have no pace; run python benchmarks/accuracy.py --pace")
    entries, seeds = results["entries"].values(), len(accuracy.SEEDS)
    dense_runs = Counter(_release(entry) for entry in entries if entry["run"]["method"] == "torch")
    release = max(map(_release, entries), key=lambda name: (dense_runs[name] == seeds, Version(name)))
    times: dict[str, list[float | None]] = {}
    for entry in entries:
        if _release(entry) == release and accuracy.paced(entry, pace):
            name = accuracy.Run(**entry["run"]).row
            times.setdefault(name, []).append(accuracy.seconds_to(entry, pace, WANTED))
    dense = times.pop("dense torch", [])
    medians = {name: _median(found) for name, found in times.items() if len(found) == seeds and None not in found}
    if len(dense) != seeds or not medians:
        raise StateError(
            f"release {release} has {len(dense)} of {seeds} seeds of dense torch and {len(medians)} runs that come to "
            f"{WANTED:.0%} in all seeds; run what is missing with python benchmarks/accuracy.py"
        )
    best = min(medians, key=lambda name: medians[name] or 0.0)
    return {
        "release": release,
        "run": best,
        "seconds": medians[best],
        "seeds": seeds,
        "dense_seconds": _median(dense),
        "dense_seeds": sum(found is not None for found in dense),
        "machine": pace["machine"],
        "measured_at": pace["measured_at"],
    }


def _release(entry: Mapping[str, Any]) -> str:
    return entry["versions"]["mest-compile"]


def _median(seconds: list[float | None]) -> float | None:
    """Of those that are there."""
    found = [one for one in seconds if one is not None]
    return statistics.median(found) if found else None


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The markdown between the markers of docs/leaderboard.md, newest release first."""
    lines = [
        "| release | run | minutes to 92% | seeds | dense torch, minutes | its seeds | CPU, one thread | paced on |",
        "|---|---|---:|---:|---:|---:|---|---|",
    ]
    for release in sorted(rows, key=Version, reverse=True):
        one = rows[release]
        dense = "-" if one["dense_seconds"] is None else f"{one['dense_seconds'] / 60:.1f}"
        lines.append(
            f"| {release} | {one['run']} | {one['seconds'] / 60:.1f} | {one['seeds']} of {one['seeds']} | {dense} | "
            f"{one['dense_seeds']} of {one['seeds']} | {one['machine']['cpu']} | {one['measured_at'][:10]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=accuracy.RESULTS, help="what benchmarks/accuracy.py wrote")
    chosen = parser.parse_args()
    new = row(json.loads(chosen.results.read_text(encoding="utf-8")))
    rows = json.loads(ROWS.read_text(encoding="utf-8"))["rows"] if ROWS.exists() else {}
    rows[new.pop("release")] = new
    write_json(ROWS, {"command": "python benchmarks/leaderboard.py", "rows": rows})
    page = documents.embed(DOCUMENT.read_text(encoding="utf-8"), table(rows), "leaderboard")
    write_atomically(DOCUMENT, page)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MestError as error:
        sys.exit(f"error: {error}")

"""The tables of speeds in the README, docs/benchmarks.md and docs/tuning.md, out of the files in benchmarks/results:
`python benchmarks/readme_table.py` puts them between their markers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import documents
import threads

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically
from mest_compile.measuring.table import Row, SpeedTable

ROOT = Path(__file__).resolve().parent.parent
FOLDER, README = ROOT / "benchmarks" / "results", ROOT / "README.md"
OTHERS = {
    "avx2": "AVX2 table",
    "avx512": "AVX-512 table",
}  # the same cases, or some of them, on machines with narrower multipliers
DOCUMENT, TUNING = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "tuning.md"
TUNED = {"tuning": "tuning table", "tuning-zen5": "Zen 5 tuning table"}
embed = partial(documents.embed, what="speed table")
HEADLINE = {
    "model": "resnet32",
    "width": 32,
    "threads": 1,
    "memory_budget": None,
}  # the net, width and threads of the table
NOT_MEASURED = "Not measured yet: `make bench` measures it, `python benchmarks/readme_table.py` writes it here.\n"


def table(results: Mapping[str, Any] | None) -> str:
    """The markdown between the markers, for a file of results that `benchmarks/run.py` wrote, or None."""
    found = speeds(results)
    return NOT_MEASURED if found is None else found.to_markdown()


def speeds(results: Mapping[str, Any] | None) -> SpeedTable | None:
    """The headline net beside dense torch; None where nothing of it was measured."""
    chosen = [
        entry
        for entry in (results or {"entries": {}})["entries"].values()
        if "ratio" in entry and entry["rival"]["name"] == "torch" and HEADLINE.items() <= entry["case"].items()
    ]
    if not chosen:
        return None
    last = max(chosen, key=lambda entry: entry["measured_at"])
    facts = {
        **{name: last["case"][name] for name in ("model", "width", "input_shape", "distribution", "target", "threads")},
        "baseline": "torch",
        "repeats": min(len(entry["ratios"]) for entry in chosen),
        "machine": last["machine"],
        "versions": last["versions"],
        "measured_at": last["measured_at"],
    }
    return SpeedTable(tuple(Row.of(entry) for entry in chosen), facts)


def pairs(results: Mapping[str, Any] | None, headline: bool) -> str:
    """Markdown with a line for every comparison. headline: those in `table` too."""
    lines = [
        "| net | scheme | sparsity | threads | against | times as fast | interval | of its peak memory |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for entry in (results or {"entries": {}})["entries"].values():
        case = entry["case"]
        if "ratio" not in entry or (
            not headline and entry["rival"]["name"] == "torch" and HEADLINE.items() <= case.items()
        ):
            continue
        net = case["model"] + (f", width {case['width']}" if case["width"] else "")
        if case["memory_budget"]:
            net += f", in {case['memory_budget'] / 2**20:.0f} MiB"
        low, high = entry["ratio_interval"][:2]
        memory = entry["ours"]["training_peak_bytes"] / entry["rival"]["training_peak_bytes"]
        lines.append(
            f"| {net} | {case['scheme']} | {case['sparsity']:.0%} | {case['threads']} | {entry['rival']['name']} | "
            f"{entry['ratio']:.2f} | {low:.2f} to {high:.2f} | {memory:.2f} |"
        )
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """{page: its text with the tables in place}. Raises MestError where a marker is missing."""

    def read(name: str) -> Any:
        path = FOLDER / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    full, document = read("full"), DOCUMENT.read_text(encoding="utf-8")
    document = embed(document, pairs(full, headline=False))
    for name, what in OTHERS.items():
        document = documents.embed(document, pairs(read(name), headline=True), what=what)
    document = documents.embed(document, threads.table(read("zen5-threads")), what="threads table")
    tuning = TUNING.read_text(encoding="utf-8")
    for name, what in TUNED.items():
        tuning = documents.embed(tuning, pairs(read(name), headline=True), what=what)
    return {README: embed(README.read_text(encoding="utf-8"), table(full)), DOCUMENT: document, TUNING: tuning}


def main() -> None:
    for path, text in pages().items():
        write_atomically(path, text)


if __name__ == "__main__":
    try:
        main()
    except MestError as error:
        sys.exit(f"error: {error}")

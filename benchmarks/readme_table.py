"""The README's table of speeds, out of benchmarks/results/full.json: `python benchmarks/readme_table.py` puts it between its markers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mest_compile.errors import MestError, StateError
from mest_compile.runfolder import write_atomically
from mest_compile.speedtable import Row, SpeedTable

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "benchmarks" / "results" / "full.json", ROOT / "README.md"
BEGIN, END = "<!-- speed table: begin -->", "<!-- speed table: end -->"
HEADLINE = {"model": "resnet32", "width": 32, "threads": 1, "memory_budget": None}  # the net, width and threads of the table
NOT_MEASURED = "Not measured yet: `make bench` measures it, `python benchmarks/readme_table.py` writes it here.\n"


def table(results: Mapping[str, Any] | None) -> str:
    """The markdown between the markers, for a file of results that `benchmarks/run.py` wrote, or None."""
    chosen = [entry for entry in (results or {"entries": {}})["entries"].values()
              if "ratio" in entry and entry["rival"]["name"] == "torch" and HEADLINE.items() <= entry["case"].items()]
    if not chosen:
        return NOT_MEASURED
    last = max(chosen, key=lambda entry: entry["measured_at"])
    facts = {**{name: last["case"][name] for name in ("model", "width", "input_shape", "distribution", "target", "threads")},
             "baseline": "torch", "repeats": min(len(entry["ratios"]) for entry in chosen), "machine": last["machine"],
             "versions": last["versions"], "measured_at": last["measured_at"]}
    return SpeedTable(tuple(Row.of(entry) for entry in chosen), facts).to_markdown()


def embed(readme: str, text: str) -> str:
    """`readme` with `text` between the markers. Raises StateError when it has none."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise StateError(f"README.md has no {BEGIN} ... {END}; put the two lines where the table belongs")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None
    write_atomically(README, embed(README.read_text(encoding="utf-8"), table(results)))


if __name__ == "__main__":
    try:
        main()
    except MestError as error:
        sys.exit(f"error: {error}")

"""Takes a tuning log into autotune_logs/: `python benchmarks/ship_log.py LOG [--target local]`.

Of every problem it keeps the records of the fastest right knobs and of the defaults, so that readers see the gain, of
steps of every vector width; a shipped log that is there already is joined, and what it holds of other CPU models stays
as it is. What cannot be trusted is left out, as everywhere.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mest_compile.hardware.target import Target, find_target
from mest_compile.records.log import Measure, Record, Records, cpu_of, is_foreign, plain
from mest_compile.records.record import STEP

FOLDER = Path(__file__).resolve().parent.parent / "autotune_logs"


def condensed(target: Target, paths: list[Path]) -> list[Record]:
    """The records worth shipping, problems in order of first appearance."""
    by_key: dict[tuple, list[Record]] = {}
    for path in paths:
        for record in _records(path):
            if _trusted(record, target):
                by_key.setdefault((*record.key, record.target["vector"], record.cpu), []).append(record)
    kept: list[str] = []
    for records in by_key.values():
        trials = Records(target)
        for record in records:
            trials.add(record)
        first = records[0]
        ranking = trials.trials(first.kernel, first.problem, first.live, cpu=first.cpu).ranking()
        if ranking:
            wanted = ({}, plain(ranking[0][1]))
            kept += dict.fromkeys(
                record.to_line() for record in records if first.kernel == STEP or plain(record.knobs) in wanted
            )
    return [Record.from_line(line) for line in kept]


def elsewhere(target: Target, path: Path) -> list[Record]:
    """The shipped records of other machines than this one; none where the target is not this machine: then `condensed`
    has those of all."""
    here = cpu_of(target)
    return [record for record in _records(path) if here and record.cpu != here]


def _records(path: Path) -> Iterator[Record]:
    """Those of a log, if there is one, that are whole and unchanged."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            yield Record.from_line(line)


def _trusted(record: Record, target: Target) -> bool:
    """Whether it was measured here, or for a target that is not this machine on any, with vectors of any width."""
    wide = replace(target, vector=record.target.get("vector", target.vector))
    return record.measure is Measure.MEASURED and not is_foreign(record, wide)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("log", type=Path, nargs="+")
    parser.add_argument("--target", default="local")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    chosen = parser.parse_args(arguments)
    target = find_target(chosen.target)
    path = chosen.folder / f"{target.name}.jsonl"
    records = elsewhere(target, path) + condensed(target, [path, *chosen.log])
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(record.to_line() + "\n" for record in records), encoding="utf-8")
    os.replace(temporary, path)
    print(f"{path}: {len(records)} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A folder of a table: its rows as they finish, from which a table that was stopped goes on, and the table so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mest_compile.base.errors import StateError, UsageError
from mest_compile.base.files import write_atomically
from mest_compile.measuring.table import Row, SpeedTable

ROWS = "rows.jsonl"


class KeptRows:
    """rows.jsonl: what is measured in the first line, then a line for each row that was. The file is written whole with
    every row, so that none is torn.

    asked  what decides the rows, ready for JSON
    Raises UsageError where the folder holds another table or cannot be written, StateError where rows.jsonl is damaged.
    """

    def __init__(self, folder: str | Path, asked: Mapping[str, Any]):
        self.folder, self._asked = Path(folder), dict(asked)
        self.rows: dict[tuple[str, float], Row] = {}
        self.facts: dict[str, Any] = {}
        path = self.folder / ROWS
        if not path.exists():
            return
        try:
            before, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            rows = [(Row(**line["row"]), dict(line["facts"])) for line in lines]
        except (OSError, ValueError, TypeError, KeyError) as problem:
            raise StateError(f"{path} is damaged ({problem}); remove it to measure its rows again") from problem
        if other := [name for name in self._asked if before.get(name) != json.loads(json.dumps(self._asked[name]))]:
            name = other[0]
            raise UsageError(
                f"{self.folder} holds a table whose {name} is {before.get(name)!r}, not {self._asked[name]!r}: rows of "
                "two do not compare; give another folder"
            )
        for row, facts in rows:
            self.rows[row.scheme, row.sparsity], self.facts = row, facts

    def add(self, row: Row, facts: Mapping[str, Any]) -> None:
        """facts: of the machine, and when."""
        self.rows[row.scheme, row.sparsity], self.facts = row, dict(facts)
        lines = [self._asked, *({"row": one.to_dict(), "facts": self.facts} for one in self.rows.values())]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / ROWS, "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines))
        except OSError as problem:
            raise UsageError(f"{self.folder} cannot be written: {problem.strerror}; give another folder") from problem

    def show(self, table: SpeedTable) -> None:
        """Writes the table so far as table.html, table.csv and table.json."""
        table.to_html(self.folder / "table.html")
        table.to_csv(self.folder / "table.csv")
        table.to_json(self.folder / "table.json")

"""The files of a run: what was asked for, where it ran, what came out. Every file is replaced whole, so a crash leaves the old one."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from mest_compile.errors import StateError, UsageError


class RunFolder:
    """Names and formats of a run's files.

    recipe.json  run.json (seed, data, step, machine, versions)  metrics.jsonl (one line an epoch)
    checkpoint.safetensors (after the last whole epoch)  best.safetensors (best test accuracy among models at their target sparsity)
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.recipe = self.path / "recipe.json"
        self.run = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.best = self.path / "best.safetensors"

    def require_free(self) -> None:
        """Raises UsageError when the folder already holds a run; writes nothing."""
        for file in (self.recipe, self.run, self.metrics, self.checkpoint, self.best):
            if file.exists():
                raise UsageError(f"{self.path} already holds a run ({file.name}); pass --resume or another --out")

    def begin(self, recipe: dict[str, Any], run: dict[str, Any]) -> None:
        """Makes the folder and writes what is known before the first epoch. Raises UsageError when it holds a run or cannot be written."""
        self.require_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.recipe, recipe)
            write_json(self.run, run)
            write_atomically(self.metrics, "")
        except OSError as problem:
            raise UsageError(f"cannot write the run to {self.path}: {problem.strerror}; pass another --out") from problem

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")

    def rewrite_metrics(self, history: list[dict[str, Any]]) -> None:
        """Makes metrics.jsonl hold exactly these epochs: what a stopped run wrote after its last checkpoint goes."""
        write_atomically(self.metrics, "".join(json.dumps(metrics, allow_nan=False) + "\n" for metrics in history))

    def read_recipe(self) -> dict[str, Any]:
        """Raises StateError when the folder holds no run that can be resumed."""
        if not self.checkpoint.is_file() or not self.recipe.is_file():
            raise StateError(f"{self.path} holds no run to resume: recipe.json and checkpoint.safetensors are needed")
        try:
            return json.loads(self.recipe.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise StateError(f"{self.recipe} is damaged: {problem}") from problem


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def machine() -> dict[str, Any]:
    """Where this process runs."""
    return {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}

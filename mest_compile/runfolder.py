"""The files of a run: what was asked for, where it ran, what came out. Every file is replaced whole, so a crash leaves the old one."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mest_compile.errors import StateError, UsageError


class RunFolder:
    """Names and formats of a run's files.

    source.json (where data and device are from)  recipe.json  run.json (seed, data, step, machine, versions)
    metrics.jsonl (one line an epoch)
    checkpoint.safetensors (after the last whole epoch)  checkpoint.previous.safetensors (the one before, should that one be damaged)
    best.safetensors (best test accuracy among models at their target sparsity)
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.recipe = self.path / "recipe.json"
        self.run = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.source = self.path / "source.json"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.previous = self.path / "checkpoint.previous.safetensors"
        self.best = self.path / "best.safetensors"

    def require_free(self) -> None:
        """Raises UsageError when the folder already holds a run or cannot be written; writes nothing."""
        for file in (self.recipe, self.run, self.metrics, self.checkpoint, self.best):
            if file.exists():
                raise UsageError(f"{self.path} already holds a run ({file.name}); pass --resume or another --out")
        there = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise UsageError(f"cannot write the run to {self.path}: {there} is no folder that can be written; pass another --out")

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

    def write_source(self, source: dict[str, Any]) -> None:
        """Where the data and the device of a run that is about to begin are from. Raises StateError."""
        with _told(self.source):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.source, source)

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Raises StateError when the disk is full or the folder cannot be written."""
        with _told(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")

    def rewrite_metrics(self, history: list[dict[str, Any]]) -> None:
        """Makes metrics.jsonl hold exactly these epochs: what a stopped run wrote after its last checkpoint goes. Raises StateError."""
        with _told(self.metrics):
            write_atomically(self.metrics, "".join(json.dumps(metrics, allow_nan=False) + "\n" for metrics in history))

    def remove_torn(self) -> None:
        """Removes what writers that were killed left behind: files that never got their name. Raises StateError."""
        with _told(self.path):
            for file in (self.source, self.recipe, self.run, self.metrics, self.checkpoint, self.previous, self.best):
                for torn in self.path.glob(f".{file.name}.*"):
                    torn.unlink()

    def keep_previous(self) -> None:
        """Gives the checkpoint its second name, before another takes its place. Raises StateError."""
        with _told(self.previous):
            _name(self.checkpoint, self.previous)

    def return_to_previous(self) -> None:
        """Puts the checkpoint before the last in the place of the last. Raises StateError."""
        with _told(self.checkpoint):
            _name(self.previous, self.checkpoint)

    def read_recipe(self) -> dict[str, Any]:
        """Raises StateError when the folder holds no run, or a damaged one."""
        return self._read(self.recipe)

    def read_run(self) -> dict[str, Any]:
        """What run.json says. Raises StateError when the folder holds no run, or a damaged one."""
        return self._read(self.run)

    def read_metrics(self) -> list[dict[str, Any]]:
        """One dict an epoch; a last line that a stopped run did not finish is left out. Raises StateError."""
        try:
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except OSError as problem:
            raise StateError(f"{self.path} holds no run: {self.metrics.name} cannot be read ({problem.strerror})") from problem
        except ValueError as problem:
            raise StateError(f"{self.metrics} is damaged: {problem}") from problem

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError as problem:
            raise StateError(f"{self.path} holds no run: {path.name} cannot be read ({problem.strerror}); "
                             f"give the folder of an earlier train") from problem
        except ValueError as problem:
            raise StateError(f"{path} is damaged: {problem}") from problem


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Raises StateError for what the system says against writing `path`."""
    try:
        yield
    except OSError as problem:
        raise StateError(f"{path} cannot be written: {problem.strerror}; what the run had written is intact, make room or mend the "
                         f"folder's rights and go on with --resume") from problem


def _name(path: Path, name: Path) -> None:
    """Makes `name` a second name of the file, whatever it named before. There is no moment without either."""
    part = name.with_name(f".{name.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # a file system without hard links, as on memory cards
        shutil.copyfile(path, part)
    os.replace(part, name)
    part.unlink(missing_ok=True)  # renaming one name of a file to another of the same file does nothing


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

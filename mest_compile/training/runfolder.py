"""The files of a run: what was asked for, where it ran, what came out. Every file is replaced whole, so a crash leaves
the old one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mest_compile.base.errors import StateError, UsageError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.hardware import host
from mest_compile.models.sources import CHECKPOINTS


class RunFolder:
    """Names and formats of a run's files.

    source.json (where data and device are from)  recipe.json  run.json (seed, data, step, machine, versions)
    metrics.jsonl (one line an epoch)
    verdict.json (what every class was called when it was last tested)
    dense.json (its step beside a dense one, where that was asked for)
    diverged.json (what was no longer finite, and after how many whole epochs, where that ended the run)
    checkpoint.safetensors (after the last whole epoch)  checkpoint.previous.safetensors (the one before, should that
                                                         one be damaged)
    best.safetensors (best accuracy on the validation or else the test part, or other metric of the loss, among
                       models at their target sparsity)
    lock (held by who trains)
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.recipe = self.path / "recipe.json"
        self.run = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.verdict = self.path / "verdict.json"
        self.dense = self.path / "dense.json"
        self.diverged = self.path / "diverged.json"
        self.source = self.path / "source.json"
        self.checkpoint = self.path / CHECKPOINTS[0]
        self.previous = self.path / "checkpoint.previous.safetensors"
        self.best = self.path / "best.safetensors"

    @property
    def _facts(self) -> tuple[Path, ...]:
        return self.source, self.recipe, self.run, self.metrics, self.verdict, self.dense, self.diverged

    def require_free(self) -> None:
        """Raises UsageError when the folder already holds a run or cannot be written; writes nothing.

        What a run left that ended before its first checkpoint is no run: nothing of it can be gone on from.
        """
        with self._refused():
            for file in (self.checkpoint, self.previous, self.best, self.metrics):
                if file.exists() and (file != self.metrics or file.stat().st_size):
                    raise UsageError(f"{self.path} already holds a run ({file.name}); pass --resume or another --out")
            there = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise UsageError(
                f"cannot write the run to {self.path}: {there} is no folder that can be written; pass another --out"
            )

    def make(self) -> None:
        """Makes the folder where it is not. Raises UsageError."""
        with self._refused():
            self.path.mkdir(parents=True, exist_ok=True)

    def begin(self, recipe: dict[str, Any], run: dict[str, Any], source: dict[str, Any] | None = None) -> None:
        """Writes what is known before the first epoch. Raises UsageError when the folder holds a run or cannot be
        written.

        source  where the data and the device are from, for `mest-compile train --resume`
        """
        self.require_free()
        self.remove_torn()
        with self._refused():
            write_atomically(self.metrics, "")
            self.verdict.unlink(missing_ok=True)
            write_json(self.recipe, recipe)
            write_json(self.run, run | {"digest": _digest(recipe, run)})
            if source is not None:
                write_json(self.source, source)
            else:
                self.source.unlink(missing_ok=True)

    def lock(self) -> host.Lock:
        """The right to train in the folder, which ends with the process at the latest. Raises StateError when somebody
        else has it."""
        with _told(self.path):
            lock = host.exclusive(self.path / "lock")
        if lock is None:
            raise StateError(
                f"{self.path}: another training is at work in this folder; let it end or stop it, or pass another --out"
            )
        return lock

    def stamp(self) -> tuple[int, int] | None:
        """Changes whenever a checkpoint is written; None: there is none."""
        try:
            facts = self.checkpoint.stat()
        except OSError:
            return None
        return facts.st_ino, facts.st_mtime_ns

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Raises StateError when the disk is full or the folder cannot be written."""
        with _told(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")

    def write_verdict(self, verdict: Mapping[str, Any]) -> None:
        """Raises StateError."""
        with _told(self.verdict):
            write_json(self.verdict, dict(verdict))

    def write_diverged(self, what: str, epochs: int) -> None:
        """epochs: whole ones before. Raises StateError."""
        with _told(self.diverged):
            write_json(self.diverged, {"what": what, "epochs": epochs})

    def read_diverged(self) -> dict[str, Any] | None:
        """None where the run has not ended so. Raises StateError where it is damaged."""
        return _read(self.diverged) if self.diverged.is_file() else None

    def read_verdict(self) -> dict[str, Any] | None:
        """None where there is none. Raises StateError where it is damaged."""
        return _read(self.verdict) if self.verdict.is_file() else None

    def read_dense(self) -> dict[str, Any] | None:
        """None where there is none. Raises StateError where it is damaged."""
        return _read(self.dense) if self.dense.is_file() else None

    def rewrite_metrics(self, history: list[dict[str, Any]]) -> None:
        """Makes metrics.jsonl hold exactly these epochs: what a stopped run wrote after its last checkpoint goes.
        Raises StateError."""
        with _told(self.metrics):
            write_atomically(self.metrics, "".join(json.dumps(metrics, allow_nan=False) + "\n" for metrics in history))

    def remove_torn(self) -> None:
        """Removes what a run that goes on leaves behind: how it diverged, and files of killed writers, which never got
        their name. Raises StateError."""
        with _told(self.path):
            self.diverged.unlink(missing_ok=True)
            for file in (*self._facts, self.checkpoint, self.previous, self.best):
                for torn in self.path.glob(f".{file.name}.*"):
                    torn.unlink()

    def keep_previous(self) -> None:
        """Gives the checkpoint its second name, before another takes its place. Raises StateError."""
        with _told(self.previous):
            _name(self.checkpoint, self.previous)

    def keep_best(self) -> None:
        """Gives the best model, which is the last one, the checkpoint's name too. Raises StateError."""
        with _told(self.checkpoint):
            _name(self.best, self.checkpoint)

    def return_to_previous(self) -> None:
        """Puts the checkpoint before the last in the place of the last. Raises StateError."""
        with _told(self.checkpoint):
            _name(self.previous, self.checkpoint)

    def read_recipe(self) -> dict[str, Any]:
        """Raises StateError when the folder holds no run, or a damaged one."""
        return _read(self.recipe)

    def read_facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(recipe, run) as they were written. Raises StateError when the folder holds no run, or one that was changed
        since."""
        recipe, run = _read(self.recipe), _read(self.run)
        if run.pop("digest", None) != _digest(recipe, run):
            raise StateError(
                f"{self.run} and {self.recipe.name} are not what was written: one is damaged, edited or of an "
                "older version; "
                f"take them from a copy of the run"
            )
        return recipe, run

    def read_source(self) -> dict[str, Any]:
        """{"data", "data_folder", ...}: what `begin` was given. Raises StateError where it is missing or damaged."""
        if self.recipe.is_file() and not self.source.exists():
            raise StateError(
                f"{self.path} holds a run without {self.source.name}: go on with --artifact and --data where it "
                "was begun "
                f"from an artifact, with mest.Trainer.resume where in Python"
            )
        source = _read(self.source)
        texts = [
            source.get("data"),
            *(source.get(key, "") for key in ("tracker", "key", "teacher")),
            source.get("data_folder", "") or "",
        ]
        flags = [source.get(key, False) for key in ("specialize", "numbers")]
        numbers = [source.get("val_split", 0.0), source.get("seed", 0), *source.get("resize", ())]
        kinds = ((str, texts), (bool, flags), (int | float, numbers))
        if not all(isinstance(one, kind) for kind, found in kinds for one in found):  # type: ignore[arg-type]
            raise StateError(f"{self.source} is damaged: it holds the keys data and data_folder, each a text")
        return source

    def read_metrics(self) -> list[dict[str, Any]]:
        """One dict an epoch; a last line that a stopped run did not finish is left out. Raises StateError."""
        lines = _text(self.metrics).split("\n")
        return [_table(line, self.metrics) for line in lines[:-1]]

    @contextmanager
    def _refused(self) -> Iterator[None]:
        """Raises UsageError for what the system says against a run in this folder."""
        try:
            yield
        except (OSError, ValueError) as problem:  # ValueError: a name that no file can have
            said = getattr(problem, "strerror", problem)
            raise UsageError(f"cannot write the run to {self.path}: {said}; pass another --out") from problem


def _read(path: Path) -> dict[str, Any]:
    return _table(_text(path), path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise StateError(f"{path} is damaged: {problem}") from problem
    except (OSError, ValueError) as problem:
        raise StateError(
            f"{path.parent} holds no run: {path.name} cannot be read ({getattr(problem, 'strerror', problem)}); "
            f"give the folder of an earlier train"
        ) from problem


def _table(text: str, path: Path) -> dict[str, Any]:
    """The JSON table in a text of the file `path`."""
    try:
        found = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as problem:
        raise StateError(f"{path} is damaged: {problem}") from problem
    if not isinstance(found, dict):
        raise StateError(f"{path} is damaged: it holds no table")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _digest(recipe: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps([recipe, run], sort_keys=True).encode(), digest_size=16).hexdigest()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Raises StateError for what the system says against writing `path`."""
    try:
        yield
    except OSError as problem:
        raise StateError(
            f"{path} cannot be written: {problem.strerror}; what the run had written is intact, make room or mend the "
            f"folder's rights and go on with --resume"
        ) from problem


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


def machine() -> dict[str, Any]:
    """Where this process runs."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load": host.load_average(),
    }

"""One training of a sweep: its settings, the folder that its content names, and how far it has come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from mest_compile.base import plugins
from mest_compile.base.errors import MestError, UsageError
from mest_compile.data import load
from mest_compile.models.sources import checkpoint_in
from mest_compile.options import StepOptions, find_loss, find_optimizer
from mest_compile.training.recipe import Recipe
from mest_compile.training.recovery import kept
from mest_compile.training.runfolder import RunFolder
from mest_compile.training.tables import read_run_options

USUAL_BATCH, THREADS = 64, 1
OF_STEP = {field.name for field in fields(StepOptions)}
WHERE = ("weights", "data_folder")  # options that say where files are: their content is what counts


@dataclass(frozen=True, slots=True)
class Facts:
    """What a cell's data are.

    described  JSON-able, with digests
    shape      of an example
    has_val    whether a validation part comes with them
    """

    described: Mapping[str, Any]
    shape: tuple[int, ...]
    outputs: int
    image_bytes: int
    has_val: bool


@lru_cache
def data_facts(name: str, folder: str | None, resize: tuple[int, int] | None, numbers: bool) -> Facts:
    split = load(name, folder, numbers, resize)
    parts = {"train": split.train, "test": split.known_test, "val": split.val}
    there = {part: data for part, data in parts.items() if data is not None}
    return Facts(
        {part: data.describe() for part, data in there.items()},
        tuple(split.train.images.shape[1:]),
        split.train.outputs,
        sum(data.images.nbytes for data in there.values()),
        split.val is not None,
    )


@dataclass(frozen=True, slots=True)
class State:
    """How far a cell has come, by its last whole checkpoint.

    history   metrics of its whole epochs
    diverged  what was no longer finite; None: all is
    begun     whether there is a checkpoint to go on from
    """

    history: tuple[dict[str, Any], ...] = ()
    diverged: str | None = None
    begun: bool = False
    patience_is_out: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """settings  a whole recipe's table with its table [run]: what `mest-compile train --recipe` takes
    varied    of them, what is not the same in all cells
    key       digest of all that decides the outcome: resolved recipe, options of the step, model, data, plug-ins
    """

    settings: Mapping[str, Any]
    varied: Mapping[str, Any]
    recipe: Recipe
    options: StepOptions
    data: Facts
    key: str
    folder: Path

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "run")

    @property
    def recipe_file(self) -> Path:
        return self.folder / "cell.toml"

    @property
    def log(self) -> Path:
        """What its commands wrote."""
        return self.folder / "log.txt"

    @property
    def resize(self) -> tuple[int, int] | None:
        """(height, width) that images are cut and resized to."""
        return _sizes(self.settings["run"].get("resize"))

    @property
    def has_val(self) -> bool:
        return self.data.has_val or bool(self.settings["run"].get("val_split"))

    @property
    def threads(self) -> int:
        return self.options.threads or THREADS

    def state(self) -> State:
        """Raises StateError where its checkpoints are damaged."""
        found = kept(self.run)
        ended = self.run.read_diverged()
        diverged = None if ended is None else str(ended["what"])
        if found is None:
            return State(diverged=diverged)
        history, best = tuple(found["history"]), found["best"]
        patience = self.recipe.patience is not None and _gone(history, best, self.recipe.patience)
        return State(history, diverged, True, patience)

    def note_command(self, epochs: int, seconds: float) -> None:
        """Adds a command to what is known of its commands: the epochs that it trained, and all of its time."""
        with (self.folder / "commands.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epochs": epochs, "seconds": seconds}) + "\n")

    def commands(self) -> list[dict[str, float]]:
        """What `note_command` has noted; a last line that was not finished is left out."""
        file = self.folder / "commands.jsonl"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def command(self, until: int, begun: bool) -> list[str]:
        """Arguments of `mest-compile` that train it to the end of an epoch."""
        how = ["--resume", str(self.run.path)] if begun else ["--recipe", str(self.recipe_file)]
        how += [] if begun else ["--out", str(self.run.path)]
        return ["train", *how, *([] if until >= self.recipe.epochs else ["--until", str(until)])]


def _gone(history: tuple[dict[str, Any], ...], best: Any, patience: int) -> bool:
    from mest_compile.training.run import Run

    return Run(Recipe(epochs=1), list(history), best).gone(patience)


def make_cell(settings: Mapping[str, Any], varied: Mapping[str, Any], root: Path) -> Cell:
    """Checked as far as that goes without compiling; raises what is wrong with its settings, as a UsageError that says
    which cell's. DataError where its data cannot be read."""
    said = ", ".join(f"{key} = {value}" for key, value in varied.items()) or "the sweep"
    run = read_run_options(settings.get("run", {}), said)
    if missing := [key for key in ("model", "data") if key not in run]:
        raise UsageError(
            f'{said}: the table [run] has no {missing[0]}; wanted [run] with model = "..." and data = "..."'
        )
    settings = {**settings, "run": {**run, "threads": run.get("threads", THREADS)}}
    try:
        recipe = Recipe.from_dict({key: value for key, value in settings.items() if key != "run"}, said)
        options = recipe.step_options(_options(settings["run"]))
        resolved = _resolved(recipe, options)
        resize = _sizes(run.get("resize"))
    except UsageError as problem:
        raise problem if str(problem).startswith(said) else UsageError(f"{said}: {problem}") from problem
    data = data_facts(run["data"], run.get("data_folder"), resize, options.loss.takes_numbers)
    content: dict[str, Any] = {
        "recipe": {"epochs": resolved.epochs, **_unusual(resolved.to_dict(), Recipe(resolved.epochs).to_dict())},
        "options": _unusual(options.to_json(), StepOptions().to_json()),
        "run": {key: value for key, value in run.items() if key not in OF_STEP and key not in WHERE},
        "batch": run.get("batch", USUAL_BATCH),
        "files": [_digest_of(run["model"]), _digest_of(run.get("weights"))],
        "data": data.described,
    }
    if plug_ins := sorted(str(_digest_of(str(file))) for file in plugins.given()):
        content["plug_ins"] = plug_ins
    text = json.dumps(content, sort_keys=True)
    key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return Cell(settings, varied, recipe, options, data, key, root / "cells" / key)


def _unusual(said: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """What is not as usual: an option that a later version has more changes no key."""
    return {key: value for key, value in said.items() if value != usual[key]}


def _options(run: Mapping[str, Any]) -> StepOptions:
    """As `mest-compile train` reads the table [run]."""
    said = {key: value for key, value in run.items() if key in OF_STEP}
    said["loss"] = find_loss(said.get("loss", "cross_entropy"))
    return StepOptions(**{**said, "optimizer": find_optimizer(said.get("optimizer"))})


def _resolved(recipe: Recipe, options: StepOptions) -> Recipe:
    """With what the recipe leaves open, where that does not take the model's layers to know."""
    overall = options.one_sparsity
    return recipe if overall is None else recipe.resolved(overall, options.optimizer.lr)


def _sizes(said: str | None) -> tuple[int, int] | None:
    parts = [] if said is None else [int(part) for part in said.split("x") if part.isdecimal()]
    if said is None:
        return None
    if len(parts) not in (1, 2):
        raise UsageError(f"resize is {said!r}; wanted height x width, such as 32x48")
    return parts[0], parts[-1]


def _digest_of(name: str | None) -> str | None:
    """Of the file that a model's name means, or the checkpoint of a folder; None: it is no file's."""
    path = Path(str(name).partition(".py:")[0] + ".py" if name and ".py:" in name else name or "")
    file = path if path.is_file() else checkpoint_in(path) if name else None
    if file is None:
        return None
    try:
        return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    except OSError as problem:
        raise MestError(f"{file} cannot be read: {problem.strerror}") from problem

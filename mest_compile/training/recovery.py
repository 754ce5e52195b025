"""Going on from a checkpoint: after a stop, after the loss of a device, for longer than the run was begun for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import DeviceLost, StateError, UsageError
from mest_compile.runtime import checkpoint
from mest_compile.runtime.saving import rest_of
from mest_compile.training.recipe import Recipe
from mest_compile.training.runfolder import RunFolder

log = logging.getLogger(__name__)

Restored = tuple[Any, dict[str, Any], dict[str, np.ndarray]]  # step, and the extra and arrays of its checkpoint
MOST_LOSSES = 4  # devices that may be lost without a whole epoch in between


@dataclass(frozen=True, slots=True)
class Resumed:
    """A run that goes on from its checkpoint.

    step, extra, arrays  the checkpoint's
    stamp      of its folder by then
    begun      the recipe that the run was begun by
    continued  {"after_epoch", "epochs", "batch", "target"} each time that it was asked to go on otherwise: whole epochs
               by then, epochs of the whole run from then on, examples of a step, and the target's name
    otherwise  whether it was just asked to
    """

    step: Any
    extra: dict[str, Any]
    arrays: dict[str, np.ndarray]
    stamp: tuple[int, int] | None
    begun: Recipe
    continued: list[dict[str, Any]]
    otherwise: bool

    @property
    def recipe(self) -> Recipe:
        """By which it goes on."""
        return self.begun.longer(self.continued[-1]["epochs"]) if self.continued else self.begun


def resumed(folder: RunFolder, step: Any, device: Any, epochs: int | None, batch: int | None, target: Any) -> Resumed:
    """The run in `folder`; the arguments are `Trainer.resume`'s. Raises as that does."""
    recipe = _begun(folder.read_recipe(), folder.recipe)
    if folder.stamp() is None and not folder.previous.exists():
        raise StateError(
            f"no checkpoint in {folder.path}: the run ended before its first one; start it there again, with --out"
        )
    changed = [name for name, value in (("batch", batch), ("target", target)) if value is not None]
    if step is not None and changed:
        raise UsageError(f"the step that is given has its {changed[0]} already; leave one of the two out")

    def restore(path: Path) -> Restored:
        if step is not None:
            return step, *step.restore(path)
        from mest_compile import opening

        given = {"device": device, "batch": batch, "target": target}
        given = {name: value for name, value in given.items() if value is not None}
        if epochs is None and not changed:
            loaded = opening.load(path, **given)
            return loaded, *loaded.restore(path)
        _, _, extra, arrays = rest_of(*checkpoint.read(path), path)
        _epochs(recipe, extra, epochs, changed)  # before anything is compiled
        return opening.load(path, **given), extra, arrays

    with folder.lock():
        found, extra, arrays = restored(folder, restore)
        stamp = folder.stamp()
    if _begun(extra["recipe"], folder.checkpoint) != recipe:
        raise StateError(
            f"{folder.recipe} is not what the checkpoint was trained by; undo the edit or start a run in another --out"
        )
    continued, otherwise = list(extra.get("continued", ())), epochs is not None or bool(changed)
    if otherwise:
        continued.append(
            {
                "after_epoch": len(extra["history"]),
                "epochs": _epochs(recipe, extra, epochs, changed),
                "batch": found.batch,
                "target": found.describe()["target"],
            }
        )
    return Resumed(found, extra, arrays, stamp, recipe, continued, otherwise)


def _begun(document: Mapping[str, Any], where: Path) -> Recipe:
    """The recipe by which a run was begun. One that does not say so left the last examples out: it had no choice."""
    if isinstance(document, Mapping):
        document = {"drop_last": True, **document}
    return Recipe.from_dict(document, where=str(where))


def _epochs(begun: Recipe, extra: Mapping[str, Any], asked: int | None, changed: Sequence[str]) -> int:
    """Epochs that the run is to have from now on. Raises UsageError where there would be nothing left to train."""
    continued, done = extra.get("continued"), len(extra["history"])
    have = continued[-1]["epochs"] if continued else begun.epochs
    if asked is not None and (asked := checks.whole("epochs", asked, 1)) <= have:
        raise UsageError(f"the run has {have} epochs, of which {done} are made; wanted more of them, not {asked}")
    if asked is None and changed and done >= have:
        raise UsageError(f"the run has made all of its {have} epochs; give epochs beside {changed[0]}, more than that")
    return have if asked is None else asked


def restored(folder: RunFolder, restore: Callable[[Path], Restored]) -> Restored:
    """What `restore` makes of the last whole checkpoint."""
    try:
        return restore(folder.checkpoint)
    except StateError as problem:
        if not folder.previous.is_file():
            raise
        found = restore(folder.previous)
        log.warning("%s; the run goes on from the one before it", problem)
        folder.return_to_previous()
        return found


def kept(folder: RunFolder) -> dict[str, Any] | None:
    """What the last whole checkpoint says of the run; None: there is none yet. Writes nothing. Raises StateError where
    all are damaged."""
    files = [file for file in (folder.checkpoint, folder.previous) if file.is_file()]
    for file in files:
        try:
            return dict(checkpoint.read(file)[1]["extra"])
        except StateError:
            if file == files[-1]:
                raise
    return None


def why_lost(problem: DeviceLost, losses: Sequence[bool]) -> str:
    """Why a run ends with the last of `losses`, each of them whether the device had the step by then."""
    whose = (
        "and every one had been given the step: it is not the link, but the step's kernels, the devices' driver "
        "or their memory"
        if all(losses)
        else "and not every one had been given the step by then: look at the link and at the devices"
    )
    return (
        f"{problem}. {len(losses)} were lost without a whole epoch in between, {whose}. The last whole "
        "epoch's checkpoint is intact"
    )

"""Going on after a loss: of a device, or of the last checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import DeviceLost, StateError
from mest_compile.training.runfolder import RunFolder

log = logging.getLogger(__name__)

MOST_LOSSES = 4  # devices that may be lost without a whole epoch in between


def restored(folder: RunFolder, step: Any, device: Any = None) -> tuple[Any, dict[str, Any], dict[str, np.ndarray]]:
    """(step, extra, arrays) of the last whole checkpoint."""

    def restore(path: Path) -> tuple[Any, dict[str, Any], dict[str, np.ndarray]]:
        if step is not None:
            return step, *step.restore(path)
        from mest_compile.opening import load

        loaded = load(path) if device is None else load(path, device=device)
        return loaded, *loaded.restore(path)

    try:
        return restore(folder.checkpoint)
    except StateError as problem:
        if not folder.previous.is_file():
            raise
        found = restore(folder.previous)
        log.warning("%s; the run goes on from the one before it", problem)
        folder.return_to_previous()
        return found


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

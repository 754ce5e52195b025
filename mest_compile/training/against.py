"""A run's step beside the same step with all weights alive, in turns, on this machine."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base.files import write_json
from mest_compile.hardware import host
from mest_compile.training.runfolder import RunFolder

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep

ROUND_SECONDS = 0.1  # of each side in a round, at least: single short steps vary by what else the machine does


def against_dense(path: str | Path, rounds: int = 9) -> dict[str, Any]:
    """Times the step of a run's last checkpoint and its dense twin, which is untuned, on noise; writes what it found,
    ready for JSON, into the run's dense.json and returns it.

    step_seconds, dense_seconds  medians of the rounds; speedup, low, high, confidence: of the rounds' ratios
    planned_bytes, dense_planned_bytes, others_cores (that other processes used meanwhile)
    Raises StateError, TargetError and UsageError where the run's step is not one of this machine.
    """
    from mest_compile.measuring.benchmark import median_interval
    from mest_compile.measuring.machine import Others
    from mest_compile.opening import load

    folder = RunFolder(path)
    step = load(folder.path)
    twin = step.dense_twin()
    took: dict[str, list[float]] = {"step": [], "dense": []}
    sides = {"step": step, "dense": twin}
    try:
        batch = _noise(step)
        steps = {name: ceil(ROUND_SECONDS / _seconds(side, batch, 3)) for name, side in sides.items()}
        others = Others()
        for number in range(rounds):
            for name in sorted(sides, reverse=number % 2 == 0):
                took[name].append(_seconds(sides[name], batch, steps[name]))
        busy = others.cores()
        low, high, confidence = median_interval(ratios := [b / a for a, b in zip(took["step"], took["dense"])])
        found = {
            "step_seconds": median(took["step"]),
            "dense_seconds": median(took["dense"]),
            "speedup": median(ratios),
            "low": low,
            "high": high,
            "confidence": confidence,
            "rounds": rounds,
            "planned_bytes": step.memory()["total"],
            "dense_planned_bytes": twin.memory()["total"],
            "others_cores": busy,
        }
    finally:
        for side in sides.values():
            side.close()
    write_json(folder.dense, found)
    return found


def told(found: dict[str, Any]) -> str:
    """What `against_dense` found, in a line."""
    busy = "; busy: times do not compare" if found["others_cores"] > host.BUSY else ""
    planned, dense = (found[name] / 2**20 for name in ("planned_bytes", "dense_planned_bytes"))
    ours, theirs = (f"{found[name] * 1e3:.2f}" for name in ("step_seconds", "dense_seconds"))
    return (
        f"{ours} ms against {theirs}: {found['speedup']:.2f} times as fast ({found['confidence']:.0%} interval of "
        f"{found['rounds']} rounds: {found['low']:.2f} to {found['high']:.2f}), {planned:.1f} MiB against "
        f"{dense:.1f}{busy}"
    )


def _noise(step: TrainStep) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.standard_normal(step.input_shape, dtype=np.float32)
    if step.loss.takes_numbers:
        return images, np.zeros(step.output_shape, np.float32)
    return images, rng.integers(0, step.classes, (step.batch, *step.output_shape[2:]))


def _seconds(side: TrainStep, batch: tuple[np.ndarray, np.ndarray], steps: int) -> float:
    """Median of so many steps, which change nothing of the weights."""
    found = []
    for _ in range(steps):
        began = perf_counter()
        side(*batch, lr=0.0)
        found.append(perf_counter() - began)
    return median(found)

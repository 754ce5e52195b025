"""Holds a step's arrays where its programs cannot run: what is compiled for another machine can be saved and exported,
not run."""

from __future__ import annotations

import numpy as np

from mest_compile.base.errors import DeviceError


class StoreRunner:
    """Arrays by name in this process. target: name of what the step is compiled for; obstacle: why it cannot run
    here."""

    uploaded_bytes = 0

    def __init__(self, target: str, obstacle: str):
        self._target, self._obstacle = target, obstacle
        self._arrays: dict[str, np.ndarray] = {}

    def put(self, name: str, array: np.ndarray) -> None:
        self._arrays[name] = np.array(array).ravel()

    def get(self, name: str) -> np.ndarray:
        return self._arrays[name].copy()

    def run(self, function: str) -> None:
        raise DeviceError(
            f"this machine cannot run what is compiled for {self._target} ({self._obstacle}); give "
            "device=mest.rpc(tracker, "
            "key), or export the step and train it there"
        )

    def profile(self, function: str, repeats: int) -> dict[str, float]:
        self.run(function)
        return {}

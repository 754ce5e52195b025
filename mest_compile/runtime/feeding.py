"""Batches on their way to a step: checked, and sent ahead to another device while it computes with the batch before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mest_compile.base.errors import InputError
from mest_compile.ir.expressions import OPERATIONS
from mest_compile.ir.graph import Preparation
from mest_compile.operators.losses.loss import Loss
from mest_compile.runtime import arguments
from mest_compile.runtime.runner import Runner, SendsAhead


class Feeding:
    """Puts batches where a step's programs read them.

    input_shape  of a whole batch of images
    classes      outputs of an example; labels are as the loss reads them
    activations  what the step stores images as
    prepare      what the model does to images first
    """

    def __init__(
        self,
        runner: Runner,
        input_shape: tuple[int, ...],
        classes: int,
        loss: Loss,
        activations: str,
        prepare: Callable[[np.ndarray], np.ndarray],
    ):
        self._runner, self._prepare = runner, prepare
        self._input_shape, self._classes, self._loss, self._activations = input_shape, classes, loss, activations
        self._ahead: tuple[Any, Any] | None = None

    def load(self, images: Any, labels: Any) -> None:
        """Puts a batch, unless it was sent ahead. Raises InputError."""
        sent, self._ahead = self._ahead, None
        if sent is not None and sent[0] is images and sent[1] is labels:
            assert isinstance(self._runner, SendsAhead)
            self._runner.turn()
            return
        images, labels = self._check(images, labels)
        self._runner.put("images", images)
        self._runner.put("labels", labels)

    def send_ahead(self, batch: tuple[Any, Any] | None) -> None:
        """Sends (images, labels) of the next `load`, the very same objects, if the runner can."""
        if batch is None or not isinstance(self._runner, SendsAhead):
            return
        try:
            images, labels = self._check(*batch)
        except InputError:  # which the next call tells; this one is done
            return
        self._runner.put_ahead("images", images)
        self._runner.put_ahead("labels", labels)
        self._ahead = batch

    def load_images(self, images: np.ndarray) -> None:
        """Puts at most a batch of images that `check_images` gave; what they do not fill is 0."""
        whole = np.zeros(self._input_shape, np.float32)
        whole[: len(images)] = images
        self._runner.put("images", whole.ravel())

    def check_images(self, images: Any) -> np.ndarray:
        """(n, ...) float32 of any number of images, prepared. Raises InputError."""
        images, wanted = arguments.array(images, np.float32, "images"), self._input_shape[1:]
        if images.shape[1:] != wanted or len(images) == 0:
            raise InputError(
                f"images have shape {images.shape}; wanted (n, {', '.join(map(str, wanted))}), n 1 or more"
            )
        return self._prepared(images)

    def _check(self, images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
        """The batch as it is sent. Raises InputError."""
        images, labels = (
            arguments.array(images, np.float32, "images"),
            arguments.array(labels, self._loss.reads, "labels"),
        )
        if images.shape != self._input_shape:
            raise InputError(f"images have shape {images.shape}; this step was compiled for {self._input_shape}")
        labels = self._loss.targets(labels, (self._input_shape[0], self._classes))
        return self._prepared(images).ravel(), labels

    def _prepared(self, images: np.ndarray) -> np.ndarray:
        images = self._prepare(images)
        arguments.within_range(images, self._activations)
        return images


def prepared(images: np.ndarray, steps: Sequence[Preparation], state: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a model's first operator sees of images (n, channels, ...) float32. state: its buffers."""
    for step in steps:
        held = state[step.operand] if isinstance(step.operand, str) else step.operand
        operand = np.asarray(held, np.float32).reshape(-1, *[1] * (images.ndim - 2))
        with np.errstate(all="ignore"):  # what is not finite is refused as such
            images = OPERATIONS[step.operation].numpy(*((operand, images) if step.swapped else (images, operand)))
    return images

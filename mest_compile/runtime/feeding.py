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

    input_shape   of a whole batch of images
    output_shape  of what the model gives for it; labels are as the loss reads them
    activations  what the step stores images as
    prepare      what the model does to images first
    draws        of an update's number: what decides what its dropouts drop
    constants    name -> what of the model's own stays as it is
    """

    def __init__(
        self,
        runner: Runner,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        loss: Loss,
        activations: str,
        prepare: Callable[[np.ndarray], np.ndarray],
        draws: Callable[[int], Mapping[str, np.ndarray]],
        constants: Mapping[str, np.ndarray],
    ):
        self._runner, self._prepare, self._draws = runner, prepare, draws
        self._input_shape, self._output_shape = input_shape, output_shape
        self._loss, self._activations = loss, activations
        self._ahead: tuple[Any, Any] | None = None
        for name, array in {**loss.constants(output_shape), **constants}.items():
            runner.put(name, array)

    def load(self, images: Any, labels: Any, update: int) -> None:
        """Puts a batch, unless it was sent ahead, for the update of that number, the first is 1. Raises InputError."""
        self._load(images, labels)
        for name, array in self._draws(update).items():
            self._runner.put(name, array)

    def _load(self, images: Any, labels: Any) -> None:
        sent, self._ahead = self._ahead, None
        if sent is not None and sent[0] is images and sent[1] is labels:
            assert isinstance(self._runner, SendsAhead)
            self._runner.turn()
            return
        for name, array in self._check(images, labels).items():
            self._runner.put(name, array)

    def send_ahead(self, batch: tuple[Any, Any] | None) -> None:
        """Sends (images, labels) of the next `load`, the very same objects, if the runner can."""
        if batch is None or not isinstance(self._runner, SendsAhead):
            return
        try:
            arrays = self._check(*batch)
        except InputError:  # which the next call tells; this one is done
            return
        for name, array in arrays.items():
            self._runner.put_ahead(name, array)
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

    def _check(self, images: Any, labels: Any) -> dict[str, np.ndarray]:
        """{name: array} of the batch as it is sent. Raises InputError."""
        images = arguments.array(images, np.float32, "images")
        reads = self._loss.reads
        if len(reads) > 1 and not (isinstance(labels, tuple | list) and len(labels) == len(reads)):
            raise InputError(
                f"labels are {type(labels).__name__}; mest.{type(self._loss).__name__} takes a tuple of "
                f"{' and '.join(name for name, _ in reads)}"
            )
        given = [
            arguments.array(one, dtype, name)
            for one, (name, dtype) in zip(labels if len(reads) > 1 else [labels], reads, strict=True)
        ]
        if images.shape != self._input_shape:
            raise InputError(f"images have shape {images.shape}; this step was compiled for {self._input_shape}")
        targets = self._loss.targets(*given, shape=self._output_shape)
        return {"images": self._prepared(images).ravel(), **targets}

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

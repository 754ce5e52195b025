"""Batches on their way to a step: checked, cut into passes, and sent ahead to another device while it computes with
what came before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mest_compile.base.errors import InputError
from mest_compile.ir.expressions import OPERATIONS
from mest_compile.ir.graph import Preparation
from mest_compile.operators.adding import SHARE
from mest_compile.operators.losses.loss import SCALES, Loss
from mest_compile.runtime import arguments
from mest_compile.runtime.runner import Runner, SendsAhead


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What of a batch goes through a step's programs at once.

    arrays  name -> array, flat, as programs read it
    share   what its loss counts in that of the batch: as many examples as it has of it, or 1 where the loss itself
            counts by the whole batch
    """

    examples: int
    arrays: Mapping[str, np.ndarray]
    share: float


class Feeding:
    """Puts batches where a step's programs read them.

    input_shape   of the images of a pass
    output_shape  of what the model gives for them; labels are as the loss reads them
    passes        of a whole batch; of several each part is told its share
    activations  what the step stores images as
    prepare      what the model does to images first
    constants    name -> what of the model's own stays as it is
    inputs       of a model of several: the shape of each, without the batch; they lie one behind another in images
    named        of features of the input: (first, end, rows, table) of those that name rows of a table
    results      of what programs tell of each example, name -> (elements an example, dtype)
    """

    def __init__(
        self,
        runner: Runner,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        passes: int,
        loss: Loss,
        activations: str,
        prepare: Callable[[np.ndarray], np.ndarray],
        constants: Mapping[str, np.ndarray],
        results: Mapping[str, tuple[int, str]],
        inputs: Sequence[tuple[int, ...]] = (),
        named: Sequence[tuple[int, int, int, str]] = (),
    ):
        self._inputs, self._named = inputs, named
        self._runner, self._prepare, self._results = runner, prepare, results
        self._input_shape, self._output_shape, self._passes = input_shape, output_shape, passes
        self._loss, self._activations = loss, activations
        self._ahead: tuple[Any, Any, list[Part]] | None = None
        self._sent: Part | None = None
        self._examples = input_shape[0]  # that there is room for on the runner
        for name, array in {**loss.constants(output_shape), **constants}.items():
            runner.put(name, array)

    def parts(self, images: Any, labels: Any) -> list[Part]:
        """Of a batch of one example or more, at most a whole one. Raises InputError."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is images and ahead[1] is labels:
            return ahead[2]
        self._sent = None
        return self._parts(images, labels)

    def put(self, part: Part) -> None:
        """Puts a part, unless it was sent ahead."""
        sent, self._sent = self._sent, None
        self._resize(part.examples)
        if sent is part:
            assert isinstance(self._runner, SendsAhead)
            self._runner.turn()
            return
        for name, array in part.arrays.items():
            self._runner.put(name, array)

    def send_ahead(self, batch: tuple[Any, Any] | None) -> None:
        """Sends the first part of (images, labels) of the next `parts`, the very same objects, if the runner can."""
        if batch is None or not isinstance(self._runner, SendsAhead):
            return
        try:
            parts = self._parts(*batch)
        except InputError:  # which the next call tells; this one is done
            return
        self.send(parts[0])
        self._ahead = *batch, parts

    def send(self, part: Part) -> None:
        """Sends the part of the next `put` ahead, if the runner can."""
        if isinstance(self._runner, SendsAhead):
            for name, array in part.arrays.items():
                self._runner.put_ahead(name, array)
            self._sent = part

    def load_images(self, images: np.ndarray) -> None:
        """Puts at most a pass of images that `check_images` gave; what they do not fill is 0."""
        whole = np.zeros(self._input_shape, np.float32)
        whole[: len(images)] = images
        self._resize(len(whole))
        self._runner.put("images", whole.ravel())

    def check_images(self, images: Any) -> np.ndarray:
        """(n, ...) float32 of any number of images, prepared. Raises InputError."""
        images, wanted = self._packed(images), self._input_shape[1:]
        if images.shape[1:] != wanted or len(images) == 0:
            raise InputError(
                f"images have shape {images.shape}; wanted (n, {', '.join(map(str, wanted))}), n 1 or more"
            )
        return self._prepared(images)

    def _parts(self, images: Any, labels: Any) -> list[Part]:
        images = self._packed(images)
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
        count, most = len(images) if images.ndim else 0, self._passes * self._input_shape[0]
        if images.shape[1:] != self._input_shape[1:] or not 0 < count <= most:
            fewer = ", or fewer examples" if most > 1 else ""
            whole = (most, *self._input_shape[1:])
            raise InputError(f"images have shape {images.shape}; this step was compiled for {whole}{fewer}")
        images, shape = self._prepared(images), self._output_shape[1:]
        targets = self._loss.targets(*given, shape=(count, *shape))
        if self._passes == 1:
            return [Part(count, {"images": images.ravel(), **targets}, 1.0)]
        scales = {SCALES: targets[SCALES]} if SCALES in targets else {}
        parts = []
        for start in range(0, count, self._input_shape[0]):
            some = slice(start, start + self._input_shape[0])
            examples = len(images[some])
            share = 1.0 if scales else examples / count
            arrays = self._loss.targets(*(one[some] for one in given), shape=(examples, *shape)) | scales
            arrays |= {"images": images[some].ravel()} | ({} if scales else {SHARE: np.array([share], np.float32)})
            parts.append(Part(examples, arrays, share))
        return parts

    def _resize(self, examples: int) -> None:
        """Makes room for what programs for so many examples tell. What they read gets it as it is put."""
        if examples != self._examples:
            for name, (elems, dtype) in self._results.items():
                self._runner.put(name, np.zeros(examples * elems, dtype))
            self._examples = examples

    def _packed(self, images: Any) -> np.ndarray:
        """Images, or several inputs one behind another. Raises InputError."""
        if not self._inputs or not isinstance(images, tuple | list):
            return arguments.array(images, np.float32, "images")
        if len(images) != len(self._inputs):
            raise InputError(f"{len(images)} inputs came; the model takes {len(self._inputs)}, as a tuple")
        found = [arguments.array(one, np.float32, f"input {place}") for place, one in enumerate(images)]
        for place, (one, shape) in enumerate(zip(found, self._inputs, strict=True)):
            if one.shape[1:] != shape or len(one) != len(found[0]):
                raise InputError(
                    f"input {place} has shape {one.shape}; wanted ({len(found[0])}, {', '.join(map(str, shape))})"
                )
        return np.concatenate([one.reshape(len(one), -1) for one in found], 1)

    def _prepared(self, images: np.ndarray) -> np.ndarray:
        for first, end, rows, table in self._named:
            numbers = images[:, first:end]
            if not (numbers.min() >= 0 and numbers.max() < rows):
                raise InputError(
                    f"numbers that name rows of {table} go from {numbers.min():g} to {numbers.max():g}; there are 0 to "
                    f"{rows - 1}"
                )
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

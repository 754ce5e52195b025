"""What the frozen part of a net makes of images: computed once for each of them, by a program that only predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import numpy as np

from mest_compile.base import exclusive
from mest_compile.base.errors import DataError
from mest_compile.data.pictures import Photos
from mest_compile.finetuning.cutting import between, evaluating
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.host import give_memory_back
from mest_compile.kernels import choosing
from mest_compile.kernels.cache import Builder
from mest_compile.lowering.fusing import fuse
from mest_compile.lowering.programs import lower_prediction
from mest_compile.planning.plan import Plan
from mest_compile.planning.retargeting import retargeted
from mest_compile.records.log import Records
from mest_compile.runtime import arguments
from mest_compile.runtime.feeding import prepared
from mest_compile.runtime.mutating import Mutating
from mest_compile.runtime.runner import Spares
from mest_compile.runtime.state import HeldState

BATCH = 16  # images at a time, whatever the batch of training steps: nothing of a prediction is kept


class Extractor:
    """The nodes from `start` to before `end` of a plan's graph, in evaluation mode.

    state  {torch name: array} of the model
    masks  {weight name: (out, in, kh, kw) bool} of the plan's sparse layers: then the nodes run as a step of that plan
           predicts, by the same kernels; without them all weights live
    """

    def __init__(
        self,
        plan: Plan,
        start: int,
        end: int,
        state: Mapping[str, np.ndarray],
        builder: Builder,
        masks: Mapping[str, np.ndarray] = {},
    ):
        def records(target: object) -> Records:
            return plan.records.for_target(plan.target)

        plan = plan if masks else retargeted(evaluating(plan.facts), plan.target, BATCH, records)
        facts, target = plan.facts, plan.target
        self.graph = graph = between(facts.graph, start, end)
        layers = {name: layer for name, layer in facts.layers.items() if name in graph.state_shapes}
        program = lower_prediction(fuse(graph), layers, target, {}, (), facts.activations)
        kind = backend_of(target)
        kind.find_device(target)
        with exclusive.COMPILER:
            choices = choosing.choose_knobs([program], layers, target, plan.records)
            sources = choosing.sources([program], target, choices)[program.name]
            built = builder.build(list(sources.values()))
            kernels = {program.name: {call: built[source.key] for call, source in sources.items()}}
            self._runner = kind.runner(kernels, {"predict": (program, ("forward",))}, target, facts.threads)
        self._state, self._activations = dict(state), facts.activations
        held = HeldState([program], layers, graph.state_shapes, self._runner)
        own = {name: state[name] for name in graph.state_shapes}
        for name, cells in Mutating(layers, graph.state_shapes, held).first(own, masks, np.random.default_rng(0)):
            held.install(held.arranged(name, cells))
        held.write(held.filling(own))

    @property
    def batch(self) -> int:
        """Images at a time, at most."""
        return self.graph.input_shape[0]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one image's features."""
        return tuple(self.graph.nodes[-1].shape[1:])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features (n, ...) float32 of n images, at most `batch` of them, of any type that is numbers."""
        images = prepared(np.asarray(images, np.float32), self.graph.prepared, self._state)
        arguments.within_range(images, self._activations)
        whole = np.zeros(self.graph.input_shape, np.float32)
        whole[: len(images)] = images
        self._runner.put("images", whole.ravel())
        self._runner.run("predict")
        return self._runner.get("logits").reshape(self.batch, *self.output_shape)[: len(images)]

    def spare(self) -> None:
        """Gives back the memory that it computes in; the next images take it again."""
        if isinstance(self._runner, Spares):
            self._runner.spare()
        give_memory_back()

    def cached(
        self, images: np.ndarray | Photos, path: Path, budget_bytes: int, progress: Callable[[int, int], None]
    ) -> np.ndarray:
        """Features of all images, which the file has from before or is given; in memory where they take at most
        `budget_bytes`, else read from the file as they are used. progress: of images that are done, and all. Raises
        DataError where the file cannot be written."""
        shape = (len(images), *self.output_shape)
        try:
            if not path.is_file():
                part = path.with_name(f".{path.name}.part")
                written = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
                for begin in range(0, len(images), self.batch):
                    written[begin : begin + self.batch] = self(images[begin : begin + self.batch])
                    progress(min(begin + self.batch, len(images)), len(images))
                written.flush()
                del written
                part.replace(path)
            there = 4 * prod(shape) <= budget_bytes
            return np.load(path) if there else np.load(path, mmap_mode="r")
        except OSError as problem:
            raise DataError(
                f"features of {len(images)} images, {4 * prod(shape) / 2**20:.0f} MiB, cannot be kept in {path}: "
                f"{problem.strerror}; make room, or pass another --out"
            ) from problem

"""The work of a fine-tuning, part by part."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.assembling import make_step
from mest_compile.budgeting import sampled
from mest_compile.compiling import chosen_step, of_machine
from mest_compile.data import Dataset, Split
from mest_compile.data.pictures import Photos, Pictures
from mest_compile.finetuning.continuing import Before, protected
from mest_compile.finetuning.cutting import cut_of
from mest_compile.finetuning.features import Extractor
from mest_compile.finetuning.folder import TunedFolder
from mest_compile.finetuning.job import Job
from mest_compile.finetuning.net import Net
from mest_compile.finetuning.replay import Replay, kept, mixed, told_of
from mest_compile.finetuning.stages import trained
from mest_compile.finetuning.timing import Clock
from mest_compile.finetuning.watching import Watches
from mest_compile.kernels.cache import Builder
from mest_compile.operators.optimizers.optimizer import named_optimizer
from mest_compile.options import StepOptions
from mest_compile.planning.plan import Plan, plan_step
from mest_compile.planning.trainable import choose_trainable
from mest_compile.records.log import Records
from mest_compile.runtime import checkpoint
from mest_compile.runtime.state import as_conv
from mest_compile.sparsity.schemes.dense import Dense
from mest_compile.training.recipe import Recipe
from mest_compile.training.sieve import SieveRule

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep

log = logging.getLogger(__name__)

FEW = 8  # examples whose mean and variance say too little of all
HEAD_EPOCHS = 30
SIEVE = SieveRule(drop=0.25)  # of what is replayed and new: most of what is replayed is known by heart
HEAD_OPTIMIZER = "adamw:lr=0.003"


class Work:
    """A fine-tuning under way. before: what it continues.

    labels, tasks  of the test part, and of what is kept of those of tasks before behind it
    trainable  names of the parameters that were trained, once they are
    kept  "last blocks", or "classifier" where the net with that alone trained was better, once it is known
    """

    def __init__(
        self,
        job: Job,
        folder: TunedFolder,
        pictures: Pictures,
        net: Net,
        builder: Builder,
        watch: Watches,
        clock: Clock,
        before: Before | None,
    ):
        self._replayed = None if before is None else before.replay
        self._masks: Mapping[str, np.ndarray] = {} if before is None else before.masks
        self._job, self._folder, self._pictures, self._graph = job, folder, pictures, net.graph
        self._builder, self._watch, self._clock = builder, watch, clock
        self._state = dict(net.state)
        self.trainable: list[str] = []
        self.kept = "classifier"
        self._records = cache(_records)  # a log of thousands of lines, and several plans
        alone = replace(job.options.dense(), optimizer=named_optimizer(HEAD_OPTIMIZER), update_budget=None)
        with clock("compiling"):
            self._head_plan = self._planned(replace(alone, trainable=net.head))
            self._plan = None if job.options.update_budget is not None else self._planned(job.options)
        self._gate = cut_of(self._head_plan.facts.graph)
        # Where the last blocks begin: 0 where they are not known yet, or run on images themselves.
        self._start = 0 if self._plan is None or job.augment else cut_of(self._plan.facts.graph)
        self._new = self._low = self._features(pictures, self._head_plan, 0, self._start, folder.features)
        if self._replayed is not None:
            self._low = mixed(self._new, self._replayed)
        plan = self._plan if self._plan is not None and self._masks else self._head_plan  # as sparse as it was left
        self.pooled = self._features(self._low, plan, self._start, self._gate, folder.pooled, self._masks)
        self.labels = self._low.test.labels
        task = 0 if self._replayed is None else len(self._replayed.told)
        self.tasks = np.full(len(self.labels), task)
        if self._replayed is not None:
            self.tasks[len(self._new.test) :] = self._replayed.test.tasks

    def head(self) -> TrainStep:
        """The classifier, trained on what the pretrained net says."""
        self._watch.on_stage("training the classifier")
        recipe = Recipe(HEAD_EPOCHS, "static", augment=False, seed=self._job.options.seed, drop_last=True)
        with self._clock("training the classifier"):
            step = self._trained(self._head_plan, self._gate, {}, self.pooled, recipe, self._folder.head, _nothing)
        self._state |= step.state_dict()
        return step

    def blocks(self, head: TrainStep) -> tuple[TrainStep, np.ndarray]:
        """(the whole net's step with the last blocks trained, logits of the test part), and nothing else of it; with
        the classifier alone trained where that is right about more of the validation part."""
        job, masks, plan = self._job, self._masks, self._plan or self._chosen()
        start = 0 if job.augment else cut_of(plan.facts.graph)
        self.trainable = plan.facts.graph.trainable()
        if start == self._gate:  # nothing but the classifier trains
            logits, plan = head.predict(self.images(self.pooled.test)), self._head_plan
        else:
            if start != self._start:  # it was not known before
                self._new = self._low = self._features(self._pictures, plan, 0, start, self._folder.features)
            data = self._low
            sparse = any(not layer.frozen and not isinstance(layer.scheme, Dense) for layer in plan.layers.values())
            method = "em" if sparse and job.epochs > 1 else "static"
            sieve = None if self._replayed is None or job.epochs == 1 else SIEVE
            recipe = Recipe(job.epochs, method, augment=job.augment, seed=job.options.seed, drop_last=True, sieve=sieve)
            self._watch.on_stage("training the last blocks")
            with self._clock("training the last blocks"):
                step = self._trained(plan, start, masks, data, recipe, self._folder.blocks, self._protects(plan))
            if self._no_worse(step, data, head):
                self.kept = "last blocks"
                logits = step.predict(self.images(data.test))
                self._state |= step.state_dict()
                masks = {name: as_conv(mask) for name, mask in step.masks().items()}
            else:
                logits = head.predict(self.images(self.pooled.test))
                plan = plan if masks else self._head_plan  # what was sparse before stays so
            step.spare()
            del step
        self._watch.on_stage("putting the net together")
        with self._clock("compiling"):
            step = make_step(plan, self._state, self._builder, None, None, masks)
            self._state = {}  # which the step has: what is written needs the room
            return step, logits

    def _no_worse(self, step: TrainStep, data: Split, head: TrainStep) -> bool:
        """Whether the last blocks trained answer as much of the validation part rightly as the classifier alone, but
        for what chance makes of equals: one standard deviation of the difference (McNemar's)."""
        if data.val is None or self.pooled.val is None:
            return True
        mine, its = (
            one.predict(self.images(part)).argmax(1) == part.labels
            for one, part in ((step, data.val), (head, self.pooled.val))
        )
        lost, gained = np.count_nonzero(its & ~mine), np.count_nonzero(mine & ~its)
        if worse := lost - gained > (lost + gained) ** 0.5:
            log.warning(
                "the net is kept with its classifier alone trained, which is right about %.1f%% of %d validation "
                "images, and about %.1f%% with the last blocks; give more epochs or images, or a lower sparsity",
                100 * its.mean(),
                len(its),
                100 * mine.mean(),
            )
        return not worse

    def examples(self, right: np.ndarray) -> tuple[Replay, list[dict[str, Any]]]:
        """(what later fine-tunings replay, what each task is told by). right: whether answers for the test part are."""
        classes, replayed = self._pictures.classes, self._replayed
        told = () if replayed is None else replayed.told
        parts = kept(replayed, self._new, len(classes), self._job.buffer_bytes, len(told), self._job.options.seed)
        there = np.unique(self._new.train.labels)
        own = right[self.tasks == len(told)]
        task = {"classes": [classes[label] for label in there], "learnt": float(own.mean())}
        return Replay(*parts, told=(*told, task)), told_of([*told, task], right, self.tasks)

    def images(self, data: Dataset) -> np.ndarray:
        """As a step takes them."""
        return data.images if data.images.shape[2:] != (1, 1) else data.images[:, :, 0, 0]

    def _protects(self, plan: Plan) -> Callable[[TrainStep], None]:
        """What protects units that tasks before need, in a step that is to train; which they are is decided when it
        begins."""
        if self._replayed is None or not len(self._replayed.train.labels):
            return _nothing
        replayed, path = self._replayed.train, self._folder.protected

        def protects(step: TrainStep) -> None:
            if not path.is_file():
                checkpoint.write(path, protected(step, plan.layers, replayed), {})
            step.protect(checkpoint.read(path)[0])

        return protects

    def _trained(
        self,
        plan: Plan,
        start: int,
        masks: Mapping[str, np.ndarray],
        data: Split,
        recipe: Recipe,
        folder: Path,
        prepare: Callable[[TrainStep], None],
    ) -> TrainStep:
        return trained(
            plan,
            start,
            self._state,
            masks,
            data,
            recipe,
            folder,
            patience=self._job.patience,
            clock=self._clock,
            builder=self._builder,
            progress=self._watch.of_training,
            prepare=prepare,
        )

    def _planned(self, options: StepOptions) -> Plan:
        """The plan of the whole net in which what is frozen is dense: nothing would make up for what pruning takes.
        BatchNorms of steps of few examples stay in evaluation mode."""
        graph = self._graph
        if self._job.batch < FEW:
            norms = {name for name, node in graph.parameters().items() if node.op == "batch_norm"}
            chosen = choose_trainable(graph, options.trainable).trainable()
            options = replace(options, trainable=tuple(name for name in chosen if name not in norms))
        first = plan_step(graph, options, self._records)
        if not options.sparse:
            return first
        dense = [name for name, layer in first.layers.items() if layer.frozen or isinstance(layer.scheme, Dense)]
        if len(dense) == len(first.layers):
            return plan_step(graph, replace(options.dense(), trainable=options.trainable), self._records)
        return plan_step(graph, replace(options, dense_layers=tuple(dense)), self._records)

    def _chosen(self) -> Plan:
        """The plan of what trains within the update budget, chosen with the classifier trained."""
        options, data = self._job.options, self._low.train  # of images: it is not known yet where features begin
        self._watch.on_stage("choosing what trains")
        with self._clock("compiling"):
            batches = sampled(data, self._graph.input_shape, options)
            full = plan_step(self._graph, options, self._records)
            choice = chosen_step((full, self._state, {}), options, batches, None, self._builder)
            plan = self._planned(replace(options, trainable=choice.trainable, update_budget=None))
            return replace(plan, chosen=choice.to_dict())

    def _features(
        self,
        data: Split | Pictures,
        plan: Plan,
        start: int,
        end: int,
        folder: Path,
        masks: Mapping[str, np.ndarray] = {},
    ) -> Split:
        """What the plan's nodes from `start` to `end` make of the data. masks: of layers that are sparse there."""
        if start == end:
            return data if isinstance(data, Split) else data.split
        self._watch.on_stage("computing features")
        with self._clock("compiling"):
            extractor = Extractor(plan, start, end, self._state, self._builder, masks)
        with self._clock("features"):
            budget, parts = self._job.feature_bytes, []
            for part in (data.train, data.test, data.val):
                if part is None:
                    break
                path = folder / f"{part.name.split()[-1]}.npy"
                given = part if isinstance(part, Photos) else self.images(part)
                images = extractor.cached(given, path, budget, self._watch.on_features)
                images = images if images.ndim == 4 else images[:, :, None, None]
                plain = np.zeros(images.shape[1], np.float32), np.ones(images.shape[1], np.float32)
                parts.append(Dataset(images, part.labels, part.classes, *plain, part.name))
            extractor.spare()
        return Split(*parts)


def _records(target: Any) -> Records:
    return of_machine(Records.of(target), None)


def _nothing(step: TrainStep) -> None:
    pass

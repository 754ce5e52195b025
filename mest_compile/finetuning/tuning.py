"""mest.finetune: from a pretrained net and images to a personal model's files."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.assembling import make_step
from mest_compile.base.errors import UsageError
from mest_compile.budgeting import sampled
from mest_compile.compiling import chosen_step, of_machine
from mest_compile.data import Dataset, Split
from mest_compile.data.pictures import Pictures, fitted, read_picture, read_pictures
from mest_compile.finetuning.cutting import cut_of
from mest_compile.finetuning.features import Extractor
from mest_compile.finetuning.folder import TunedFolder
from mest_compile.finetuning.job import BATCH, EPOCHS, GIB, OPTIMIZER, PATIENCE, SPARSITY, TRAINABLE, Job
from mest_compile.finetuning.net import Net, prepared_net, wanted_inputs
from mest_compile.finetuning.stages import trained
from mest_compile.finetuning.timing import Clock
from mest_compile.finetuning.watching import Quiet, Watches
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import find_target, obstacle
from mest_compile.kernels.cache import Builder
from mest_compile.models.inputs import Inputs
from mest_compile.operators.optimizers.optimizer import Optimizer, named_optimizer
from mest_compile.options import StepOptions, find_optimizer
from mest_compile.planning.plan import Plan, plan_step
from mest_compile.planning.trainable import choose_trainable
from mest_compile.records.log import Records
from mest_compile.runtime.state import as_conv
from mest_compile.sparsity import parse_schemes
from mest_compile.sparsity.scheme import Scheme
from mest_compile.sparsity.schemes.dense import Dense
from mest_compile.training.recipe import Recipe
from mest_compile.training.verdict import judged

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep

log = logging.getLogger(__name__)

FEW = 8  # examples whose mean and variance say too little of all
HEAD_EPOCHS = 30
HEAD_OPTIMIZER = "adamw:lr=0.003"


@dataclass(frozen=True, slots=True)
class Tuned:
    """A personal model.

    folder   with its files (`TunedFolder` names them)
    step     of the whole net, which takes pixels: it predicts, trains on, and is saved and exported as any other
    verdict  of the test part (`training.verdict.judged`): "accuracy", "confusion", "classes"
    head_accuracy  when the classifier alone had been trained
    seconds  {part of the work: seconds}, "total" among them
    """

    folder: Path
    step: TrainStep
    classes: tuple[str, ...]
    inputs: Inputs
    verdict: Mapping[str, Any]
    head_accuracy: float
    seconds: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        """On the test part, by which the best epoch was chosen."""
        return float(self.verdict["accuracy"])

    def predict(self, pictures: Sequence[Any]) -> list[tuple[str, float]]:
        """(class, its probability) of paths of image files or Pillow's images. Raises DataError."""
        images = [
            read_picture(one, self.inputs) if isinstance(one, str | os.PathLike) else fitted(one, self.inputs)
            for one in pictures
        ]
        logits = self.step.predict(np.stack(images)).astype(np.float64)
        likely = np.exp(logits - logits.max(1, keepdims=True))
        likely /= likely.sum(1, keepdims=True)
        return [(self.classes[int(row.argmax())], float(row.max())) for row in likely]


def finetune(
    model: Any,
    data: Any,
    *,
    test: Any = None,
    out: str | Path | None = None,
    weights: str | Path | None = None,
    inputs: Inputs | None = None,
    image: tuple[int, int, int] | None = None,
    trainable: str | Sequence[str] | None = TRAINABLE,
    update_budget: float | int | str | None = None,
    scheme: str | Scheme | Mapping[str, str | Scheme] = "block",
    sparsity: float | Mapping[str, float] | None = None,
    epochs: int = EPOCHS,
    seconds: float | None = None,
    patience: int | None = PATIENCE,
    batch: int = BATCH,
    optimizer: str | Mapping[str, Any] | Optimizer | None = None,
    augment: bool = False,
    artifact: bool = False,
    target: str | Path = "local",
    threads: int | None = None,
    activations: str = "float32",
    seed: int = 0,
    feature_bytes: int = GIB,
    resume: bool = False,
    builder: Builder | None = None,
    watch: Watches | None = None,
) -> Tuned:
    """A pretrained net made one of your own images.

    The classifier is trained first, then the net's last blocks with it, sparse. What is frozen below them computes its
    features once for each image, and training is of the rest of the net alone.

    model    name of a pretrained net, as "efficientnet-lite0"; of a built-in one, with `weights`; a torch.nn.Module, or
             an .onnx file, that ends with a linear layer: it is replaced where it tells another number of classes apart
    data     what is trained on, as `data.pictures.read_pictures` takes it: a folder with a folder of images for each
             class, a CSV file of file and label, uint8 arrays, a torch Dataset, ...
    test     what accuracy is told of, and the best epoch is chosen by; None: data's own test part, or a fifth of every
             class
    out      run folder; None: runs/finetuned-<time>
    weights  safetensors file, or one that torch.save wrote of a state_dict, under the net's names
    inputs   how images are cut, sized and scaled; None: as the pretrained net's were
    image    (channels, height, width), where they are to have another size
    trainable, update_budget, scheme, sparsity, optimizer, target, threads, activations  as in `mest.compile`; None: a
             sparsity of 0.8 of what trains, as far as it is sparse by default; what is frozen stays dense
    epochs   of training the last blocks, at most
    seconds  what the work may take beside compiling: as many epochs are planned as fit by measured speed
    patience  epochs without a better accuracy after which training ends; None: never
    augment  shift images while the last blocks train; the whole net then runs for every image and epoch
    artifact  leave an artifact of the whole net as well
    feature_bytes  that features may take in memory; more are read from the run folder
    resume   go on with what was stopped in `out`, bit for bit, given the same model and data
    Raises MestError.
    """
    options = tuning_options(
        scheme=scheme,
        sparsity=sparsity,
        optimizer=optimizer,
        target=target,
        threads=threads,
        activations=activations,
        trainable=trainable,
        update_budget=update_budget,
        seed=seed,
    )
    job = Job(
        model,
        data,
        options,
        test,
        weights,
        inputs,
        image,
        batch,
        epochs,
        seconds,
        patience,
        augment,
        artifact,
        feature_bytes,
    )
    return tune(job, new_folder() if out is None else Path(out), resume, builder, watch)


def tuning_options(scheme: Any, sparsity: Any, optimizer: Any, **others: Any) -> StepOptions:
    """Options of the step that trains the last blocks; what nobody says as fine-tuning has it."""
    schemes = parse_schemes(scheme)
    if sparsity is None and not isinstance(schemes, Mapping) and schemes.fixed is None:
        sparsity = SPARSITY
    chosen = find_optimizer(OPTIMIZER if optimizer is None else optimizer)
    return StepOptions(scheme=schemes, sparsity=sparsity, optimizer=chosen, **others)


def new_folder() -> Path:
    return Path("runs") / f"finetuned-{datetime.now():%Y%m%d-%H%M%S}"


def tune(job: Job, out: Path, resume: bool, builder: Builder | None = None, watch: Watches | None = None) -> Tuned:
    """`finetune` with what is asked already said."""
    builder, watch, clock, folder = builder or Builder(), watch or Quiet(), Clock(job.seconds), TunedFolder(out)
    inputs = wanted_inputs(job.model, job.inputs, job.weights, job.image)
    folder.check(job, resume)
    where = find_target(job.options.target)
    if backend_of(where).processor and (why := obstacle(where)):
        raise UsageError(
            f"target {where.name!r} is not this machine ({why}), which trains; fine-tune here, and build for the "
            f"target with mest-compile build --checkpoint {folder.checkpoint} --target {where.name}"
        )
    watch.on_stage("reading images")
    with clock("reading"):
        pictures = read_pictures(job.data, inputs, job.test, job.options.seed)
    watch.on_stage("importing the net")
    with clock("compiling"):
        net = prepared_net(job.model, inputs, job.batch, len(pictures.classes), job.weights, builder)
    folder.begin(job)  # not before model and data are known to be good
    work = _Work(job, folder, pictures, net, builder, watch, clock)
    head = work.head()
    head_accuracy = judged(head.predict(work.images(work.pooled.test)), work.labels, pictures.classes)["accuracy"]
    step, logits = work.blocks(head)
    watch.on_stage("writing files")
    verdict = judged(logits, work.labels, pictures.classes)
    if verdict["accuracy"] < head_accuracy:
        log.warning(
            "with the last blocks trained the accuracy is %.1f%%, with the classifier alone it was %.1f%%: give more "
            "epochs, a lower sparsity, or trainable=%r",
            100 * verdict["accuracy"],
            100 * head_accuracy,
            ",".join(net.head),
        )
    with clock("writing"):
        folder.finish(job, step, net.inputs, pictures, logits, verdict, head_accuracy, clock)
    return Tuned(
        out, step, pictures.classes, net.inputs, verdict, head_accuracy, {**clock.seconds, "total": clock.total}
    )


class _Work:
    """A fine-tuning under way."""

    def __init__(
        self,
        job: Job,
        folder: TunedFolder,
        pictures: Pictures,
        net: Net,
        builder: Builder,
        watch: Watches,
        clock: Clock,
    ):
        self._job, self._folder, self._pictures, self._net = job, folder, pictures, net
        self._builder, self._watch, self._clock = builder, watch, clock
        self._state = dict(net.state)
        self.labels = pictures.split.test.labels
        alone = replace(job.options.dense(), optimizer=named_optimizer(HEAD_OPTIMIZER), update_budget=None)
        with clock("compiling"):
            self._head_plan = self._planned(replace(alone, trainable=net.head))
            self._plan = None if job.options.update_budget is not None else self._planned(job.options)
        self._gate = cut_of(self._head_plan.facts.graph)
        # Where the last blocks begin: 0 where they are not known yet, or run on images themselves.
        self._start = 0 if self._plan is None or job.augment else cut_of(self._plan.facts.graph)
        self._low = self._features(pictures.split, self._head_plan, 0, self._start, folder.features)
        self.pooled = self._features(self._low, self._head_plan, self._start, self._gate, folder.pooled)

    def head(self) -> TrainStep:
        """The classifier, trained on what the pretrained net says."""
        self._watch.on_stage("training the classifier")
        recipe = Recipe(HEAD_EPOCHS, "static", augment=False, seed=self._job.options.seed)
        with self._clock("training the classifier"):
            step = self._trained(self._head_plan, self._gate, self.pooled, recipe, self._folder.head)
        self._state |= step.state_dict()
        return step

    def blocks(self, head: TrainStep) -> tuple[TrainStep, np.ndarray]:
        """(the whole net's step with the last blocks trained, logits of the test part)."""
        job, masks, plan = self._job, {}, self._plan or self._chosen()
        start = 0 if job.augment else cut_of(plan.facts.graph)
        if start == self._gate:  # nothing but the classifier trains
            logits, plan = head.predict(self.images(self.pooled.test)), self._head_plan
        else:
            data = self._low
            if start != self._start:
                data = self._features(self._pictures.split, plan, 0, start, self._folder.features)
            sparse = any(not layer.frozen and not isinstance(layer.scheme, Dense) for layer in plan.layers.values())
            method = "em" if sparse and job.epochs > 1 else "static"
            recipe = Recipe(job.epochs, method, augment=job.augment, seed=job.options.seed)
            self._watch.on_stage("training the last blocks")
            with self._clock("training the last blocks"):
                step = self._trained(plan, start, data, recipe, self._folder.blocks)
            logits = step.predict(self.images(data.test))
            self._state |= step.state_dict()
            masks = {name: as_conv(mask) for name, mask in step.masks().items()}
        self._watch.on_stage("putting the net together")
        with self._clock("compiling"):
            return make_step(plan, self._state, self._builder, None, None, masks), logits

    def images(self, data: Dataset) -> np.ndarray:
        """As a step takes them."""
        return data.images if data.images.shape[2:] != (1, 1) else data.images[:, :, 0, 0]

    def _trained(self, plan: Plan, start: int, data: Split, recipe: Recipe, folder: Path) -> TrainStep:
        return trained(
            plan,
            start,
            self._state,
            data,
            recipe,
            folder,
            patience=self._job.patience,
            clock=self._clock,
            builder=self._builder,
            progress=self._watch.of_training,
        )

    def _planned(self, options: StepOptions) -> Plan:
        """The plan of the whole net in which what is frozen is dense: nothing would make up for what pruning takes.
        BatchNorms of steps of few examples stay in evaluation mode."""
        graph = self._net.graph
        if self._job.batch < FEW:
            norms = {name for name, node in graph.parameters().items() if node.op == "batch_norm"}
            chosen = choose_trainable(graph, options.trainable).trainable()
            options = replace(options, trainable=tuple(name for name in chosen if name not in norms))
        first = plan_step(graph, options, _records)
        dense = [name for name, layer in first.layers.items() if layer.frozen or isinstance(layer.scheme, Dense)]
        if not options.sparse or len(dense) == len(first.layers):
            return plan_step(graph, replace(options.dense(), trainable=options.trainable), _records)
        return plan_step(graph, replace(options, dense_layers=tuple(dense)), _records)

    def _chosen(self) -> Plan:
        """The plan of what trains within the update budget, chosen with the classifier trained."""
        options, data = self._job.options, self._pictures.split.train
        self._watch.on_stage("choosing what trains")
        with self._clock("compiling"):
            batches = sampled(data, self._net.graph.input_shape, options)
            full = plan_step(self._net.graph, options, _records)
            choice = chosen_step((full, self._state, {}), options, batches, None, self._builder)
            plan = self._planned(replace(options, trainable=choice.trainable, update_budget=None))
            return replace(plan, chosen=choice.to_dict())

    def _features(self, data: Split, plan: Plan, start: int, end: int, folder: Path) -> Split:
        """What the plan's nodes from `start` to `end` make of the data."""
        if start == end:
            return data
        self._watch.on_stage("computing features")
        with self._clock("compiling"):
            extractor = Extractor(plan, start, end, self._net.state, self._builder)
        with self._clock("features"):
            budget, parts = self._job.feature_bytes, []
            for part in (data.train, data.test):
                path = folder / f"{part.name.split()[-1]}.npy"
                images = extractor.cached(self.images(part), path, budget, self._watch.on_features)
                images = images if images.ndim == 4 else images[:, :, None, None]
                plain = np.zeros(images.shape[1], np.float32), np.ones(images.shape[1], np.float32)
                parts.append(Dataset(images, part.labels, part.classes, *plain, part.name))
        return Split(*parts)


def _records(target: Any) -> Records:
    return of_machine(Records.of(target), None)

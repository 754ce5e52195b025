"""mest.finetune: from a pretrained net and images to a personal model's files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base.errors import UsageError
from mest_compile.data.pictures import fitted, read_picture, read_pictures
from mest_compile.finetuning.continuing import continued_job, read_before, widened
from mest_compile.finetuning.folder import TunedFolder
from mest_compile.finetuning.job import (
    BATCH,
    BUFFER_BYTES,
    EPOCHS,
    GIB,
    OPTIMIZER,
    PATIENCE,
    SPARSITY,
    TRAINABLE,
    VAL_SHARE,
    Job,
)
from mest_compile.finetuning.net import prepared_net, wanted_inputs
from mest_compile.finetuning.timing import Clock
from mest_compile.finetuning.watching import Quiet, Watches
from mest_compile.finetuning.work import Work
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import find_target, obstacle
from mest_compile.kernels.cache import Builder
from mest_compile.models.inputs import Inputs
from mest_compile.operators.optimizers.optimizer import Optimizer
from mest_compile.options import StepOptions, find_optimizer
from mest_compile.sparsity import parse_schemes
from mest_compile.sparsity.scheme import Scheme
from mest_compile.training.verdict import judged

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep


@dataclass(frozen=True, slots=True)
class Tuned:
    """A personal model.

    folder   with its files (`TunedFolder` names them)
    step     of the whole net, which takes pixels: it predicts, trains on, and is saved and exported as any other
    verdict  of the test part (`training.verdict.judged`): "accuracy", "confusion", "classes"
    head_accuracy  when the classifier alone had been trained
    kept     "last blocks", or "classifier": the net with that alone trained, where it was right about more of the
             validation part
    tasks    of each fine-tuning that this one continues, and of itself: "classes", "learnt" (accuracy when it was),
             "accuracy" now, "forgotten" (by how much it fell), on what is kept of the tests
    seconds  {part of the work: seconds}, "total" among them
    """

    folder: Path
    step: TrainStep
    classes: tuple[str, ...]
    inputs: Inputs
    verdict: Mapping[str, Any]
    head_accuracy: float
    kept: str
    tasks: Sequence[Mapping[str, Any]]
    seconds: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        """On the test part, which nothing is chosen by."""
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
    model: Any = None,
    data: Any = None,
    *,
    test: Any = None,
    val: Any = None,
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
    continue_from: str | Path | None = None,
    buffer_bytes: int | str = BUFFER_BYTES,
    spare_classes: int = 0,
    resume: bool = False,
    builder: Builder | None = None,
    watch: Watches | None = None,
) -> Tuned:
    """A pretrained net made one of your own images.

    The classifier is trained first, then the net's last blocks with it, sparse. What is frozen below them computes its
    features once for each image, and training is of the rest of the net alone.

    model    name of a pretrained net, as "efficientnet-lite0", timm:NAME or torchvision:NAME with the package's
             weights; of one of these or a built-in one, with `weights`; a torch.nn.Module, or an .onnx file, that ends
             with a linear layer: it is replaced where it tells another number of classes apart
    data     what is trained on, as `data.pictures.read_pictures` takes it: a folder with a folder of images for each
             class, a CSV file of file and label, uint8 arrays, a torch Dataset, ...
    test     what accuracy is told of; None: data's own test part, or a fifth of every class
    val      what the best epoch is chosen by, and whether the last blocks are kept as they were trained; None: data's
             own validation part, or a tenth of the training images of every class, at least one of two
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
    continue_from  run folder of a fine-tuning that is done, in the place of `model`: its net learns further images,
             classes that are new among them, and replays examples that were kept of the others. What it was asked is
             asked again: beside it only data, test, val, out, epochs, seconds, patience, artifact, buffer_bytes and
             resume may be given
    buffer_bytes  that examples kept for later may take, "16MiB", and validation and test examples as much
             again each; 0: none is kept
    spare_classes  outputs beside those of the classes, for classes that come later: nothing at all is compiled for one
             then, so that a device learns it from an artifact (`mest.learn`)
    resume   go on with what was stopped in `out`, bit for bit, given the same model and data
    Raises MestError.
    """
    said: dict[str, Any] = {
        "epochs": epochs,
        "seconds": seconds,
        "patience": patience,
        "artifact": artifact,
        "feature_bytes": feature_bytes,
        "buffer_bytes": buffer_bytes,
    }
    if data is None:
        raise UsageError("finetune: give data, what is trained on: a folder, a CSV file, arrays or a torch Dataset")
    if continue_from is not None:
        given = (model, weights, inputs, image, trainable, update_budget, scheme, sparsity, batch, optimizer, augment)
        usual = (None, None, None, None, TRAINABLE, None, "block", None, BATCH, None, False)
        if (*given, target, threads, activations, seed, spare_classes) != (*usual, "local", None, "float32", 0, 0):
            raise UsageError(
                "a fine-tuning that continues another keeps its net and settings; beside continue_from give data, "
                "test, val, out, epochs, seconds, patience, artifact, feature_bytes, buffer_bytes and resume only"
            )
        job = continued_job(Path(continue_from), data, test, val, said)
    else:
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
        said |= {"inputs": inputs, "image": image, "batch": batch, "augment": augment, "spare_classes": spare_classes}
        job = Job(model, data, options, test, val, weights, **said)
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
    before = None if job.continue_from is None else read_before(Path(job.continue_from))
    inputs = wanted_inputs(job.model, job.inputs, job.weights, job.image) if before is None else before.net.inputs
    folder.check(job, resume)
    where = find_target(job.options.target)
    if backend_of(where).processor and (why := obstacle(where)):
        raise UsageError(
            f"target {where.name!r} is not this machine ({why}), which trains; fine-tune here, and build for the "
            f"target with mest-compile build --checkpoint {folder.checkpoint} --target {where.name}"
        )
    watch.on_stage("reading images")
    with clock("reading"):
        known = () if before is None else before.classes
        spare = job.spare_classes if before is None else 0  # those that are left are known
        pictures = read_pictures(job.data, inputs, job.test, job.options.seed, known, spare, job.val, VAL_SHARE)
    classes = len(pictures.classes)
    if before is None:
        watch.on_stage("importing the net")
        with clock("compiling"):
            net = prepared_net(job.model, inputs, job.batch, classes, job.weights, builder)
    else:
        net = widened(before.net, classes)
    with folder.lock():  # not before model and data are known to be good
        folder.begin(job, net, pictures)
        work = Work(job, folder, pictures, net, builder, watch, clock, before)
        head = work.head()
        head_accuracy = judged(head.predict(work.images(work.pooled.test)), work.labels, pictures.classes)["accuracy"]
        del net, before  # whose weights need not be there when others have taken their place
        step, logits = work.blocks(head)
        watch.on_stage("writing files")
        verdict = judged(logits, work.labels, pictures.classes)
        with clock("writing"):
            replay, tasks = work.examples(logits.argmax(1) == work.labels)
            told = {"head_accuracy": head_accuracy, "kept": work.kept, "trainable": work.trainable, "tasks": tasks}
            folder.finish(job, step, inputs, pictures, logits, verdict, told, replay, clock)
    seconds = {**clock.seconds, "total": clock.total}
    return Tuned(out, step, pictures.classes, inputs, verdict, head_accuracy, work.kept, tasks, seconds)

"""The epoch loop: mutate, train, evaluate, checkpoint."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile import __version__
from mest_compile.base.errors import DeviceLost, MestError, StateError
from mest_compile.data import batches_of
from mest_compile.operators.losses.loss import read_loss
from mest_compile.training.chooser import Chooser
from mest_compile.training.epoch import GRADIENT, MUTATION, SIEVE, train_epoch
from mest_compile.training.evaluating import judge_all
from mest_compile.training.fitting import check_start, resolved
from mest_compile.training.freezer import Freezer
from mest_compile.training.given import Given, given
from mest_compile.training.judging import Judge, Teacher
from mest_compile.training.recipe import Recipe
from mest_compile.training.recovery import MOST_LOSSES, restored, resumed, why_lost
from mest_compile.training.run import Progress, Run, Silent
from mest_compile.training.runfolder import RunFolder, machine
from mest_compile.training.showing import watched
from mest_compile.training.sieve import Sieve
from mest_compile.training.survival import Survival
from mest_compile.training.watching import Watchers, check_callbacks

log = logging.getLogger(__name__)


def _some(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


class Trainer:
    """Trains a compiled step by a recipe.

    out       folder for the run's files (RunFolder names them), or None to write nothing
    progress  told about every batch and epoch; None: what `showing.watched` shows, mest.Silent(): nothing
    callbacks  told as well, each what it has a method for: on_batch, on_epoch, on_mutation (`run.Progress`). Any of
               them may call `stop()`
    specialize  run layers on kernels with their structure baked in where that is faster (`TrainStep.specialize`); the
                same bits
    The learning rate is the recipe's, or where it has none that of the step's optimizer.
    teacher   of mest.Distill: a function from images to logits, such as another step's `predict`
    freezer   of a run that goes on: what of the step freezes when; None: as the recipe says
    Raises UsageError where both rates were given and differ, or label_smoothing does, or where the recipe does not fit
    the step's loss or wants more frozen than can be, SparsityError and CapacityError where it does not fit the step.
    `source` goes into the folder of a run that begins.
    """

    def __init__(
        self,
        step: Any,
        recipe: Recipe,
        out: str | os.PathLike | None = None,
        progress: Progress | None = None,
        specialize: bool = False,
        teacher: Teacher | None = None,
        freezer: Freezer | None = None,
        callbacks: Sequence[Any] = (),
    ):
        self.step = step
        self.specialize = specialize
        self.source: dict[str, Any] | None = None
        self.recipe = resolved(recipe, step)
        self.folder = None if out is None else RunFolder(out)
        self.progress = progress
        self.callbacks = check_callbacks(callbacks)
        self._shown: Progress = Silent()
        self._stop = False
        described = step.describe()
        output_shape = described.get("output_shape", (step.batch, step.classes))
        self.judge = Judge(read_loss(described), tuple(output_shape), recipe, teacher)
        self._sieve: Sieve | None = None
        self._freezer = freezer or Freezer.of_run(self.recipe, step)
        self._chooser = Chooser(self.recipe, step)
        self._survival = Survival(step)
        self._idle = recipe.idle()
        self._resumed: Sequence[Any] | None = None  # (extra, arrays) of a checkpoint
        self._stamp: tuple[int, int] | None = None  # of that checkpoint
        self._begun = self.recipe  # by which the run was begun
        self._continued: list[dict[str, Any]] = []  # as Resumed has it
        self._otherwise = False  # whether it goes on otherwise than the checkpoint says

    @classmethod
    def resume(
        cls,
        out: str | os.PathLike,
        step: Any = None,
        progress: Progress | None = None,
        device: Any = None,
        epochs: int | None = None,
        batch: int | None = None,
        target: Any = None,
        teacher: Teacher | None = None,
        callbacks: Sequence[Any] = (),
    ) -> Trainer:
        """A trainer whose `fit` continues the run in `out`, bit for bit, when it is given the same data.

        step  compiled as the run's was; None: rebuilt from the checkpoint, to run on `device`
        epochs  of the whole run, more than it has; a finished run goes on. The recipe's learning rate schedule covers
                all of them, so that a cosine that had ended rises again; its last phase of mutations lasts to the end
        batch, target  to go on in steps of so many examples, on another target: as `mest.load` has it
        A damaged checkpoint costs an epoch: the one before it is taken, and a warning logged.
        Raises StateError when `out` holds no run, its recipe was edited, or no checkpoint is whole, UsageError when
        nothing would be left to train.
        """
        found = resumed(RunFolder(out), step, device, epochs, batch, target)
        freezer = Freezer.from_json(found.extra.get("freezing"))
        trainer = cls(found.step, found.recipe, out, progress, teacher=teacher, freezer=freezer, callbacks=callbacks)
        trainer._resumed, trainer._stamp = (found.extra, found.arrays), found.stamp
        trainer._begun, trainer._continued, trainer._otherwise = found.begun, found.continued, found.otherwise
        return trainer

    def fit(self, train_set: Any, test_set: Any = None, val_set: Any = None) -> Run:
        """Trains to the recipe's last epoch, or until it is stopped, and returns the run.

        train_set  a Dataset, (images, labels) arrays, a torch Dataset (see data.as_dataset), or what is gone through
                   anew each epoch: a torch DataLoader, or any iterable of batches, of any size (data.Stream)
        test_set   the same; what is reported. None: nothing is
        val_set    the same; what the best model is chosen by. None: test_set
        Raises InputError when the data do not fit the step, UsageError when the folder holds a run, StateError when
        somebody else trains in it, MestError when the loss, a weight or a statistic is no longer finite. However
        training ends, the checkpoint of the last whole epoch stays.
        """
        found = given(self.step, self.judge, self.recipe, train_set, test_set, val_set)
        self._stop = False
        with self._alone(), watched(self.progress, self.step.batch, self.judge.main) as self._shown:
            return self._fit(found)

    def stop(self) -> None:
        """Lets `fit` return after the epoch that is under way, as if it were the last; a resumed run goes on."""
        self._stop = True

    def about(self, train_set: Any, test_set: Any = None, val_set: Any = None) -> str:
        """One line on what is about to be trained, what the data go through and what will never happen. Raises as
        `fit`."""
        return self._about(given(self.step, self.judge, self.recipe, train_set, test_set, val_set))

    def _about(self, data: Given) -> str:
        line = f"{data.about()}; method {self.recipe.method}; lr {self.recipe.lr:g}, {self.recipe.lr_schedule}"
        return "; ".join([line, *self._freezer.about(), *self._idle])

    def _alone(self) -> Any:
        """A context in which nobody else trains in the folder."""
        if self.folder is None:
            return nullcontext()
        if self._resumed is None:
            self.folder.require_free()
            self.folder.make()
            return self.folder.lock()
        lock = self.folder.lock()
        if self.folder.stamp() != self._stamp:
            lock.release()
            raise StateError(f"{self.folder.path} has gone on since it was resumed here; resume it again")
        return lock

    def _fit(self, given: Given) -> Run:
        self.step.reading = given.reading(self.step.reading)
        run, data = self._begin(given)
        log.info(self._about(given))
        self._stamp = None  # who resumes may do so once: from here on the step is not what the checkpoint says
        if self.specialize:
            self.step.specialize(self._steps_between_mutations(len(given.train)))
        losses: list[bool] = []  # since the last whole epoch: whether the device had the step by then
        while len(run.history) < self.recipe.epochs and not (self._stop or run.gone(self.recipe.patience)):
            has_step = not losses
            try:
                if losses:
                    run, data = self._on_another_device(given)
                    has_step = True
                self._epoch(run, data, given)
                losses.clear()
            except DeviceLost as problem:
                losses.append(has_step)
                if self.folder is None:
                    raise
                if len(losses) == MOST_LOSSES:
                    raise DeviceLost(why_lost(problem, losses)) from problem
                log.warning("%s; asking for another device, to go on from the last checkpoint", problem)
        return run

    def _epoch(self, run: Run, data: dict[str, Any], given: Given) -> None:
        epoch = len(run.history)
        frozen = self._freezer.freeze(self.step, self.recipe, epoch)
        mutation, sieved = self._mutate(epoch, given), self._sieve_data(epoch)
        if mutation is not None:
            self._watchers.on_mutation(epoch + 1, mutation)
        trained = self._train(epoch, given)
        if broken := self.step.not_finite():
            raise self._diverged(
                f"{_some(broken)} not finite after epoch {epoch + 1}, learning rate {trained['lr']:.3g}", epoch
            )
        evaluated = judge_all(self.step, self.judge, given, epoch + 1, self.folder, self.recipe.evaluates(epoch))
        for name, value in evaluated.items():
            if value is not None and not math.isfinite(value):
                raise self._diverged(f"{name} is {value} after epoch {epoch + 1}", epoch)
        metrics = {
            "epoch": epoch + 1,
            "metric": self.judge.main.name,
            **trained,
            **evaluated,
            "mutation": mutation,
            "sieve": sieved,
            **self._survival.describe(),
            "memory_bytes": self.step.memory(),
            **({"freeze": frozen} if frozen else {}),
            **({"budget": self._chooser.told} if self._chooser.told else {}),
        }
        if self.specialize:
            metrics["kernels"] = {name: asdict(times) for name, times in self.step.kernel_times().items()}
        self._keep(run, metrics, data, f"{given.chooses}_{self.judge.main.name}", given)
        self._watchers.on_epoch(metrics)

    @property
    def _watchers(self) -> Watchers:
        return Watchers(self._shown, self.callbacks)

    def _on_another_device(self, given: Given) -> tuple[Run, dict[str, Any]]:
        """The run as its last checkpoint has it, on whatever device the tracker gives. Raises DeviceLost."""
        assert self.folder is not None
        self.step.reconnect()
        _, *self._resumed = restored(self.folder, lambda path: (self.step, *self.step.restore(path)))
        run, data = self._begin(given)
        log.warning("the run goes on at epoch %d", len(run.history) + 1)
        return run, data

    def _begin(self, given: Given) -> tuple[Run, dict[str, Any]]:
        """A run with the epochs that are done, and the JSON-able facts about its data."""
        data = given.describe()
        run = Run(self.recipe, folder=self.folder.path if self.folder else None)
        self._sieve = Sieve(len(given.train)) if self.recipe.sieve else None
        if self.recipe.freeze and not self._freezer:  # by times, for which there must be data
            profile = partial(self.step.profile, *given.batch(self.step, self.judge, np.random.default_rng(0)))
            self._freezer = Freezer.of_run(self.recipe, self.step, profile)
        self._freezer.prepare(self.step)
        self._survival = Survival(self.step)
        if self._resumed is not None:
            extra, arrays = self._resumed
            if extra["data"] != data:
                part = next(part for part in extra["data"] | data if extra["data"].get(part) != data.get(part))
                if part not in extra["data"] or part not in data:
                    raise StateError(
                        f"the run {'had no' if part in data else 'had a'} {part} set; a run resumes on its own data"
                    )
                raise StateError(
                    f"the run was trained on {extra['data'][part]['name']}; this is other data: {data[part]['name']}, "
                    f"{data[part]['examples']} examples. A run resumes on its own data, labels and order included"
                )
            run.history, run.best, self._chooser.told = list(extra["history"]), extra["best"], extra.get("budget")
            if self._sieve:
                self._sieve.restore(arrays)
            self._survival.restore(arrays, extra["first_live"])
            assert self.folder is not None
            self.folder.remove_torn()
            self.folder.rewrite_metrics(run.history)
            if self._otherwise:
                self._otherwise = False
                self.folder.keep_previous()
                self._save(self.folder.checkpoint, run, data)  # so that it is known where this is stopped
        if broken := self.step.not_finite():
            raise self._diverged(f"{_some(broken)} not finite before training", len(run.history))
        if self._resumed is None:
            check_start(self.recipe, self.step)
            self._chooser.choose(self.step, 0, partial(given.batch, self.step, self.judge))
        if self._resumed is None and self.folder:
            self.folder.begin(
                self.recipe.to_dict(),
                {
                    "seed": self.recipe.seed,
                    "began": datetime.now(UTC).isoformat(timespec="seconds"),
                    "data": data,
                    "step": self.step.describe(),
                    "machine": machine(),
                    "versions": {"mest-compile": __version__, "numpy": np.__version__},
                },
                self.source,
            )
            self._save(self.folder.checkpoint, run, data)  # so that a run stopped in its first epoch can be resumed
        return run, data

    def _mutate(self, epoch: int, given: Given) -> dict[str, Any] | None:
        phase = self.recipe.mutation_at(epoch)
        if phase is None:
            return None
        said: dict[str, Any] = {"prune_to": phase.prune_to, "grow_to": phase.grow_to}
        common: dict[str, Any] = {
            "importance_lambda": self.recipe.importance_lambda,
            "rng": np.random.default_rng([self.recipe.seed, epoch, MUTATION]),
        }
        gradients = {}
        if self.recipe.method == "rigl":
            batch = given.batch(self.step, self.judge, np.random.default_rng([self.recipe.seed, epoch, GRADIENT]))
            gradients["gradients"], said["dense_gradient_bytes"] = self.step.dense_gradients(*batch)
        if self.recipe.starts_dense:
            report = self.step.prune(to=phase.prune_to, **common)
        else:
            report = self.step.mutate(prune_to=phase.prune_to, grow_to=phase.grow_to, **common, **gradients)
        settled = self._freezer.settle(self.step, self.recipe, epoch)
        return {
            **said,
            "moved": self._survival.mutated(),
            "layers": dict(Counter(report.layers.values())),
            "seconds": report.seconds + settled,
            "reindex_seconds": report.reindex_seconds,
            "uploaded_bytes": report.uploaded_bytes,
        }

    def _steps_between_mutations(self, examples: int) -> int | None:
        """Fewest steps between two mutations of the recipe; None where there is at most one."""
        epochs = [epoch for epoch in range(self.recipe.epochs) if self.recipe.mutation_at(epoch)]
        gaps = [after - before for before, after in itertools.pairwise(epochs)]
        return min(gaps) * batches_of(examples, self.step.batch, bool(self.recipe.drop_last)) if gaps else None

    def _sieve_data(self, epoch: int) -> dict[str, Any] | None:
        if not self._sieve or not self.recipe.sieve or not self.recipe.sieve.due(epoch, self.recipe.epochs):
            return None
        said = self._sieve.drop(
            self.recipe.sieve, np.random.default_rng([self.recipe.seed, epoch, SIEVE]), self.step.batch
        )
        if said["spared"]:
            log.warning(
                "the sieve would have left %d examples, less than a batch of %d; the %d forgotten most stay as well",
                said["kept"] - said["spared"],
                self.step.batch,
                said["spared"],
            )
        return said

    def _train(self, epoch: int, given: Given) -> dict[str, Any]:
        rates, sieve = partial(self._freezer.rates, self.recipe, epoch), self._sieve
        return train_epoch(
            self.step, self.judge, self.recipe, epoch, given, sieve, rates, self._watchers, self._diverged
        )

    def _keep(self, run: Run, metrics: dict[str, Any], data: dict[str, Any], key: str, given: Given) -> None:
        """Adds an epoch to the run and its folder; the checkpoint comes last, so what it says is always on disk.

        key  of the metric that the best model is chosen by
        """
        run.history.append(metrics)
        score, best = metrics[key], None if run.best is None else run.best[key]
        improved = self.recipe.meets_target(metrics["epoch"] - 1) and self.judge.improves(score, best)
        if improved:
            run.best = {"epoch": metrics["epoch"], key: score}
        if self.folder:
            self.folder.append_metrics(metrics)
            if improved:
                self._save(self.folder.best, run, data)
        chosen = len(run.history) < self.recipe.epochs and self._chooser.choose(
            self.step, len(run.history), partial(given.batch, self.step, self.judge)
        )
        if self.folder:
            self.folder.keep_previous()
            if improved and not chosen:
                self.folder.keep_best()
            else:
                self._save(self.folder.checkpoint, run, data)

    def _diverged(self, what: str, epochs: int) -> MestError:
        """What came after `epochs` whole ones."""
        whole = f"Epoch {epochs} is the last whole one" if epochs else "No epoch is whole"
        kept = ""
        if self.folder:
            self.folder.write_diverged(what, epochs)
            kept = f", {self.folder.checkpoint} holds the model {'after it' if epochs else 'before training'}"
        return MestError(f"{what}; lower lr or add warmup_epochs. {whole}{kept}")

    def _save(self, path: Path, run: Run, data: dict[str, Any]) -> None:
        self.step.save(
            path,
            {
                "epoch": len(run.history),
                "recipe": self._begun.to_dict(),
                "continued": self._continued,
                "data": data,
                "best": run.best,
                "history": run.history,
                "first_live": self._survival.first_live,
                **({"freezing": self._freezer.to_json()} if self._freezer else {}),
                **({"budget": self._chooser.told} if self._chooser.told else {}),
            },
            self._survival.arrays() | (self._sieve.arrays() if self._sieve else {}),
        )

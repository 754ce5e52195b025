"""Training as seen on stderr: a bar with time left on a terminal, and one line an epoch anywhere."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

SMOOTHING = 0.9  # the shown loss is a moving mean over about ten batches; single batches jump too much to read


class TrainingProgress:
    """Implements training.Progress on a rich console; a context manager.

    batch  examples per step
    """

    def __init__(self, console: Console, batch: int):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console, self._batch = console, batch
        self._bar = Progress(TextColumn("epoch {task.fields[epoch]}"), BarColumn(), TimeRemainingColumn(),
                             TextColumn("loss {task.fields[loss]:.4f}  {task.fields[accuracy]}{task.fields[rate]:.0f} images/s"),
                             console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=None, epoch="", loss=0.0, accuracy="", rate=0.0)
        self._loss: float | None = None
        self._accuracy, self._epochs = "", 0
        self._last = perf_counter()

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.stop()

    def on_batch(self, epoch: int, epochs: int, batch: int, batches: int, loss: float) -> None:
        now = perf_counter()
        rate, self._last, self._epochs = self._batch / (now - self._last), now, epochs
        self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        self._bar.update(self._task, total=epochs * batches, completed=(epoch - 1) * batches + batch, epoch=f"{epoch}/{epochs}",
                         loss=self._loss, accuracy=self._accuracy, rate=rate)

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        tested = metrics["test_accuracy"]
        parts = [f"epoch {metrics['epoch']}/{self._epochs}", f"loss {metrics['loss']:.4f}", f"train {metrics['train_accuracy']:.2%}",
                 "test -" if tested is None else f"test {tested:.2%}", f"{metrics['images_per_second']:.0f} images/s"]
        if mutation := metrics["mutation"]:
            fates = ", ".join(f"{count} {fate}" for fate, count in mutation["layers"].items())
            parts.append(f"mutated: {fates} in {mutation['seconds']:.2f} s")
        if tested is not None:
            self._accuracy = f"test {tested:.2%}  "
        self._console.print("  ".join(parts), highlight=False, markup=False, soft_wrap=True)
        self._last = perf_counter()

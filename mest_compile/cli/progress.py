"""Training as seen on stderr: a bar with time left on a terminal, and one line an epoch anywhere."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from mest_compile.training.metrics import Metric

SMOOTHING = 0.9  # loss and accuracy shown are moving means over about ten batches; single batches jump too much to read


class TrainingProgress:
    """Implements training.Progress on a rich console; a context manager.

    batch   examples per step
    metric  how good answers are
    """

    def __init__(self, console: Console, batch: int, metric: Metric):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console, self._batch, self._metric = console, batch, metric
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  train {task.fields[right]}"),
            TextColumn("{task.fields[state]}{task.fields[rate]:.0f} images/s"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, epoch="", loss=0.0, right="-", state="", rate=0.0)
        self._means: tuple[float, float] | None = None
        self._state, self._epochs = "", 0
        self._last = perf_counter()

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.stop()

    def on_batch(self, epoch: int, epochs: int, batch: int, batches: int, loss: float, correct: float) -> None:
        now = perf_counter()
        rate, self._last, self._epochs = self._batch / (now - self._last), now, epochs
        old = self._means or (loss, correct)
        self._means = SMOOTHING * old[0] + (1 - SMOOTHING) * loss, SMOOTHING * old[1] + (1 - SMOOTHING) * correct
        self._bar.update(
            self._task,
            total=epochs * batches,
            completed=(epoch - 1) * batches + batch,
            epoch=f"{epoch}/{epochs}",
            loss=self._means[0],
            right=self._metric.shown(self._means[1]),
            state=self._state,
            rate=rate,
        )

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        metric = self._metric
        trained, tested = (metrics[f"{part}_{metric.name}"] for part in ("train", "test"))
        parts = [
            f"epoch {metrics['epoch']}/{self._epochs}",
            f"loss {metrics['loss']:.4f}",
            f"train {metric.shown(trained)}",
            f"test {metric.shown(tested)}",
            f"{metrics['images_per_second']:.0f} images/s",
        ]
        state = [] if tested is None else [f"test {metric.shown(tested)}"]
        if (sparsity := metrics["overall_sparsity"]) is not None:
            state.append(f"sparsity {sparsity:.3f}")
            parts.append(state[-1])
        if mutation := metrics["mutation"]:
            fates = ", ".join(f"{count} {fate}" for fate, count in mutation["layers"].items())
            parts.append(
                f"mutated ({mutation['prune_to']:g} to {mutation['grow_to']:g}): {fates} in {mutation['seconds']:.2f} s"
            )
        if (freeze := metrics.get("freeze")) and freeze["now"]:
            parts.append(f"froze {', '.join(freeze['now'])} in {freeze['seconds']:.2f} s")
        if freeze and freeze["saved"]:
            state.append(f"frozen {freeze['saved']:.0%}")
        if sieve := metrics["sieve"]:
            parts.append(f"sieve: {sieve['dropped']} examples dropped, {sieve['returned']} came back")
        if saved := metrics["iterations_saved"]:
            state.append(f"sieved {saved / (saved + metrics['iterations']):.1%}")
        self._state = "".join(f"{part}  " for part in state)
        self._console.print("  ".join(parts), highlight=False, markup=False, soft_wrap=True)
        self._last = perf_counter()

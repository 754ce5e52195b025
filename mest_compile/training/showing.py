"""Training as it is seen: a bar with time left on a terminal, and a line of a table an epoch anywhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from time import perf_counter
from typing import TYPE_CHECKING, Any

from mest_compile.base.screens import in_notebook, screen
from mest_compile.training.run import Progress, Silent

if TYPE_CHECKING:
    from rich.console import Console

    from mest_compile.training.metrics import Metric

LOSS_WIDTH, SCORE_WIDTH = 8, 7
SMOOTHING = 0.9  # loss and accuracy shown are moving means over about ten batches; single batches jump too much to read


class TrainingProgress:
    """Implements `Progress` on a rich console; a context manager.

    batch   examples per step
    metric  how good answers are
    """

    def __init__(self, console: Console, batch: int, metric: Metric):
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._console, self._batch, self._metric = console, batch, metric
        self._bar = Bar(
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
        self._columns: list[str] | None = None
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
        if self._columns is None:
            self._columns = [
                name for name in ("train", "val", "test") if metrics.get(f"{name}_{metric.name}") is not None
            ]
            self._print(["epoch", "loss", *self._columns, "images/s", "sparsity"], [])
        scores = [metric.shown(metrics.get(f"{name}_{metric.name}")) for name in self._columns]
        sparsity = metrics["overall_sparsity"]
        cells = [
            f"{metrics['epoch']}/{self._epochs}",
            f"{metrics['loss']:.4f}",
            *scores,
            f"{metrics['images_per_second']:.0f}",
            "dense" if sparsity is None else f"{sparsity:.3f}",
        ]
        self._print(cells, notes_of(metrics))
        state = [f"{name} {score}" for name, score in zip(self._columns, scores) if name != "train"]
        if (freeze := metrics.get("freeze")) and freeze["saved"]:
            state.append(f"frozen {freeze['saved']:.0%}")
        if saved := metrics["iterations_saved"]:
            state.append(f"sieved {saved / (saved + metrics['iterations']):.1%}")
        self._state = "".join(f"{part}  " for part in state)
        self._last = perf_counter()

    def _print(self, cells: list[str], notes: list[str]) -> None:
        line = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, self._widths()))
        self._console.print("  ".join([line, *notes]), highlight=False, markup=False, soft_wrap=True)

    def _widths(self) -> list[int]:
        return [max(5, 2 * len(str(self._epochs)) + 1), LOSS_WIDTH, *[SCORE_WIDTH] * len(self._columns or ()), 8, 8]


def notes_of(metrics: Mapping[str, Any]) -> list[str]:
    """What an epoch changed beside the weights; nothing where nothing did."""
    found = []
    if (mutation := metrics["mutation"]) and mutation.get("moved"):
        found.append(f"moved {mutation['moved']:.1%}")
    if (freeze := metrics.get("freeze")) and freeze["now"]:
        names = freeze["now"]
        found.append(f"froze {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}")
    if (budget := metrics.get("budget")) and budget["since"] == metrics["epoch"]:
        found.append(f"trains {len(budget['layers'])} of {budget['of']} layers")
    if sieve := metrics["sieve"]:
        found.append(f"sieved {sieve['dropped']}" + (f", {sieve['returned']} back" if sieve["returned"] else ""))
    return found


class LastLine(Silent):
    """Keeps what there is to say of a training that nobody watches."""

    def __init__(self, metric: Metric):
        self._metric = metric
        self.said = ""

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        scores = [
            f"{part} {self._metric.label} {self._metric.shown(value)}"
            for part in ("train", "val", "test")
            if (value := metrics.get(f"{part}_{self._metric.name}")) is not None
        ]
        self.said = ", ".join([f"trained {metrics['epoch']} epochs: loss {metrics['loss']:.4f}", *scores])


@contextmanager
def watched(progress: Progress | None, batch: int, metric: Metric) -> Iterator[Progress]:
    """`progress`; of None what is shown by itself: on a terminal a bar and a line an epoch, in a notebook a line an
    epoch, as text, elsewhere one line on stderr when it has ended."""
    if progress is not None:
        yield progress
        return
    where = screen()
    if where is None or find_spec("rich") is None:  # a device need not have it
        last = LastLine(metric)
        yield last
        if last.said:
            print(last.said, file=sys.stderr)
        return
    from rich.console import Console

    plain = {"force_terminal": False, "force_jupyter": False, "width": 100} if in_notebook() else {}
    with TrainingProgress(Console(file=where, **plain), batch, metric) as shown:  # type: ignore[arg-type]
        yield shown

"""`mest-compile sweep`: every cell of a grid, none of them twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mest_compile.base.errors import UsageError
from mest_compile.cli.output import Json, print_json, print_table, stderr_console

if TYPE_CHECKING:
    from mest_compile.sweeping.pace import Estimate
    from mest_compile.sweeping.results import SweepResults
    from mest_compile.sweeping.running import Progress

MOST_ROWS = 30  # of the table that is shown while it trains

Ray = Annotated[
    str | None,
    typer.Option(help="Address of a Ray cluster whose nodes see the same folders (auto: the one here): train there."),
]
Csv = Annotated[Path | None, typer.Option("--csv", help="File for a line a cell.")]
Html = Annotated[Path | None, typer.Option("--html", help="File for one page: table, accuracy against speed, curves.")]


def sweep(
    plan: Annotated[Path, typer.Argument(help="Recipe as TOML with [grid], [zip] or [[list]], and [asha].")],
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep. Default: runs/NAME of NAME.toml.")] = None,
    ray: Ray = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Train nothing: say what is there, and what the rest takes, time and memory."),
    ] = False,
    csv: Csv = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Train every cell of a grid, as many at once as cores and memory allow; what is finished is not trained again, and
    what was stopped goes on."""
    from mest_compile.sweeping.sweep import foresee
    from mest_compile.sweeping.sweep import sweep as run

    if dry_run:
        if others := [name for name, value in (("ray", ray), ("csv", csv), ("html", html)) if value is not None]:
            raise UsageError(f"--dry-run trains nothing; leave out --{others[0]}")
        _show_estimate(foresee(plan, out, _measuring), as_json)
        return
    with LiveTable() as table:
        found = run(plan, out, table.told, ray)
    write(found, csv, html)
    show(found, as_json)


def write(found: SweepResults, csv: Path | None, html: Path | None) -> None:
    if csv is not None:
        found.to_csv(csv)
    if html is not None:
        found.to_html(html)


def show(found: SweepResults, as_json: bool) -> None:
    if as_json:
        print_json(found.to_dict())
        return
    print_table(found.columns(), found.cells())
    for row in found.rows:
        if row["problem"]:
            said = ", ".join(f"{key} {value}" for key, value in row["settings"].items())
            print(f"{said}: {row['problem']}")
    print(f"\n{found.trained_now} epochs trained; cells in {found.folder}/cells")


def _measuring(what: str, number: int, count: int) -> None:
    line = f"measuring {number + 1} of {count}: {what}"
    stderr_console().print(line, highlight=False, markup=False, soft_wrap=True)


def _show_estimate(found: Estimate, as_json: bool) -> None:
    said = found.to_dict()
    if as_json:
        print_json(said)
        return
    names = list(dict.fromkeys(name for row in found.rows for name in row["settings"]))
    rows = [
        [
            *(str(row["settings"].get(name, "")) for name in names),
            row["state"],
            *(row[name] for name in ("epochs", "epochs_left")),
            *(
                "-" if row[name] is None else f"{row[name]:.2f}"
                for name in ("begin_seconds", "epoch_seconds", "seconds_left")
            ),
            "-" if row["planned_bytes"] is None else f"{row['planned_bytes'] / 2**20:.1f}",
            row["source"] or "-",
        ]
        for row in found.rows
    ]
    columns = ["state", "epochs", "left", "s to begin", "s an epoch", "s left", "planned MiB", "by"]
    print_table([*names, *columns], rows)
    print(
        f"\n{said['cells_left']} of {len(rows)} cells and {said['epochs_left']} epochs left: about "
        f"{said['seconds'] / 60:.1f} min with {said['at_once']} at once, of it {said['begin_seconds'] / 60:.1f} min to "
        f"begin, imports and compiling; up to {said['planned_bytes'] / 2**20:.1f} MiB planned for a step"
    )


class LiveTable:
    """On a terminal the cells that train and the best so far, elsewhere a line when a cell has ended; a context
    manager. `told` is a sweep's `progress`."""

    def __init__(self) -> None:
        from rich.live import Live

        self._console, self._began = stderr_console(), perf_counter()
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._ended: set[str] | None = None

    def __enter__(self) -> LiveTable:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._live.stop()

    def told(self, cells: Sequence[Progress]) -> None:
        ended = {one.cell.key for one in cells if one.finished or one.problem is not None}
        for one in cells if self._ended is not None else ():
            if one.cell.key in ended - (self._ended or set()):
                said = ", ".join(f"{key} {value}" for key, value in one.cell.varied.items())
                line = f"{len(ended)} of {len(cells)}: {said}: {one.problem or f'finished, {one.done} epochs'}"
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._ended = ended
        if self._console.is_terminal:
            self._live.update(self._table(cells, len(ended)), refresh=True)

    def say(self, what: str) -> None:
        """Tells what comes after the cells."""
        self._live.stop()
        self._console.print(what, highlight=False, markup=False, soft_wrap=True)

    def _table(self, cells: Sequence[Progress], ended: int) -> Any:
        from rich.table import Table

        from mest_compile.sweeping.running import metric_of
        from mest_compile.training.metrics import main_metric

        metric = metric_of(cells)
        names = list(dict.fromkeys(name for one in cells for name in one.cell.varied))
        running = [one for one in cells if one.running]
        scored = [f"{part} {metric.label}" for part in ("val", "test")]
        table = Table(*names, "state", "epochs", *scored, box=None, pad_edge=False)
        others = sorted((one for one in cells if one.done and not one.running), key=_rank, reverse=True)
        for one in [*running, *others][:MOST_ROWS]:
            written = one.running and one.cell.run.metrics.is_file()
            history = one.cell.run.read_metrics() if written else one.state.history
            last = history[-1] if history else {}
            scores = [metric.shown(last.get(f"{part}_{main_metric(last).name}")) for part in ("val", "test")]
            said = [str(one.cell.varied.get(name, "")) for name in names]
            table.add_row(*said, one.word, f"{len(history)}/{one.cell.recipe.epochs}", *scores)
        minutes = (perf_counter() - self._began) / 60
        table.caption = f"{ended} of {len(cells)} cells ended, {len(running)} train; {minutes:.0f} min"
        return table


def _rank(one: Progress) -> float:
    """The better, the higher."""
    score = one.score(one.done)
    return float("-inf") if score is None else score

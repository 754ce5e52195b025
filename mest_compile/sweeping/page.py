"""The page of a sweep (`results.SweepResults`): its table, accuracy against speed, every cell's curve."""

from __future__ import annotations

import html
from functools import partial
from typing import TYPE_CHECKING, Any

from mest_compile.base.figures import svg
from mest_compile.base.pages import page, plots, table
from mest_compile.training.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMED = 12  # curves that a legend names


def page_of(results: Any) -> str:
    name = results.folder.rstrip("/").rpartition("/")[2]
    states = [row["state"] for row in results.rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    epochs = sum(row["epochs"] for row in results.rows)
    parts = [f"<h1>{html.escape(name)}</h1>", f"<p>{len(states)} cells: {counts}; {epochs} epochs trained.</p>"]
    if (best := results.best) is not None:
        said = name_of(best, results) or "the only cell"
        shown = METRICS[results.metric].shown(results.score(best))
        parts.append(
            f"<p>Best {'test' if best['val'] is None else 'validation'} score: {html.escape(said)}, {shown}.</p>"
        )
    parts.append(table(results.cells(), results.columns()))
    drawn = {"Accuracy against speed": svg(partial(draw_pareto, results))} if results.pareto else {}
    if any(row["curve"] for row in results.rows):
        drawn["Curves"] = svg(partial(draw_curves, results))
    parts.append(plots(drawn))
    if results.pareto:
        parts.append("<p>Cells that trained at the same time share the machine: their speeds are lower than alone.</p>")
    problems = [(name_of(row, results), row["problem"]) for row in results.rows if row["problem"]]
    if problems:
        parts += ["<h2>What went wrong</h2>", table(problems, ("cell", "problem"))]
    return page(f"Sweep {name}", parts)


def name_of(row: dict, results: Any) -> str:
    """A cell by what it has of its own."""
    return " ".join(str(row["settings"][name]) for name in results.settings if name in row["settings"])


def draw_pareto(results: Any, figure: Figure) -> None:
    """Every finished cell, and a line through those that no other beats in both."""
    axes = figure.add_subplot()
    finished = [row for row in results.rows if row["state"] == "finished" and results.score(row) is not None]
    axes.plot(*_places(finished, results), "o", color="grey", label="finished cells")
    axes.plot(*_places(results.pareto, results), "o-", color="C1", label="none is faster and as good")
    for row in results.pareto:
        axes.annotate(name_of(row, results), (row["images_per_second"], results.score(row) or 0.0), fontsize="x-small")
    axes.set(xlabel="images per second", ylabel=METRICS[results.metric].label)
    axes.legend()


def _places(rows: list[dict], results: Any) -> tuple[list[float], list[float]]:
    return [row["images_per_second"] for row in rows], [results.score(row) or 0.0 for row in rows]


def draw_curves(results: Any, figure: Figure) -> None:
    """The score of every cell over its epochs."""
    axes = figure.add_subplot()
    named = len(results.rows) <= MOST_NAMED
    for row in results.rows:
        points = [(one["epoch"], value) for one in row["curve"] if (value := results.score(one)) is not None]
        label = name_of(row, results) if named else None
        axes.plot([epoch for epoch, _ in points], [value for _, value in points], marker=".", label=label, linewidth=1)
    axes.set(xlabel="epoch", ylabel=METRICS[results.metric].label)
    if named and len(results.rows) > 1:
        axes.legend(fontsize="x-small")

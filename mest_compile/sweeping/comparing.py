"""Methods, schemes and sparsities beside dense torch: a sweep, and a table of accuracy, speed and memory."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from mest_compile.base import checks
from mest_compile.base.errors import UsageError
from mest_compile.base.figures import svg
from mest_compile.base.pages import page, plots, table, write_page
from mest_compile.measuring.speedtable import speed_table
from mest_compile.measuring.table import Row as Speed
from mest_compile.sparsity import parse_scheme
from mest_compile.sweeping import dense
from mest_compile.sweeping.cell import make_cell
from mest_compile.sweeping.page import draw_curves
from mest_compile.sweeping.results import SweepResults
from mest_compile.sweeping.room import shape
from mest_compile.sweeping.sweep import Tell, read, sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20
TORCH = "dense torch"
COLUMNS = ("scheme", "sparsity", "method", "test accuracy", "seeds", "speed-up", "interval", "peak MiB", "of torch's")


@dataclass(frozen=True, slots=True)
class Compared:
    """One method of one scheme at one sparsity; dense torch has neither sparsity nor speed-up.

    accuracies  of the test part after the last epoch, one a seed that came to its end; its spread is their standard
                deviation
    speedup, low, high, confidence  of a whole step over torch's, as `mest.speed_table` measures them, of a step at this
                sparsity; None where it could not
    peak_bytes, of_dense  highest resident set while training, and its share of dense torch's
    problem     why accuracies or speeds are missing
    """

    scheme: str
    sparsity: float | None
    method: str
    accuracies: tuple[float, ...]
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    peak_bytes: int | None = None
    of_dense: float | None = None
    problem: str | None = None

    @property
    def mean(self) -> float | None:
        return fmean(self.accuracies) if self.accuracies else None

    @property
    def spread(self) -> float | None:
        """Of two seeds or more."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def cells(self) -> list[str]:
        """As text, under COLUMNS."""
        spread = "" if self.spread is None else f" ± {100 * self.spread:.2f}"
        share = "" if self.sparsity is None else f"{100 * self.sparsity:g}%"
        return [
            self.scheme,
            share,
            self.method,
            "-" if self.mean is None else f"{100 * self.mean:.2f}{spread}",
            str(len(self.accuracies)),
            "-" if self.speedup is None else f"{self.speedup:.2f}",
            "-" if self.low is None else f"{self.low:.2f} to {self.high:.2f}",
            "-" if self.peak_bytes is None else f"{self.peak_bytes / MIB:.0f}",
            "-" if self.of_dense is None else f"{self.of_dense:.2f}",
        ]


@dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """rows  dense torch first
    cells  of the sweep
    speeds  the table that speed and memory are from
    """

    rows: tuple[Compared, ...]
    cells: SweepResults
    speeds: Any

    def __repr__(self) -> str:
        return "\n".join("\t".join(line) for line in (COLUMNS, *(row.cells() for row in self.rows)))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        rows = [{**asdict(row), "mean": row.mean, "spread": row.spread} for row in self.rows]
        return {"rows": rows, "sweep": self.cells.to_dict(), "speeds": self.speeds.to_dict()}

    def caption(self) -> str:
        epochs = self.cells.rows[0]["of_epochs"]
        return (
            f"Accuracy on the test part after the last of {epochs} epochs, mean and standard deviation over seeds. "
            f"Speed and memory: {self.speeds.caption()}"
        )

    def to_html(self, path: str | Path) -> None:
        """One page that needs nothing else. Raises UsageError when it cannot be written."""
        title = f"Sparse training of {self.speeds.facts['model']}"
        parts = [f"<h1>{html.escape(title)}</h1>", table([row.cells() for row in self.rows], COLUMNS)]
        drawn = {"Accuracy against speed": svg(self._draw), "Curves": svg(partial(draw_curves, self.cells))}
        parts += [f"<p>{html.escape(self.caption())}</p>", plots(drawn), "<h2>Every run</h2>"]
        parts.append(table(self.cells.cells(), self.cells.columns()))
        if problems := [(*row.cells()[:3], row.problem) for row in self.rows if row.problem]:
            parts += ["<h2>What went wrong</h2>", table(problems, (*COLUMNS[:3], "problem"))]
        write_page(path, page(title, parts))

    def _draw(self, figure: Figure) -> None:
        """Accuracy against speed-up, with spread and interval."""
        axes = figure.add_subplot()
        for row in self.rows:
            if row.mean is None or row.speedup is None:
                continue
            reach = None if row.low is None else [[row.speedup - row.low], [(row.high or row.speedup) - row.speedup]]
            label = " ".join(filter(None, row.cells()[:3]))
            spread = [100 * (row.spread or 0.0)]
            axes.errorbar([row.speedup], [100 * row.mean], spread, reach, fmt="o", capsize=3, label=label)
        axes.set(xlabel="speed-up over dense torch, whole step", ylabel="test accuracy, %")
        axes.legend(fontsize="x-small")


def compare(
    base: Mapping[str, Any],
    methods: Sequence[str],
    schemes: Sequence[str],
    sparsities: Sequence[float],
    seeds: int,
    out: str | os.PathLike,
    repeats: int = 9,
    progress: Tell | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> Comparison:
    """Trains every method with every scheme at every sparsity, and dense torch beside them, each from `seeds` seeds;
    then times a step of each scheme and sparsity against torch's, alone on the machine.

    base     a recipe's table with its table [run], as a sweep has it
    out      folder, in which what is there is neither trained nor timed again
    repeats  rounds of each pair that is timed
    progress, say  told about the sweep's cells; about what comes after them
    Raises as `mest.sweep` and `mest.speed_table` do.
    """
    seeds = checks.whole("seeds", seeds, 1)
    if not (methods and schemes and sparsities):
        raise UsageError("one or more methods, schemes and sparsities are wanted")
    names = [str(parse_scheme(scheme)) for scheme in schemes]
    grid = {"scheme": names, "sparsity": list(sparsities), "method": list(methods), "seed": list(range(seeds))}
    plan, root = {**base, "grid": grid}, Path(out).absolute()
    first, beside = read(plan, root)[0][0], _beside(base, seeds, root)
    dense.check(beside[0])
    found = sweep(plan, root, progress)
    say("training dense torch")
    accuracies = [one["test"] for one in dense.trained(beside)]
    say("timing steps")
    run = first.settings["run"]
    speeds = speed_table(
        run["model"],
        shape(first),
        names,
        sparsities,
        threads=first.threads,
        repeats=repeats,
        width=run.get("width"),
        classes=first.data.outputs,
        progress=lambda what, done, total: say(f"timing {what}: {done} of {total}"),
        out=root / "speed",
    )
    result = Comparison(tuple(_rows(found, accuracies, speeds.rows)), found, speeds)
    write_page(root / "compare.json", json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n")
    return result


def _beside(base: Mapping[str, Any], seeds: int, root: Path) -> list[Any]:
    """The cells that torch trains."""
    run = {**base.get("run", {}), "scheme": "dense"}
    kept = {key: value for key, value in base.items() if key not in ("mutate_every", "importance_lambda", "phases")}
    settings = [{**kept, "method": "static", "seed": seed, "run": run} for seed in range(seeds)]
    return [make_cell(one, {"scheme": TORCH, "seed": one["seed"]}, root / "torch") for one in settings]


def _rows(found: SweepResults, dense_accuracies: Sequence[float], speeds: Sequence[Speed]) -> list[Compared]:
    measured = {(one.scheme, one.sparsity): one for one in speeds}
    peak = next((one.baseline_peak_bytes for one in speeds if one.baseline_peak_bytes), None)
    rows = [Compared(TORCH, None, "", tuple(dense_accuracies), 1.0, None, None, None, peak, peak and 1.0)]
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for cell in found.rows:
        said = cell["settings"]
        groups.setdefault((said["scheme"], said["sparsity"], said["method"]), []).append(cell)
    for (scheme, sparsity, method), cells in groups.items():
        speed = measured[scheme, sparsity]
        problems = [cell["problem"] for cell in cells] + [speed.problem]
        theirs = speed.baseline_peak_bytes
        share = None if speed.peak_bytes is None or not theirs else speed.peak_bytes / theirs
        rows.append(
            Compared(
                scheme,
                sparsity,
                method,
                tuple(cell["test"] for cell in cells if cell["state"] == "finished" and cell["test"] is not None),
                *(speed.speedup, speed.speedup_low, speed.speedup_high, speed.confidence, speed.peak_bytes, share),
                "; ".join(filter(None, problems)) or None,
            )
        )
    return rows

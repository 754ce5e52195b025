"""A comparison of two sides as a page."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING

from mest_compile.base.figures import svg
from mest_compile.base.pages import page, plots, table, write_page
from mest_compile.hardware.host import BUSY
from mest_compile.measuring.benchmark import Comparison, Side

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("", "median ms", "min ms", "max ms", "images/s", "setup s", "training peak MiB")


def cells(comparison: Comparison) -> list[list[str]]:
    """A row a side, under `COLUMNS`."""

    def row(side: Side) -> list[str]:
        times = (side.median_seconds, min(side.round_seconds), max(side.round_seconds))
        return [
            side.name,
            *(f"{seconds * 1e3:.2f}" for seconds in times),
            f"{comparison.case.input_shape[0] / side.median_seconds:.0f}",
            f"{side.setup_seconds:.1f}",
            f"{side.training_peak_bytes / 2**20:.0f}",
        ]

    return [row(comparison.ours), row(comparison.rival)]


def caption(comparison: Comparison) -> str:
    """The ratio, how sure it is, and whether the machine was busy."""
    low, high, confidence = comparison.ratio_interval
    said = (
        f"{comparison.rival.name} / {comparison.ours.name}: {comparison.ratio:.2f} ({confidence:.0%} interval of "
        f"{len(comparison.ratios)} rounds: {low:.2f} to {high:.2f}); {comparison.case.threads} thread(s), "
        f"{comparison.machine['cpu']}"
    )
    if (others := comparison.machine.get("others_cores", 0.0)) > BUSY:
        said = f"{said}. The machine was busy, others used {others:.1f} cores: times do not compare with others"
    return said


def write_sheet(comparison: Comparison, path: str | Path) -> None:
    """One page that needs nothing else: both sides, round by round. Raises UsageError when it cannot be written."""
    case, machine = comparison.case, comparison.machine
    about = [
        ("model", case.model if case.width is None else f"{case.model}, width {case.width}"),
        ("input", "x".join(map(str, case.input_shape))),
        ("scheme", case.options.scheme_text),
        ("sparsity", "the scheme's" if case.options.one_sparsity is None else case.options.one_sparsity),
        ("target", case.options.target),
        ("machine", f"{machine['cpu']}, {machine.get('cores', '?')} cores, {machine.get('system', '')}"),
        ("load before", f"{machine.get('load_before', 0.0):.1f}"),
        ("cores that others used", f"{machine.get('others_cores', 0.0):.1f}"),
        ("measured", comparison.measured_at),
        ("versions", ", ".join(f"{name} {version}" for name, version in comparison.versions.items())),
    ]

    def rounds(figure: Figure) -> None:
        axes = figure.add_subplot()
        for side in (comparison.ours, comparison.rival):
            numbers = range(1, len(side.round_seconds) + 1)
            axes.plot(numbers, [1e3 * seconds for seconds in side.round_seconds], ".-", label=side.name)
        axes.set(xlabel="round", ylabel="milliseconds a step", ylim=(0, None))
        axes.legend()

    title = f"{case.model}: {comparison.ours.name} beside {comparison.rival.name}"
    notes = [f"{side.name}: {note}" for side in (comparison.ours, comparison.rival) for note in side.notes]
    said = "".join(f"<p>{html.escape(line)}</p>" for line in (caption(comparison), *notes))
    parts = [f"<h1>{html.escape(title)}</h1>", table(cells(comparison), COLUMNS), said, table(about)]
    write_page(path, page(title, [*parts, plots({"Round by round": svg(rounds)})]))

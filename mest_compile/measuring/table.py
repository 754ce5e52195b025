"""A table of training speed by scheme and sparsity, and what it can be written as."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mest_compile.base.errors import UsageError
from mest_compile.base.figures import svg
from mest_compile.base.pages import page, table, write_page
from mest_compile.hardware.host import BUSY
from mest_compile.measuring.benchmark import median_interval

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """One scheme at one sparsity. Figures are None where `problem` says why there are none.

    step_seconds, baseline_seconds      median of the rounds
    speedup                             median of the rounds' ratios, baseline over ours
    speedup_low, speedup_high           interval that holds the median ratio with probability `confidence`
    planned_bytes                       what our step says it needs: step.memory()["total"]
    peak_bytes, baseline_peak_bytes     measured: highest resident set while training, above a process that has trained
                                        a miniature net; None on a device behind a tracker
    others_cores                        cores that other processes used while it was measured; None: not known
    """

    scheme: str
    sparsity: float
    step_seconds: float | None = None
    baseline_seconds: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    confidence: float | None = None
    planned_bytes: int | None = None
    peak_bytes: int | None = None
    baseline_peak_bytes: int | None = None
    problem: str | None = None
    others_cores: float | None = None

    @property
    def busy(self) -> bool:
        """Whether others worked on the machine meanwhile, so that its times do not compare."""
        return (self.others_cores or 0.0) > BUSY

    @classmethod
    def on_device(
        cls, scheme: str, sparsity: float, ours: Sequence[float], baseline: Sequence[float], planned_bytes: int
    ) -> Row:
        """From rounds of ours and, some time before, of the baseline. The interval is where both medians lie within
        theirs."""
        low, high, sure = median_interval(ours)
        baseline_low, baseline_high, baseline_sure = median_interval(baseline)
        return cls(
            scheme,
            sparsity,
            median(ours),
            median(baseline),
            median(baseline) / median(ours),
            baseline_low / high,
            baseline_high / low,
            max(0.0, sure + baseline_sure - 1),
            planned_bytes,
        )

    @classmethod
    def of(cls, comparison: Mapping[str, Any]) -> Row:
        """From `Comparison.to_dict()`, also when it was read back from a file."""
        ours, rival = comparison["ours"], comparison["rival"]
        low, high, confidence = comparison["ratio_interval"]
        return cls(
            comparison["case"]["scheme"],
            comparison["case"]["sparsity"],
            ours["median_seconds"],
            rival["median_seconds"],
            comparison["ratio"],
            low,
            high,
            confidence,
            ours["planned_bytes"],
            ours["training_peak_bytes"],
            rival["training_peak_bytes"],
            others_cores=comparison["machine"].get("others_cores"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


COLUMNS = ("scheme", "sparsity", "step ms", "speed-up", "interval", "planned MiB", "peak MiB", "of baseline's peak")


@dataclass(frozen=True, slots=True, repr=False)
class SpeedTable:
    """Rows in the order asked for.

    facts  model, width, input_shape, distribution, target, baseline, threads, repeats, machine, versions, measured_at,
           load (of the machine before the first row), wanted_rows (there are fewer while it is measured)
    """

    rows: tuple[Row, ...]
    facts: Mapping[str, Any]

    def __repr__(self) -> str:
        return self.to_markdown()

    def _repr_html_(self) -> str:
        return f"{self._table()}<p>{html.escape(self.caption())}</p>"

    def cells(self) -> list[list[str]]:
        """The rows as text, under `COLUMNS`."""

        def text(row: Row) -> list[str]:
            name = [
                row.scheme,
                f"{row.sparsity:.0%}" if round(row.sparsity * 100, 6).is_integer() else f"{row.sparsity:.1%}",
            ]
            if row.step_seconds is None:
                return [*name, row.problem or "", "", "", "", "", ""]
            planned = "" if row.planned_bytes is None else f"{row.planned_bytes / MIB:.0f}"
            peaks = ["", ""]
            if row.peak_bytes is not None and row.baseline_peak_bytes is not None:
                peaks = [f"{row.peak_bytes / MIB:.0f}", f"{row.peak_bytes / row.baseline_peak_bytes:.2f}"]
            return [
                *name,
                f"{row.step_seconds * 1e3:.1f}{' busy' if row.busy else ''}",
                f"{row.speedup:.2f}",
                f"{row.speedup_low:.2f} to {row.speedup_high:.2f}",
                planned,
                *peaks,
            ]

        return [text(row) for row in self.rows]

    def caption(self) -> str:
        """What was measured, in two sentences."""
        facts, measured = self.facts, [row for row in self.rows if row.baseline_seconds is not None]
        shape = "x".join(map(str, facts["input_shape"]))
        threads = "" if "opencl" in facts else f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'}, "
        said = (
            f"{facts['model']}{'' if facts['width'] is None else ', width ' + str(facts['width'])}, input {shape}, "
            f"{threads}{facts['machine'].get('cpu', 'unknown CPU')}."
        )
        if not measured:
            return said
        seconds = sorted(row.baseline_seconds for row in measured if row.baseline_seconds is not None)
        peaks = sorted(row.baseline_peak_bytes for row in measured if row.baseline_peak_bytes is not None)
        memory = f", {peaks[len(peaks) // 2] / MIB:.0f} MiB" if peaks else ""
        said = (
            f"{said} Baseline {facts['baseline']}: {seconds[len(seconds) // 2] * 1e3:.1f} ms a step{memory}; "
            f"{facts['repeats']} "
            f"{'alternated ' if peaks else ''}rounds, {min(row.confidence or 0 for row in measured):.0%} intervals."
        )
        if driver := facts.get("opencl"):
            said = f"{said} OpenCL device {driver}."
        if (load := facts.get("load", 0.0)) > BUSY or any(row.busy for row in measured):
            said = f"{said} The machine was busy, its load {load:.1f}: times do not compare with others."
        if facts.get("wanted_rows", 0) > len(self.rows):
            said = f"{said} {len(self.rows)} of {facts['wanted_rows']} rows so far."
        if clock := facts.get("clock"):
            return f"{said} A millisecond is a million {clock}: the device counts them instead of time."
        return (
            f"{said} The device is emulated: its times say nothing about any device." if facts.get("emulated") else said
        )

    def to_markdown(self) -> str:
        """A table in GitHub's markdown, its caption below."""
        lines = [
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "|".join("---" if i == 0 else "---:" for i in range(len(COLUMNS))) + "|",
        ]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.cells()]
        return "\n".join([*lines, "", self.caption()]) + "\n"

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame with `Row`'s fields as columns; `facts` are its attrs."""
        import pandas

        frame = pandas.DataFrame([asdict(row) for row in self.rows], columns=list(Row.__dataclass_fields__))
        frame.attrs.update(self.facts)
        return frame

    def to_csv(self, path: str | Path) -> None:
        """`to_pandas` as CSV. Raises UsageError when the file cannot be written."""
        write_page(path, self.to_pandas().to_csv(index=False))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return {**self.facts, "rows": [row.to_dict() for row in self.rows]}

    def to_json(self, path: str | Path) -> None:
        """`to_dict` as a file. Raises UsageError when it cannot be written."""
        write_page(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def to_html(self, path: str | Path) -> None:
        """One page that needs nothing else, its table sorts, its plot below. Raises UsageError when it cannot be
        written."""
        facts, title = self.facts, f"Training speed of {self.facts['model']}"
        versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
        when = f"Measured {facts.get('measured_at', 'at an unknown time')}; {versions}"
        parts = [f"<h1>{html.escape(title)}</h1>", self._table()]
        parts += [f"<p>{html.escape(text)}</p>" for text in (self.caption(), when)]
        if any(row.speedup is not None for row in self.rows):
            parts.append(svg(self._draw))
        write_page(path, page(title, parts))

    def _table(self) -> str:
        return table(self.cells(), COLUMNS)

    def plot(self, path: str | Path) -> None:
        """Speed-up over sparsity, a line a scheme with its intervals; the format follows from the path's ending. Raises
        UsageError."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        self._draw(figure)
        try:
            figure.savefig(path)
        except (OSError, ValueError) as problem:
            raise UsageError(f"cannot write the plot to {path}: {problem}") from problem

    def _draw(self, figure: Figure) -> None:
        axes = figure.add_subplot()
        for scheme in dict.fromkeys(row.scheme for row in self.rows):
            rows = [row for row in self.rows if row.scheme == scheme and row.speedup is not None]
            speedups = [row.speedup for row in rows]
            reach = [[row.speedup - row.speedup_low for row in rows], [row.speedup_high - row.speedup for row in rows]]  # type: ignore[operator]
            axes.errorbar([row.sparsity for row in rows], speedups, yerr=reach, marker="o", capsize=3, label=scheme)  # type: ignore[arg-type]
        axes.axhline(1, color="grey", linewidth=1, linestyle="--", label=self.facts["baseline"])
        axes.set(
            xlabel="sparsity",
            ylabel=f"speed-up over {self.facts['baseline']}, whole step",
            title=str(self.facts["model"]),
        )
        axes.legend()

"""Training speed by scheme and sparsity: whole steps against a baseline, side by side, with the confidence that the
rounds allow."""

from __future__ import annotations

import html
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from mest_compile.base.errors import MestError, UsageError
from mest_compile.base.files import write_atomically
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import find_target, obstacle
from mest_compile.measuring.benchmark import compare, median_interval
from mest_compile.measuring.contestants import PROGRAM, STEP, Case, find_interpreter
from mest_compile.models.catalog import MODELS, model_names
from mest_compile.sparsity import parse_scheme

if TYPE_CHECKING:
    import pandas
    import torch

    from mest_compile.devices.session import Device

MIB = 2**20
DENSE = "mest-dense"  # the baseline on a device, which has no torch


@dataclass(frozen=True, slots=True)
class Row:
    """One scheme at one sparsity. Figures are None where `problem` says why there are none.

    step_seconds, baseline_seconds      median of the rounds
    speedup                             median of the rounds' ratios, baseline over ours
    speedup_low, speedup_high           interval that holds the median ratio with probability `confidence`
    planned_bytes                       what our step says it needs: step.memory()["total"]
    peak_bytes, baseline_peak_bytes     measured: highest resident set while training, above a process that has trained
                                        a miniature net; None on a device behind a tracker
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
        )


COLUMNS = ("scheme", "sparsity", "step ms", "speed-up", "interval", "planned MiB", "peak MiB", "of baseline's peak")


@dataclass(frozen=True, slots=True)
class SpeedTable:
    """Rows in the order asked for.

    facts  model, width, input_shape, distribution, target, baseline, threads, repeats, machine, versions, measured_at
    """

    rows: tuple[Row, ...]
    facts: Mapping[str, Any]

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
                f"{row.step_seconds * 1e3:.1f}",
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
        _write(path, self.to_pandas().to_csv(index=False))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return {**self.facts, "rows": [asdict(row) for row in self.rows]}

    def to_json(self, path: str | Path) -> None:
        """`to_dict` as a file. Raises UsageError when it cannot be written."""
        _write(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def to_html(self, path: str | Path) -> None:
        """One page that needs nothing else. Raises UsageError when it cannot be written."""

        def line(tag: str, cells: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        title = html.escape(f"Training speed of {self.facts['model']}")
        _write(
            path,
            "\n".join(
                [
                    "<!doctype html>",
                    f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>',
                    "body{font-family:sans-serif;margin:2em} td,th{padding:.2em "
                    ".8em;text-align:right;border-bottom:1px solid #ccc}",
                    "td:first-child,th:first-child{text-align:left}",
                    f"</style></head><body><h1>{title}</h1><table>",
                    line("th", COLUMNS),
                    *(line("td", row) for row in self.cells()),
                    f"</table><p>{html.escape(self.caption())}</p></body></html>",
                    "",
                ]
            ),
        )

    def plot(self, path: str | Path) -> None:
        """Speed-up over sparsity, a line a scheme with its intervals; the format follows from the path's ending. Raises
        UsageError."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
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
        try:
            figure.savefig(path)
        except (OSError, ValueError) as problem:
            raise UsageError(f"cannot write the plot to {path}: {problem}") from problem


def speed_table(
    model: str | torch.nn.Module,
    input_shape: Sequence[int],
    schemes: Sequence[str] = ("unstructured", "block", "pattern"),
    sparsities: Sequence[float] = (0.8, 0.9, 0.95),
    target: str = "local",
    baseline: str | None = None,
    threads: int = 1,
    repeats: int = 9,
    width: int | None = None,
    classes: int = 10,
    distribution: str = "uniform",
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    device: Device | None = None,
    activations: str = "float32",
) -> SpeedTable:
    """Times a whole SGD-momentum step of every scheme at every sparsity against the baseline, each pair alternated in
    two processes.

    model        a built-in model's name, or a torch.nn.Module (then the baseline is torch or torch-compile, which run
                 it as torch.export sees it in training mode; the module is left unchanged)
    input_shape  (N, C, H, W) or (N, features)
    baseline     a contestant: torch (dense, channels_last), torch-compile, sparseprop, onnxruntime-training, mest-dense
                 (our step with all weights alive). None: torch, and on a device, an OpenCL one here too, mest-dense,
                 which alone runs there
    repeats      rounds of a pair; with fewer than six, the intervals are of less than 95% confidence
    width, classes  of a built-in model
    activations  what our steps store them as
    progress     called with (what happens now, rows done, rows in all)
    device       mest.rpc(...): whole steps on a device that `target` describes, one after the other, by its own clock;
                 None: here
    A scheme that the model cannot have is a row that says why. Raises UnknownName, UsageError, NotInstalled,
    DeviceError.
    """
    kind = backend_of(find_target(target))
    if device is None and (why := obstacle(find_target(target))):
        raise UsageError(
            f"target is {str(target)!r}, which is not this machine ({why}); give the device that is, by its "
            "tracker and key"
        )
    elsewhere = device is not None or not kind.processor
    baseline = baseline or (DENSE if elsewhere else "torch")
    if elsewhere and baseline != DENSE:
        raise UsageError(f"baseline is {baseline!r}; on a device only {DENSE!r} runs")
    find_interpreter(baseline, "")
    names = [str(parse_scheme(scheme)) for scheme in schemes]
    if not names or not sparsities or not all(0 <= sparsity < 1 for sparsity in sparsities):
        raise UsageError(
            f"one or more schemes and sparsities from 0 to below 1 are wanted, got {list(schemes)} and "
            f"{list(sparsities)}"
        )
    pairs = [(scheme, sparsity) for scheme in names for sparsity in sparsities]
    case = Case("", tuple(input_shape), width, classes).but(
        target=target, threads=threads, seed=seed, distribution=distribution, activations=activations
    )
    say = progress or (lambda what, done, total: None)
    if device is not None:
        if isinstance(model, str):
            _check_name(model)
        return _on_device(model, case, pairs, replace(device, early=False), repeats, say)
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(model, str):
            _check_name(model)
            case = replace(case, model=model)
            case.network()  # says what is wrong with it
        else:
            case = replace(case, model=scratch, classes=_export(model, case, baseline, Path(scratch)))
        rows, found, problems = [], None, []
        for number, (scheme, sparsity) in enumerate(pairs):
            say(f"{scheme} {sparsity}", number, len(pairs))
            try:
                here = case.but(scheme=scheme, sparsity=sparsity)
                if not isinstance(model, str):
                    _compile_into(model, here, Path(scratch))
                found = compare(here, baseline, repeats=repeats)
                rows.append(Row.of(found.to_dict()))
            except MestError as problem:
                problems.append(problem)
                rows.append(Row(scheme, sparsity, problem=" ".join(str(problem).split())))
    if found is None:
        raise problems[0]
    facts = _facts(model, case, baseline, repeats) | {
        "machine": found.machine,
        "versions": found.versions,
        "measured_at": found.measured_at,
    }
    return SpeedTable(tuple(rows), facts | kind.describe_device(find_target(target)))


def _on_device(
    model: str | torch.nn.Module,
    case: Case,
    pairs: Sequence[tuple[str, float]],
    device: Device,
    repeats: int,
    say: Callable[[str, int, int], None],
) -> SpeedTable:
    """A device takes one step at a time: first the baseline, then every pair."""
    from importlib import metadata

    from mest_compile.compiling import compile_step
    from mest_compile.devices.probe import check

    target = find_target(case.options.target)
    with closing(device.open()) as session:
        place, there = session.place(target.device), check(session, target)
        driver = {} if backend_of(target).processor else {target.device: str(place.device_name)}

    def timed(scheme: str, sparsity: float) -> tuple[list[float], int]:
        net = replace(case, model=model).network() if isinstance(model, str) else model
        options = case.but(scheme=scheme, sparsity=sparsity).options
        with closing(compile_step(net, case.input_shape, options, device)) as step:
            return step.device_seconds(*case.batch(), repeats), step.memory()["total"]

    say(DENSE, 0, len(pairs))
    baseline, _ = timed("dense", 0.0)
    rows, problems = [], []
    for number, (scheme, sparsity) in enumerate(pairs):
        say(f"{scheme} {sparsity}", number, len(pairs))
        try:
            seconds, planned = timed(scheme, sparsity)
            rows.append(Row.on_device(scheme, sparsity, seconds, baseline, planned))
        except MestError as problem:
            problems.append(problem)
            rows.append(Row(scheme, sparsity, problem=" ".join(str(problem).split())))
    if len(problems) == len(pairs):
        raise problems[0]
    facts = {
        "machine": {"cpu": f"emulated on {there.cpu}" if there.emulated else there.cpu or "unknown CPU"},
        "emulated": there.emulated,
        "clock": there.clock,
        **driver,
        "versions": {name: metadata.version(name) for name in ("mest-compile", "apache-tvm")},
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return SpeedTable(tuple(rows), _facts(model, case, DENSE, repeats) | facts)


def _facts(model: str | torch.nn.Module, case: Case, baseline: str, repeats: int) -> dict[str, Any]:
    """What a table's rows have in common, wherever they were measured."""
    return {
        "model": model if isinstance(model, str) else type(model).__name__,
        "width": case.width,
        "input_shape": list(case.input_shape),
        "distribution": case.options.distribution,
        "activations": case.options.activations,
        "target": str(case.options.target),
        "baseline": baseline,
        "threads": case.threads,
        "repeats": repeats,
    }


def _check_name(model: str) -> None:
    if model not in MODELS:
        raise UsageError(
            f"model is {model!r}; wanted a built-in name ({', '.join(model_names())}) or a torch.nn.Module. The "
            "baseline "
            "cannot train an .onnx file"
        )


def _export(model: torch.nn.Module, case: Case, baseline: str, folder: Path) -> int:
    """Writes the module's program in training mode, for the baseline's process; returns the number of classes."""
    import copy

    import torch

    from mest_compile.frontend import from_torch

    if baseline not in ("torch", "torch-compile"):
        raise UsageError(
            f"a torch.nn.Module can be compared with torch and torch-compile, not with {baseline}; use a built-in model"
        )
    graph, _ = from_torch(model, case.input_shape)  # says what is wrong with a module better than the export below
    torch.export.save(
        torch.export.export(copy.deepcopy(model).train(), (torch.zeros(case.input_shape),)), folder / PROGRAM
    )
    return graph.nodes[-1].shape[1]


def _compile_into(model: torch.nn.Module, case: Case, folder: Path) -> None:
    """Writes our compiled step, for our process."""
    from mest_compile.compiling import compile_step

    compile_step(model, case.input_shape, case.options).save(folder / STEP)


def _write(path: str | Path, text: str) -> None:
    try:
        write_atomically(Path(path), text)
    except OSError as problem:
        raise UsageError(f"cannot write {path}: {problem.strerror}") from problem

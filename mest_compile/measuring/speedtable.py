"""Measures training speed by scheme and sparsity: whole steps against a baseline, side by side, with the confidence
that the rounds allow."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mest_compile.base import checks
from mest_compile.base.errors import MestError, UsageError
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.host import load_average
from mest_compile.hardware.target import find_target, obstacle
from mest_compile.measuring.benchmark import compare
from mest_compile.measuring.case import PROGRAM, STEP, Case
from mest_compile.measuring.contestants import find_contestant, find_interpreter
from mest_compile.measuring.kept import KeptRows
from mest_compile.measuring.table import Row, SpeedTable
from mest_compile.sparsity import parse_scheme

if TYPE_CHECKING:
    import torch

    from mest_compile.devices.session import Device

DENSE = "mest-dense"  # the baseline on a device, which has no torch


def speed_table(
    model: str | torch.nn.Module,
    input_shape: Sequence[int],
    schemes: Sequence[str] = ("unstructured", "block", "pattern"),
    sparsities: Sequence[float] = (0.8, 0.9, 0.95),
    target: str = "local",
    baseline: str | None = None,
    threads: int = 1,
    repeats: int = 9,
    width: float | None = None,
    classes: int = 10,
    distribution: str = "uniform",
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    device: Device | None = None,
    activations: str = "float32",
    weights: str | Path | None = None,
    out: str | Path | None = None,
    on_row: Callable[[SpeedTable], None] | None = None,
) -> SpeedTable:
    """Times a whole SGD-momentum step of every scheme at every sparsity against the baseline, each pair alternated in
    two processes.

    model        a built-in model's name, or a torch.nn.Module (then the baseline is torch or torch-compile, which run
                 it as torch.export sees it in training mode; the module is left unchanged)
    input_shape  (N, C, H, W), (N, C, L) or (N, features)
    baseline     a contestant: torch (dense, channels_last), torch-compile, sparseprop, onnxruntime-training, mest-dense
                 (our step with all weights alive). None: torch, and on a device, an OpenCL one here too, mest-dense,
                 which alone runs there
    repeats      rounds of a pair; with fewer than six, the intervals are of less than 95% confidence
    width, classes, weights  of a model that is given by its name
    activations  what our steps store them as
    progress     called with (what happens now, rows done, rows in all)
    out          folder that holds the rows as they finish, and the table so far as table.html, .csv and .json; a table
                 that was stopped goes on from it, and measures those that failed again
    on_row       called with the table so far after each row that was measured
    device       mest.rpc(...): whole steps on a device that `target` describes, one after the other, by its own clock;
                 None: here
    A scheme that the model cannot have is a row that says why. Raises UnknownName, UsageError, NotInstalled, StateError
    (`out` is damaged), DeviceError.
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
    if not names or not sparsities or not all(checks.is_number(one) and 0 <= one < 1 for one in sparsities):
        raise UsageError(
            f"one or more schemes and sparsities from 0 to below 1 are wanted, got {list(schemes)} and "
            f"{list(sparsities)}"
        )
    pairs = [(scheme, sparsity) for scheme in names for sparsity in sparsities]
    case = Case("", tuple(input_shape), width, classes, None if weights is None else str(weights)).but(
        target=target, threads=threads, seed=seed, distribution=distribution, activations=activations
    )
    facts = _facts(model, case, baseline, repeats)
    rows = _Rows(pairs, facts, case, out, progress or (lambda what, done, total: None), on_row)
    if device is not None:
        return _on_device(model, case, rows, replace(device, early=False), repeats)
    load = load_average()
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(model, str):
            case = replace(case, model=model)
            (case.source if find_contestant(baseline).takes_files else case.network)()  # says what is wrong with it
        else:
            case = replace(case, model=scratch, classes=_export(model, case, baseline, Path(scratch)))

        def measured(scheme: str, sparsity: float) -> tuple[Row, dict[str, Any]]:
            here = case.but(scheme=scheme, sparsity=sparsity)
            if not isinstance(model, str):
                _compile_into(model, here, Path(scratch))
            found = compare(here, baseline, repeats=repeats)
            said = {"machine": found.machine, "versions": found.versions, "measured_at": found.measured_at}
            return Row.of(found.to_dict()), said | {"load": load} | kind.describe_device(find_target(target))

        return rows.measure(measured)


class _Rows:
    """The rows of a table, as they are measured or were kept."""

    def __init__(
        self,
        pairs: Sequence[tuple[str, float]],
        facts: Mapping[str, Any],
        case: Case,
        out: str | Path | None,
        say: Callable[[str, int, int], None],
        on_row: Callable[[SpeedTable], None] | None,
    ):
        self._pairs, self._facts, self.say, self._on_row = pairs, facts, say, on_row
        asked = {**facts, "classes": case.classes, "weights": case.weights, "seed": case.options.seed}
        self._kept = None if out is None else KeptRows(out, asked)
        self._known = {} if self._kept is None else dict(self._kept.rows)

    @property
    def total(self) -> int:
        return len(self._pairs)

    def measure(self, measured: Callable[[str, float], tuple[Row, dict[str, Any]]]) -> SpeedTable:
        """measured: (scheme, sparsity) -> (its row, what is known of the machine). Raises what the first row raises
        where none could be measured."""
        rows: list[Row] = []
        said, problems = {} if self._kept is None else self._kept.facts, []
        for number, (scheme, sparsity) in enumerate(self._pairs):
            row = self._known.get((scheme, sparsity))
            if row is None:
                self.say(f"{scheme} {sparsity}", number, self.total)
                try:
                    row, said = measured(scheme, sparsity)
                    if self._kept is not None:
                        self._kept.add(row, said)
                except MestError as problem:
                    problems.append(problem)
                    row = Row(scheme, sparsity, problem=" ".join(str(problem).split()))
            rows.append(row)
            table = SpeedTable(tuple(rows), {**self._facts, "wanted_rows": self.total, **said})
            if said and self._kept is not None:
                self._kept.show(table)
            if said and self._on_row is not None:
                self._on_row(table)
        if len(problems) == self.total:
            raise problems[0]
        return table


def _on_device(
    model: str | torch.nn.Module,
    case: Case,
    rows: _Rows,
    device: Device,
    repeats: int,
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
        net = replace(case, model=model).source() if isinstance(model, str) else model
        options = case.but(scheme=scheme, sparsity=sparsity).options
        with closing(compile_step(net, case.input_shape, options, device)) as step:
            return step.device_seconds(*replace(case, classes=step.classes).batch(), repeats), step.memory()["total"]

    facts = {
        "machine": {"cpu": f"emulated on {there.cpu}" if there.emulated else there.cpu or "unknown CPU"},
        "emulated": there.emulated,
        "clock": there.clock,
        **driver,
        "versions": {name: metadata.version(name) for name in ("mest-compile", "apache-tvm")},
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rows.say(DENSE, 0, rows.total)
    baseline, _ = timed("dense", 0.0)

    def measured(scheme: str, sparsity: float) -> tuple[Row, dict[str, Any]]:
        seconds, planned = timed(scheme, sparsity)
        return Row.on_device(scheme, sparsity, seconds, baseline, planned), facts

    return rows.measure(measured)


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

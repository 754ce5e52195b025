"""What a run folder shows: up to six plots and one page that needs nothing else. Reads only; a run that still trains
can be reported."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from mest_compile.base import checks
from mest_compile.base.errors import StateError, UsageError
from mest_compile.base.files import write_atomically
from mest_compile.base.pages import page, plots, table
from mest_compile.hardware import host
from mest_compile.runtime import checkpoint
from mest_compile.training import exhibits
from mest_compile.training.against import told
from mest_compile.training.drawing import PLOTS, Epochs, has, plot
from mest_compile.training.metrics import METRICS, main_metric
from mest_compile.training.runfolder import RunFolder


def summary(folder: RunFolder, epochs: Epochs) -> dict[str, Any]:
    """The run in one JSON-able dict. epochs: its metrics. Raises StateError when it has no run with at least one whole
    epoch."""
    recipe, run = folder.read_facts()
    continued = _kept(folder).get("continued", [])
    if not epochs:
        raise StateError(f"{folder.path} holds a run without a whole epoch; wait for its first one")
    last = epochs[-1]
    metric = main_metric(last)
    tested = [metrics for metrics in epochs if metrics[f"test_{metric.name}"] is not None]
    scores = {name: last[name] for name in last if name.startswith("train_") and name.removeprefix("train_") in METRICS}
    for name in (name for name in last if name.startswith("test_") and name.removeprefix("test_") in METRICS):
        scores[name] = tested[-1][name] if tested else None
    drops = [metrics["sieve"] for metrics in epochs if metrics["sieve"]]
    return {
        "folder": str(folder.path),
        "epochs": len(epochs),
        "of_epochs": continued[-1]["epochs"] if continued else recipe["epochs"],
        "continued": continued,
        "method": recipe["method"],
        "data": run["data"]["train"]["name"],
        "target": run["step"]["target"],
        "seed": run["seed"],
        "began": run.get("began"),
        "machine": run.get("machine", {}),
        "model": _source(folder).get("model"),
        "command": _source(folder).get("command"),
        "versions": run["versions"] | run["step"].get("versions", {}),
        "schemes": sorted(set(run["step"].get("schemes", {}).values())),
        "sparsity_of_all": run["step"].get("sparsity_of_all"),
        "weights": run["step"].get("weights"),
        "lr": f"{recipe['lr']:g}, {recipe['lr_schedule']}",
        "against_dense": folder.read_dense(),
        "step_seconds": median(metrics["step_seconds"] for metrics in epochs),
        "loss": last["loss"],
        "metric": metric.name,
        **scores,
        "train_seconds": sum(metrics["train_seconds"] for metrics in epochs),
        "mutations": sum(metrics["mutation"] is not None for metrics in epochs),
        "mutation_seconds": sum(metrics["mutation"]["seconds"] for metrics in epochs if metrics["mutation"]),
        "freeze": _freezing(epochs),
        "iterations": sum(metrics["iterations"] for metrics in epochs),
        "iterations_saved": sum(metrics["iterations_saved"] for metrics in epochs),
        "dropped": [drop["dropped"] for drop in drops],
        "forgetting_counts": drops[-1]["counts"] if drops else None,
        "images_per_second": median(metrics["images_per_second"] for metrics in epochs),
        "overall_sparsity": last["overall_sparsity"],
        "sparsity": last["sparsity"],
        "survival": last["survival"],
        "memory_bytes": last["memory_bytes"],
    }


def _source(folder: RunFolder) -> dict[str, Any]:
    """Where the run is from, of one that the command line began."""
    return folder.read_source() if folder.source.is_file() else {}


def _freezing(epochs: Epochs) -> dict[str, Any] | None:
    """What is frozen after the last of the epochs, and the share of all of them that this has saved; None where nothing
    ever freezes."""
    if "freeze" not in epochs[-1]:
        return None
    last = epochs[-1]["freeze"]
    steps = [metrics["iterations"] for metrics in epochs]
    saved = sum(metrics["freeze"]["saved"] * count for metrics, count in zip(epochs, steps, strict=True))
    seconds = sum(metrics["freeze"]["seconds"] for metrics in epochs)
    return {name: last[name] for name in ("parts", "saved", "weights")} | {
        "saved_overall": saved / sum(steps),
        "seconds": seconds,
    }


def read_epochs(folder: RunFolder) -> Epochs:
    """The metrics of a run's whole epochs. Raises StateError where they are damaged, or not what the checkpoint knows
    under its digest."""
    kept = _kept(folder).get("history", [])
    epochs = folder.read_metrics()
    for number, metrics in enumerate(epochs, 1):
        if wrong := next(
            (name for name, right in _needed(metrics).items() if name not in metrics or not right(metrics[name])), None
        ):
            raise StateError(
                f"{folder.metrics} is damaged: {wrong} of line {number} is {checks.shown(metrics.get(wrong))}; {REMEDY}"
            )
    if epochs[: len(kept)] != kept:
        raise StateError(f"{folder.metrics} is damaged: it is not what the checkpoint says; {REMEDY}")
    if any(main_metric(metrics) is not main_metric(epochs[0]) for metrics in epochs):
        raise StateError(f"{folder.metrics} is damaged: its lines are of other metrics; {REMEDY}")
    if any(("freeze" in epochs[0]) != ("freeze" in metrics) for metrics in epochs):
        raise StateError(f"{folder.metrics} is damaged: only some of its lines tell of freezing; {REMEDY}")
    if any(epochs[0][name].keys() != metrics[name].keys() for name in ("sparsity", "survival") for metrics in epochs):
        raise StateError(f"{folder.metrics} is damaged: its lines are of other layers; {REMEDY}")
    return epochs


def _kept(folder: RunFolder) -> dict[str, Any]:
    """What the checkpoint says of the run; of a copy without it, or of one that is damaged itself, nothing."""
    try:
        return dict(checkpoint.read(folder.checkpoint)[1]["extra"])
    except (StateError, KeyError, TypeError, ValueError):
        return {}


def _number(value: Any) -> bool:
    return checks.is_number(value) and abs(value) < checks.FLOAT32_MOST


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


def _with(value: Any, rights: Mapping[str, Callable[[Any], bool]]) -> bool:
    return isinstance(value, dict) and all(name in value and right(value[name]) for name, right in rights.items())


def _needed(metrics: Mapping[str, Any]) -> dict[str, Callable[[Any], bool]]:
    """What is shown of a line of metrics.jsonl, and whether it can be."""
    name = metrics.get("metric", "accuracy")
    if not isinstance(name, str) or name not in METRICS:
        return {"metric": lambda value: False}
    frozen = {"freeze": lambda value: _with(value, FREEZE)} if "freeze" in metrics else {}
    return {**NEEDED, **frozen, f"train_{name}": _number, f"test_{name}": lambda value: value is None or _number(value)}


FREEZE: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("parts", "saved", "weights", "seconds"), _number),
    "now": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}
REMEDY = "mest-compile train --resume writes it anew"
NEEDED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("epoch", "loss", "train_seconds", "iterations", "iterations_saved", "images_per_second"), _number),
    "step_seconds": _number,
    "overall_sparsity": lambda value: value is None or _number(value),
    "mutation": lambda value: value is None or _with(value, {"seconds": _number}),
    "sieve": lambda value: value is None or _with(value, {"dropped": _number, "counts": _numbers}),
    "sparsity": _numbers,
    "survival": _numbers,
    "memory_bytes": lambda value: _numbers(value) and "total" in value,
}


def write_report(path: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Writes report.html and its plots as SVG to `out`, by default RUN/report; returns `summary` with the files' names
    under "files".

    Raises StateError when `path` holds no run, UsageError when `out` cannot be written.
    """
    folder = RunFolder(path)
    epochs = read_epochs(folder)
    facts = summary(folder, epochs)
    out = folder.path / "report" if out is None else Path(out)
    pictures = {name: plot(draw, epochs) for name, (_, draw) in PLOTS.items() if has(name, epochs)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            write_atomically(out / f"{name}.svg", picture + "\n")
        write_atomically(out / "report.html", _page(facts, pictures, folder.read_verdict()))
    except OSError as problem:
        raise UsageError(f"cannot write the report to {out}: {problem.strerror}; pass another --out") from problem
    return {**facts, "files": [str(out / "report.html"), *(str(out / f"{name}.svg") for name in pictures)]}


def _page(facts: dict[str, Any], pictures: dict[str, str], verdict: Mapping[str, Any] | None) -> str:
    metric = main_metric(facts)
    others = [METRICS[name] for name in METRICS if name != metric.name and f"test_{name}" in facts]
    tested = {one: facts[f"test_{one.name}"] for one in (metric, *others)}
    sparsities = list(facts["sparsity"].values())
    overall = facts["overall_sparsity"]
    said = {"model": facts["model"], "began": facts["began"], "command": facts["command"]}
    dead, weights = facts["sparsity_of_all"], facts["weights"]
    machine = {name: round(value, 1) if name == "load" else value for name, value in facts["machine"].items()}
    busy = "; busy: times do not compare" if machine.get("load", 0.0) > host.BUSY else ""
    rows = [
        *((name, value) for name, value in said.items() if value is not None),
        ("epochs", f"{facts['epochs']} of {facts['of_epochs']}"),
        *(
            ("went on", f"after epoch {one['after_epoch']} to {one['epochs']}, batch {one['batch']}, {one['target']}")
            for one in facts["continued"]
        ),
        ("method", facts["method"]),
        ("scheme", ", ".join(facts["schemes"])),
        ("learning rate", facts["lr"]),
        ("data", facts["data"]),
        ("target", facts["target"]),
        ("seed", facts["seed"]),
        ("training loss", f"{facts['loss']:.4f}"),
        (f"training {metric.label}", metric.shown(facts[f"train_{metric.name}"])),
        *((f"test {one.label}", "not tested" if value is None else one.shown(value)) for one, value in tested.items()),
        (
            "sparsity of sparse layers, all their weights together",
            "dense" if overall is None else f"{overall:.3f}",
        ),
        ("sparsity of each of them", f"{min(sparsities):.3f} to {max(sparsities):.3f}" if sparsities else "dense"),
        *([] if weights is None else [("live of all weights", f"{round(weights * (1 - dead))} of {weights}")]),
        ("images per second", f"{facts['images_per_second']:.0f}"),
        ("milliseconds a step", f"{facts['step_seconds'] * 1e3:.2f}"),
        *([] if facts["against_dense"] is None else [("our dense step", told(facts["against_dense"]))]),
        ("seconds of training", f"{facts['train_seconds']:.1f}"),
        ("mutations", f"{facts['mutations']}, {facts['mutation_seconds']:.2f} s"),
        ("iterations saved by the sieve", f"{facts['iterations_saved']} beside {facts['iterations']} made"),
        *_frozen_rows(facts["freeze"]),
        ("machine", ", ".join(f"{name} {value}" for name, value in machine.items()) + busy),
        ("planned memory", f"{facts['memory_bytes']['total'] / 2**20:.1f} MiB"),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
    ]
    titles = {name: metric.label.capitalize() if name == "accuracy" else PLOTS[name][0] for name in pictures}
    drawn = plots({titles[name]: picture for name, picture in pictures.items()})
    parts = [f"<h1>{html.escape(str(Path(facts['folder']).resolve().name))}</h1>", table(rows), drawn]
    if counts := facts["forgetting_counts"]:
        parts += [
            "<h2>Forgetting events when examples were last dropped</h2>",
            table([("events", "examples"), *counts.items()]),
        ]
    if verdict is not None:
        parts += exhibits.of_verdict(verdict)
    kinds = [(name, f"{need / 2**20:.2f} MiB") for name, need in facts["memory_bytes"].items()]
    parts += ["<h2>Planned memory by kind</h2>", table(kinds, ("kind", "need"))]
    return page(f"Run {Path(facts['folder']).resolve().name}", parts)


def _frozen_rows(frozen: dict[str, Any] | None) -> list[tuple[str, str]]:
    if frozen is None:
        return []
    saved = f"{frozen['saved']:.1%} of the last step, {frozen['saved_overall']:.1%} of all steps"
    return [
        ("frozen in the end", f"{frozen['parts']} parts, {frozen['weights']:.1%} of the parameters"),
        ("spared by freezing", f"{saved}; exchanging them took {frozen['seconds']:.2f} s"),
    ]

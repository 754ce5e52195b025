"""Plots of a run's metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mest_compile.base.figures import shown, svg
from mest_compile.training.metrics import main_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Epochs = list[dict[str, Any]]
MOST_NAMES = 24  # of layers beside a heat map; more would lie over each other


def _loss(axes: Axes, epochs: Epochs) -> None:
    axes.plot([metrics["epoch"] for metrics in epochs], [metrics["loss"] for metrics in epochs], marker=".")
    axes.set(ylabel="training loss")


def _score(axes: Axes, epochs: Epochs) -> None:
    metric = main_metric(epochs[0])
    for part, label in (("train", "training"), ("val", "validation"), ("test", "test")):
        key = f"{part}_{metric.name}"
        if key not in epochs[0]:
            continue
        known = [metrics for metrics in epochs if metrics[key] is not None]
        values = [100 * metrics[key] if metric.share else metrics[key] for metrics in known]
        axes.plot([metrics["epoch"] for metrics in known], values, marker=".", label=label)
    axes.set(ylabel=f"{metric.label}, %" if metric.share else metric.label)
    axes.legend()


def _by_layer(key: str, label: str) -> Callable[[Axes, Epochs], None]:
    """A row a layer, the model's first on top, a column an epoch."""

    def draw(axes: Axes, epochs: Epochs) -> None:
        layers = list(epochs[0][key])
        values = [[metrics[key][name] for metrics in epochs] for name in layers]
        ends = (epochs[0]["epoch"] - 0.5, epochs[-1]["epoch"] + 0.5)
        picture = axes.imshow(
            values, aspect="auto", interpolation="nearest", vmin=0, vmax=1, extent=(*ends, len(layers) - 0.5, -0.5)
        )
        some = range(0, len(layers), -(-len(layers) // MOST_NAMES))
        axes.set_yticks(list(some), [layers[place].removesuffix(".weight") for place in some], fontsize="small")
        axes.figure.colorbar(picture, ax=axes, label=label)

    return draw


def _seconds(axes: Axes, epochs: Epochs) -> None:
    axes.plot([metrics["epoch"] for metrics in epochs], [metrics["train_seconds"] for metrics in epochs], marker=".")
    for metrics in epochs:
        if metrics["sieve"]:
            axes.axvline(metrics["epoch"], color="grey", linestyle="--", linewidth=1)
            axes.annotate(
                f"{metrics['sieve']['dropped']} dropped",
                (metrics["epoch"], 0),
                rotation=90,
                fontsize="small",
                va="bottom",
            )
        if (freeze := metrics.get("freeze")) and freeze["now"]:
            axes.axvline(metrics["epoch"], color="tab:blue", linestyle=":", linewidth=1)
    axes.set(ylabel="seconds of training in the epoch", ylim=(0, None))


def _frozen(axes: Axes, epochs: Epochs) -> None:
    numbers = [metrics["epoch"] for metrics in epochs]
    for key, label in (("saved", "of a step"), ("weights", "of the parameters")):
        axes.step(numbers, [100 * metrics["freeze"][key] for metrics in epochs], where="mid", label=label)
    axes.set(ylabel="%", ylim=(0, 100))
    axes.legend()


PLOTS: dict[str, tuple[str, Callable[[Axes, Epochs], None]]] = {
    "loss": ("Loss", _loss),
    "accuracy": ("Accuracy", _score),
    "sparsity": ("Sparsity of each layer", _by_layer("sparsity", "share of weights that are zero")),
    "survival": ("Mask survival: weights live since the start", _by_layer("survival", "share of the first mask")),
    "epoch_seconds": ("Time of an epoch", _seconds),
    "freeze": ("Frozen: what is spared of a step, and the share of the parameters that stay", _frozen),
}


def has(name: str, epochs: Epochs) -> bool:
    """Whether there is anything to draw: a dense model has no layers with a mask, and few runs freeze."""
    return bool(epochs[0].get(name, name != "freeze"))


def draw_all(epochs: Epochs) -> Figure:
    """A matplotlib figure with every plot that there is something to draw for."""
    from matplotlib.figure import Figure

    there = [(title, draw) for name, (title, draw) in PLOTS.items() if has(name, epochs)]
    rows = -(-len(there) // 2)
    figure = Figure(figsize=(12, 3.2 * rows), layout="constrained")
    for place, (title, draw) in enumerate(there):
        axes = figure.add_subplot(rows, 2, place + 1)
        draw(axes, epochs)
        axes.set(xlabel="epoch", title=title)
    return shown(figure)


def plot(draw: Callable[[Axes, Epochs], None], epochs: Epochs) -> str:
    """One of the plots as SVG."""

    def drawn(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        draw(axes, epochs)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return svg(drawn)


def overlaid(runs: Mapping[str, Epochs]) -> dict[str, str]:
    """{title: SVG} of what several runs have in common, a line a run; runs are of one metric."""
    metric = main_metric(next(iter(runs.values()))[0])
    tested = f"test_{metric.name}"
    kinds: dict[str, tuple[str, str]] = {
        "Loss": ("loss", "training loss"),
        f"Test {metric.label}": (tested, metric.label),
        "Sparsity of all weights": ("overall_sparsity", "share of weights that are zero"),
        "Time of an epoch": ("train_seconds", "seconds of training"),
    }

    def draw(axes: Axes, key: str, label: str) -> None:
        for name, epochs in runs.items():
            known = [metrics for metrics in epochs if metrics[key] is not None]
            axes.plot([metrics["epoch"] for metrics in known], [metrics[key] for metrics in known], ".-", label=name)
        axes.set(ylabel=label)
        axes.legend(fontsize="small")

    return {
        title: plot(lambda axes, _, key=key, label=label: draw(axes, key, label), [])  # type: ignore[misc]
        for title, (key, label) in kinds.items()
        if any(metrics[key] is not None for epochs in runs.values() for metrics in epochs)
    }

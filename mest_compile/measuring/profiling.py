"""Where a training step's time goes: by operator and phase, and by layer with the rate at which its live weights are
computed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mest_compile.ir.program import PRODUCTS

if TYPE_CHECKING:
    from mest_compile.runtime.step import TrainStep

PHASES = (*PRODUCTS, "grad_bias")  # how operators name the calls of a layer


@dataclass(frozen=True, slots=True)
class OperatorTime:
    """All calls of one kernel in one phase of the step. share: of the whole step's time, 0 to 1."""

    kernel: str
    phase: str
    calls: int
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One convolution or linear layer.

    live_weights  weights that are computed with
    flop          of one phase: 2 * live weights * output pixels * batch
    seconds       {phase: seconds}, phases that the step has
    kernels       {phase: where its kernel's knobs are from: "exact", "nearest" or "default"}
    """

    layer: str
    weight_shape: tuple[int, ...]
    output_size: tuple[int, int]
    live_weights: int
    flop: int
    seconds: Mapping[str, float]
    kernels: Mapping[str, str]

    def gflops(self, phase: str) -> float:
        """Useful operations a second of a phase, 1e9/s."""
        return PRODUCTS[phase] * self.flop / self.seconds[phase] / 1e9


@dataclass(frozen=True, slots=True)
class Profile:
    """Operators by time, largest first, and layers in order. The operator "rest" is the time between the kernels."""

    step_seconds: float
    operators: tuple[OperatorTime, ...]
    layers: tuple[LayerTime, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return {
            "step_seconds": self.step_seconds,
            "operators": [asdict(row) for row in self.operators],
            "layers": [
                asdict(row) | {"gflops": {phase: row.gflops(phase) for phase in row.seconds if phase != "grad_bias"}}
                for row in self.layers
            ],
        }


def profile(step: TrainStep, images: Any, labels: Any, repeats: int = 5) -> Profile:
    """Times every kernel call of `repeats` whole steps on one batch (medians); the step's state stays as it is. Raises
    InputError."""
    seconds = step.profile(images, labels, repeats)
    whole = sum(seconds.values())
    times: dict[tuple[str, str], float] = defaultdict(float)
    calls: Counter[tuple[str, str]] = Counter()
    by_layer: dict[str, dict[str, float]] = {name: {} for name in step.layers}
    choices = step.kernel_choices()
    chosen: dict[str, dict[str, str]] = {name: {} for name in step.layers}
    for call in step.program.calls:
        if call.name not in seconds:  # only steps with a bound on the gradients run it
            continue
        group = (call.kernel, call.phase or call.stage)
        times[group] += seconds[call.name]
        calls[group] += 1
        if call.layer in by_layer and call.phase:
            by_layer[call.layer][call.phase] = seconds[call.name]
            chosen[call.layer][call.phase] = choices[call.name].origin
    times["rest", ""] = seconds["rest"]
    operators = [
        OperatorTime(kernel, phase, calls[kernel, phase], spent, spent / whole)
        for (kernel, phase), spent in times.items()
    ]
    live = step.live_weights()
    layers = []
    for name, layer in step.layers.items():
        height, width = layer.spec.output_size
        layers.append(
            LayerTime(
                name,
                layer.spec.weight_shape,
                (height, width),
                live[name],
                2 * live[name] * height * width * step.batch,
                by_layer[name],
                chosen[name],
            )
        )
    return Profile(whole, tuple(sorted(operators, key=lambda row: -row.seconds)), tuple(layers))

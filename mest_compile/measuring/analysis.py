"""What a step's convolutions execute on an ARM core: emulated kernel by kernel, beside those of our dense step of the
same model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mest_compile.base.errors import UsageError
from mest_compile.devices import cycles, emulation
from mest_compile.hardware.target import find_target
from mest_compile.ir.graph import ForwardGraph
from mest_compile.ir.program import Call, Program
from mest_compile.kernels.arguments import call_arrays
from mest_compile.kernels.source import kernel_source
from mest_compile.options import StepOptions
from mest_compile.planning.plan import Plan, plan_step
from mest_compile.sparsity.layer import Layer

PHASES = ("forward", "grad_input", "grad_weight")


@dataclass(frozen=True, slots=True)
class KernelFigures:
    """One distinct convolution kernel of a step, beside the dense kernel that does the same without zeros.

    layers   weight names that run it, each on a mask of its own; figures are of one call with the first one's sizes and
             a random mask
    weight_shape, output_size, live_weights  of the first layer
    """

    phase: str
    kernel: str
    layers: tuple[str, ...]
    weight_shape: tuple[int, ...]
    output_size: tuple[int, int]
    live_weights: int
    sparse: cycles.Modelled
    dense: cycles.Modelled


@dataclass(frozen=True, slots=True)
class Analysis:
    """Kernels of all sparse layers. core: whose pipeline the cycles are modelled on; batch: examples of a call."""

    target: str
    core: str
    batch: int
    scheme: str
    sparsity: float
    kernels: tuple[KernelFigures, ...]

    def totals(self, phase: str | None = None) -> dict[str, float]:
        """Sums over the layers of the step, of one phase or of all: instructions and cycles, sparse and dense, and how
        they compare."""
        chosen = [kernel for kernel in self.kernels if phase in (None, kernel.phase)]

        def total(side: str, fact: str) -> float:
            return sum(getattr(getattr(kernel, side), fact) * len(kernel.layers) for kernel in chosen)

        found = {
            f"{side}_{fact}": total(side, fact)
            for side in ("sparse", "dense")
            for fact in ("instructions", "cycles", "floor_cycles")
        }
        return found | {
            "share_of_floor": found["sparse_floor_cycles"] / found["sparse_cycles"],
            "dense_share_of_floor": found["dense_floor_cycles"] / found["dense_cycles"],
            "times_fewer_cycles": found["dense_cycles"] / found["sparse_cycles"],
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; cycles are modelled ones."""
        kernels = []
        for kernel in self.kernels:
            sides = {
                side: asdict(figures) | {"share_of_floor": figures.share_of_floor}
                for side, figures in (("sparse", kernel.sparse), ("dense", kernel.dense))
            }
            kernels.append(asdict(kernel) | sides | {"times_fewer_cycles": kernel.dense.cycles / kernel.sparse.cycles})
        facts = {name: getattr(self, name) for name in ("target", "core", "batch", "scheme", "sparsity")}
        return {
            "kind": "modelled",
            "llvm": cycles.VERSION,
            **facts,
            "kernels": kernels,
            "totals": {phase: self.totals(phase) for phase in PHASES} | {"all": self.totals()},
        }


def analyse(
    graph: ForwardGraph,
    options: StepOptions,
    only: Collection[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Analysis:
    """Figures of every distinct convolution kernel of the sparse layers in `graph`.

    options   of the sparse step; its one sparsity is for all sparse layers together
    only      weight names of the layers to look at; None: all sparse ones
    progress  told kernels done, and how many there are

    The batch is the graph's. Tiles do not depend on it where images are larger than a few pixels, so figures of a small
    batch are those of a large one, example for example, but for what a kernel does once a call.
    Raises NotInstalled, TargetError, SparsityError, UsageError (no sparse layer).
    """
    if options.one_sparsity is None:
        raise UsageError("figures are of one sparsity, and sparsity says each layer's; give a number")
    target = find_target(options.target)
    core = cycles.core_of(target)
    cycles.check_tools()
    emulation.check_tools(emulation.machine_of(target))
    sides = {
        side: _Side(plan_step(graph, chosen)) for side, chosen in (("sparse", options), ("dense", options.dense()))
    }
    sparse = [
        name for name, layer in sides["sparse"].layers.items() if layer.sparsity > 0 and (only is None or name in only)
    ]
    if not sparse:
        raise UsageError("the model has no such sparse layer: nothing to compare with dense kernels")
    groups: dict[tuple[Any, ...], list[str]] = {}
    for phase in PHASES:
        for name in sparse:
            if (name, phase) in sides["sparse"].calls:
                kinds = tuple(side.kind(name, phase) for side in sides.values())
                groups.setdefault((phase, *kinds), []).append(name)
    figures = []
    for number, ((phase, *_), names) in enumerate(groups.items()):
        progress(number, len(groups))
        layer = sides["sparse"].layers[names[0]]
        modelled = {side: facts.model(names[0], phase) for side, facts in sides.items()}
        figures.append(
            KernelFigures(
                phase,
                sides["sparse"].calls[names[0], phase].kernel,
                tuple(names),
                layer.spec.weight_shape,
                layer.spec.output_size,
                sides["sparse"].live_weights(names[0]),
                modelled["sparse"],
                modelled["dense"],
            )
        )
    progress(len(groups), len(groups))
    return Analysis(target.name, core, graph.input_shape[0], options.scheme_text, options.one_sparsity, tuple(figures))


class _Side:
    """A step whose kernels are analysed, the sparse or the dense one; equal kernels are emulated once."""

    def __init__(self, plan: Plan):
        self.layers, self.target, self.program = plan.layers, plan.target, plan.train
        self.calls = convolutions(self.program, plan.layers)
        self._known: dict[tuple[str, int], cycles.Modelled] = {}

    def kind(self, name: str, phase: str) -> tuple[Any, int]:
        """Equal for calls that execute the same: problem and live weights."""
        call = self.calls[name, phase]
        return (call.kernel, call.problem), self.live_weights(name)

    def live_weights(self, name: str) -> int:
        layer = self.layers[name]
        return layer.scheme.live_cells(layer.spec, layer.sparsity) * layer.scheme.cell_elems(layer.spec)

    def model(self, name: str, phase: str) -> cycles.Modelled:
        call, layer = self.calls[name, phase], self.layers[name]
        source = kernel_source(call.kernel, call.problem, self.target)
        key = source.key, self.live_weights(name)
        if key not in self._known:
            height, width = layer.spec.output_size
            arrays = call_arrays(call, layer, self.program)
            useful = self.live_weights(name) * height * width * layer.spec.input_shape[0]
            self._known[key] = cycles.model(emulation.emulate(source, arrays), self.target, useful)
        return self._known[key]


def convolutions(program: Program, layers: Mapping[str, Layer]) -> dict[tuple[str, str], Call]:
    """{(weight name, phase): call} of every convolution and linear layer in a training program."""
    return {(call.layer, call.phase): call for call in program.calls if call.layer in layers and call.phase in PHASES}

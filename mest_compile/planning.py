"""Which layers are sparse, by how much, in which scheme, and how their index is cut: decided before anything is compiled."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from mest_compile.errors import BudgetError, SparsityError, TargetError, UnknownName, UsageError
from mest_compile.graph.footprint import footprint
from mest_compile.graph.lowering import lower, recomputable
from mest_compile.graph.program import Program
from mest_compile.hardware import Target, find_target, target_names
from mest_compile.operators.family import family_for
from mest_compile.registry import FAMILIES
from mest_compile.sparsity.distributions import distribute
from mest_compile.sparsity.layer import Layer
from mest_compile.sparsity.room import DIGITS, held_cells, overall_sparsity, units_at
from mest_compile.sparsity.scheme import Scheme
from mest_compile.sparsity.schemes.dense import Dense
from mest_compile.spec import ACTIVATIONS, ForwardGraph, LayerSpec

log = logging.getLogger(__name__)

MIB = 2**20


def layer_specs(graph: ForwardGraph) -> list[LayerSpec]:
    """Every convolution and linear layer, in order; linear layers as 1x1 convolutions."""
    shapes = {"input": graph.input_shape} | {node.name: node.shape for node in graph.nodes}
    specs = []
    for node in graph.nodes:
        if node.op in ("conv2d", "linear"):
            weight, source = graph.state_shapes[node.params["weight"]], shapes[node.inputs[0]]
            pad = (1,) * (4 - len(weight))
            specs.append(LayerSpec(node.params["weight"], (*weight, *pad), (*source, *(1,) * (4 - len(source))),  # type: ignore[arg-type]
                                   tuple(node.attrs.get("stride", (1, 1))), tuple(node.attrs.get("padding", (0, 0)))))
    return specs


def default_dense_layers(specs: Sequence[LayerSpec]) -> list[str]:
    """What MEST (arXiv:2110.14032) leaves dense: the first convolution, 1x1 convolutions on images (downsampling), the classifier."""
    images = [spec for spec in specs if spec.input_shape[2:] != (1, 1)]
    small = [spec for spec in images if spec.weight_shape[2:] == (1, 1)]
    return list(dict.fromkeys(spec.name for spec in [*images[:1], *small, specs[-1]]))


def plan_layers(graph: ForwardGraph, scheme: Scheme, sparsity: float | Mapping[str, float], distribution: str,
                dense_layers: Sequence[str] | None, target: Target, activations: str = "float32") -> dict[str, Layer]:
    """{weight name: Layer}. activations: what values are stored as. Raises SparsityError, UnknownName, UsageError, TargetError."""
    check_activations(activations, target)
    specs = layer_specs(graph)
    names = [spec.name for spec in specs]
    if isinstance(scheme, Dense) and isinstance(sparsity, float | int) and sparsity != 0:
        raise SparsityError(f"scheme dense has sparsity 0, not {sparsity}; pass sparsity=0, or choose another scheme")
    dense = default_dense_layers(specs) if dense_layers is None else [_weight_name(name, names, "dense_layers") for name in dense_layers]
    sparse = [spec for spec in specs if spec.name not in dense]
    if isinstance(sparsity, Mapping):
        share = {_weight_name(name, names, "sparsity"): float(value) for name, value in sparsity.items()}
    elif isinstance(sparsity, int | float):
        share = distribute(distribution, sparse, float(sparsity))
    else:
        raise UsageError(f"sparsity is a number or {{layer: number}}, not {type(sparsity).__name__}")
    layers = {}
    for spec in specs:
        chosen = Dense() if spec.name not in share or share[spec.name] == 0.0 and isinstance(scheme, Dense) else scheme
        chosen.check(spec)
        chosen.live_units(spec, share.get(spec.name, 0.0))
        kernels = family_for(chosen, spec, target.device)
        sections = FAMILIES.find(kernels).sections(spec, chosen, target, activations)
        layers[spec.name] = Layer(spec, chosen, share.get(spec.name, 0.0), kernels, *sections)
    return layers


def check_activations(activations: str, target: Target) -> None:
    """Whether a target can store values so. Raises UsageError, TargetError."""
    if activations not in ACTIVATIONS:
        raise UsageError(f"activations is {activations!r}; wanted {' or '.join(map(repr, ACTIVATIONS))}")
    if activations == "float16" and not target.float16:
        able = ", ".join(name for name in target_names() if find_target(name).float16)
        raise TargetError(f"target {target.name!r} has no instructions that turn float16 into float32 and back, or none that are used; "
                          f"leave activations at float32, or compile for one of: {able}")


def meet_budget(graph: ForwardGraph, layers: Mapping[str, Layer], target: Target, budget_bytes: int, lower_density: bool,
                excess: float, activations: str = "float32") -> tuple[frozenset[str], float | None]:
    """(nodes to compute again in the backward pass, sparsity to raise all sparse layers to or None) with which a fused graph's step
    needs at most `budget_bytes` when it is densest.

    excess  by how much mutations grow beyond the sparsity that the model starts with
    activations  what values are stored as
    Raises BudgetError, UsageError.
    """
    if not isinstance(budget_bytes, int) or budget_bytes < 1:
        raise UsageError(f"memory_budget is {budget_bytes!r}; wanted a whole number of bytes of 1 or more, or None")

    def need(recomputed: frozenset[str], sparsity: float | None) -> int:
        units = room if sparsity is None else units_at(layers, round(max(0.0, sparsity - excess), DIGITS))
        train, predict = programs[recomputed]
        return footprint(train, predict, layers, held_cells(layers, units), target)["total"]

    start, room = overall_sparsity(layers), {name: layer.capacity for name, layer in layers.items() if layer.capacity is not None}
    choices = list(dict.fromkeys([usually_recomputed(graph, target), *recomputable(graph)]))
    programs = {recomputed: lower(graph, layers, target, recomputed, activations=activations) for recomputed in choices}
    for recomputed in choices:
        if need(recomputed, None) <= budget_bytes:
            return recomputed, None
    leanest = min(choices, key=lambda choice: need(choice, None))
    if lower_density and start:
        for percent in range(int(start * 100) + 1, 100):
            if need(leanest, percent / 100) <= budget_bytes:
                log.warning("memory_budget %d bytes: sparsity raised from %.3f to %.2f", budget_bytes, start, percent / 100)
                return leanest, percent / 100
    least = need(leanest, 0.99 if lower_density and start else None)
    densest = f", {excess:g} denser than it starts," if excess else ""
    raise BudgetError(f"memory_budget is {budget_bytes} bytes; the step{densest} needs at least {least}, most of it activations: use a "
                      "smaller batch or model, or a larger budget")


def usually_recomputed(graph: ForwardGraph, target: Target) -> frozenset[str]:
    """Nodes of a fused graph that the backward pass computes again whatever the budget.

    On a CPU what batch_norm gives: from its input, which the backward pass reads anyhow, that takes no longer than to fetch what was kept
    from memory (0 to 8% of a step less on a Zen 5), and needs a quarter less memory.
    """
    return recomputable(graph)[0] if target.device == "cpu" else frozenset()


def warn_beyond_memory(train: Program, predict: Program, layers: Mapping[str, Layer], target: Target) -> None:
    """Says in the log when the step, at its densest, needs more than the smallest device that the target stands for has. It is no error:
    the device at hand may be a larger one, and what must not be exceeded is for `memory_budget`.
    """
    room = {name: layer.capacity for name, layer in layers.items() if layer.capacity is not None}
    need = footprint(train, predict, layers, held_cells(layers, room), target)["total"]
    if target.memory_bytes is not None and need > target.memory_bytes:
        log.warning("the step needs %.0f MiB, the smallest device of target %r has %.0f MiB: on such a one use a smaller batch or model, "
                    "or memory_budget, which computes values again instead of keeping them",
                    need / MIB, target.name, target.memory_bytes / MIB)


def _weight_name(name: str, names: Sequence[str], where: str) -> str:
    """The weight that `name` means: "layer1.0.conv1" or "layer1.0.conv1.weight"."""
    for candidate in (name, f"{name}.weight"):
        if candidate in names:
            return candidate
    raise UnknownName(f"{where} names {name!r}, which is no layer of the model; layers: {', '.join(names)}")

"""Which layers are sparse, by how much, in which scheme, and how their index is cut: decided before anything is
compiled."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from mest_compile.base import checks
from mest_compile.base.errors import SparsityError, SpecError, TargetError, UnknownName, UsageError
from mest_compile.hardware.target import Target, find_target, target_names
from mest_compile.ir.graph import BUFFER, ForwardGraph, LayerSpec
from mest_compile.ir.layouts.layout import ACTIVATIONS
from mest_compile.operators.layers.family import FAMILIES, family_for
from mest_compile.sparsity.defaults import default_dense_layers
from mest_compile.sparsity.distributions import check_distribution, distribute, together
from mest_compile.sparsity.layer import Layer
from mest_compile.sparsity.room import masked_layers
from mest_compile.sparsity.scheme import Scheme
from mest_compile.sparsity.schemes.dense import Dense

log = logging.getLogger(__name__)


def layer_specs(graph: ForwardGraph) -> list[LayerSpec]:
    """Every convolution and linear layer, in order; linear layers as 1x1 convolutions."""
    shapes = {"input": graph.input_shape} | {node.name: node.shape for node in graph.nodes}
    specs = []
    for node in graph.nodes:
        if node.op in ("conv2d", "linear"):
            weight, source = graph.state_shapes[node.params["weight"]], shapes[node.inputs[0]]
            pad = (1,) * (4 - len(weight))
            specs.append(
                LayerSpec(
                    node.params["weight"],
                    (*weight, *pad),  # type: ignore[arg-type]
                    (*source, *(1,) * (4 - len(source))),  # type: ignore[arg-type]
                    tuple(node.attrs.get("stride", (1, 1))),
                    tuple(node.attrs.get("padding", (0, 0))),
                )
            )
    return specs


def plan_layers(
    graph: ForwardGraph,
    scheme: Scheme,
    sparsity: float | Mapping[str, float],
    distribution: str,
    dense_layers: Sequence[str] | None,
    target: Target,
    activations: str = "float32",
) -> dict[str, Layer]:
    """{weight name: Layer}. activations: what values are stored as. Raises SparsityError, UnknownName, UsageError,
    TargetError."""
    check_activations(activations, target)
    specs = layer_specs(graph)
    if not specs:
        raise SpecError(
            "the model has no convolution and no linear layer, so there is nothing to train sparsely; give one that has"
        )
    share = _shares(graph, specs, scheme, sparsity, distribution, dense_layers)
    layers = {}
    for spec in specs:
        chosen = (
            Dense() if spec.name not in share or (share[spec.name] == 0.0 and isinstance(scheme, Dense)) else scheme
        )
        chosen.check(spec)
        chosen.live_units(spec, share.get(spec.name, 0.0))
        kernels = family_for(chosen, spec, target)
        forward, transposed = FAMILIES.find(kernels).sections(spec, chosen, target, activations)
        frozen = spec.name in graph.frozen
        sparsity_there = share.get(spec.name, 0.0)
        layers[spec.name] = Layer(spec, chosen, sparsity_there, kernels, forward, transposed, frozen=frozen)
    return layers


def _shares(
    graph: ForwardGraph,
    specs: Sequence[LayerSpec],
    scheme: Scheme,
    sparsity: float | Mapping[str, float],
    distribution: str,
    dense_layers: Sequence[str] | None,
) -> dict[str, float]:
    """{weight name: sparsity} of the layers that are not dense. What is said twice and differs is refused."""
    known = [spec.name for spec in specs]
    check_distribution(distribution)
    also = ", or None for the first convolution, the 1x1 convolutions of shortcuts and the classifier"
    dense = (
        None
        if dense_layers is None
        else [_weight_name(name, known, "dense_layers") for name in checks.names("dense_layers", dense_layers, also)]
    )
    if not isinstance(sparsity, Mapping):
        overall = checks.number("sparsity", sparsity, below=1, also=", or {layer name: number}", error=SparsityError)
        if isinstance(scheme, Dense) and overall != 0:
            raise SparsityError(
                f"scheme dense has sparsity 0, not {overall:g}; pass sparsity=0, or choose another scheme"
            )
        left = default_dense_layers(graph, specs, scheme) if dense is None else dense
        left = [*left, *(name for name, why in graph.frozen.items() if why == BUFFER)]  # nothing would make up for it
        return distribute(distribution, [spec for spec in specs if spec.name not in left], overall)
    if distribution != "uniform":
        raise UsageError(
            f"distribution {distribution!r} spreads one sparsity over the layers, but sparsity says each layer's; "
            f"give sparsity as a number, or leave distribution out"
        )
    share: dict[str, float] = {}
    for layer, value in sparsity.items():
        name = _weight_name(layer, known, "sparsity")
        if name in share:
            raise UsageError(f"sparsity names {name} twice; name it once")
        if name in (dense or ()):
            raise UsageError(f"sparsity names {name}, and so does dense_layers; leave it out of one of them")
        share[name] = checks.number(f"{name}: sparsity", value, below=1, error=SparsityError)
    return share


def say_what_stays_dense(layers: Mapping[str, Layer]) -> None:
    """A line in the log where a model that was to be sparse has no sparse layer, or less than half of its weights in
    such."""
    sparse = masked_layers(layers)
    elems = {name: layer.spec.weight_elems for name, layer in layers.items()}
    inside, every = (sum(elems[name] for name in some) for some in (sparse, layers))
    if 2 * inside < every:
        dense = ", ".join(name for name in layers if name not in sparse)
        log.warning(
            "%s of the weights are in sparse layers, so that the sparsity of all is %.3f; dense are: %s. "
            "dense_layers says "
            "which are",
            f"{inside / every:.0%}" if inside else "none",
            together({name: layer.sparsity for name, layer in layers.items()}, elems),
            dense,
        )


def check_activations(activations: str, target: Target) -> None:
    """Whether a target can store values so. Raises UsageError, TargetError."""
    if not isinstance(activations, str) or activations not in ACTIVATIONS:
        raise UsageError(f"activations is {checks.shown(activations)}; wanted {' or '.join(map(repr, ACTIVATIONS))}")
    if activations == "float16" and not target.float16:
        able = ", ".join(name for name in target_names() if find_target(name).float16)
        raise TargetError(
            f"target {target.name!r} has no instructions that turn float16 into float32 and back, or none that "
            "are used; "
            f"leave activations at float32, or compile for one of: {able}"
        )


def _weight_name(name: str, names: Sequence[str], where: str) -> str:
    """The weight that `name` means: "layer1.0.conv1" or "layer1.0.conv1.weight"."""
    for candidate in (name, f"{name}.weight"):
        if candidate in names:
            return candidate
    raise UnknownName(f"{where} names {checks.shown(name)}, which is no layer of the model; layers: {', '.join(names)}")

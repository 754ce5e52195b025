"""Which layers are sparse, by how much, in which scheme, and how their index is cut: decided before anything is
compiled."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from mest_compile.base import checks
from mest_compile.base.errors import SparsityError, SpecError, UnknownName, UsageError
from mest_compile.hardware.target import Target
from mest_compile.ir.graph import BUFFER, ForwardGraph, LayerSpec
from mest_compile.operators.layers.family import FAMILIES, family_for
from mest_compile.options import StepOptions
from mest_compile.sparsity.defaults import default_dense_layers
from mest_compile.sparsity.distributions import distribute, together
from mest_compile.sparsity.layer import Layer
from mest_compile.sparsity.room import masked_layers
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


def plan_layers(graph: ForwardGraph, options: StepOptions, target: Target) -> dict[str, Layer]:
    """{weight name: Layer} for that target, whatever the options' is. Raises SparsityError, SpecError, UnknownName,
    UsageError."""
    specs = layer_specs(graph)
    if not specs:
        raise SpecError(
            "the model has no convolution and no linear layer, so there is nothing to train sparsely; give one that has"
        )
    share, layers = _shares(graph, specs, options), {}
    for spec in specs:
        scheme, sparsity = options.scheme if spec.name in share else Dense(), share.get(spec.name, 0.0)
        scheme.check(spec)
        scheme.live_units(spec, sparsity)
        kernels = family_for(scheme, spec, target)
        forward, transposed = FAMILIES.find(kernels).sections(spec, scheme, target, options.activations)
        frozen = spec.name in graph.frozen
        layers[spec.name] = Layer(spec, scheme, sparsity, kernels, forward, transposed, frozen=frozen)
    return layers


def _shares(graph: ForwardGraph, specs: Sequence[LayerSpec], options: StepOptions) -> dict[str, float]:
    """{weight name: sparsity} of the layers that are not dense. What is said twice and differs is refused."""
    known = [spec.name for spec in specs]
    dense = None
    if options.dense_layers is not None:
        dense = [weight_name(name, known, "dense_layers") for name in options.dense_layers]
    if options.one_sparsity is not None:
        left = default_dense_layers(graph, specs, options.scheme) if dense is None else dense
        left = [*left, *(name for name, why in graph.frozen.items() if why == BUFFER)]  # nothing would make up for it
        return distribute(options.distribution, [spec for spec in specs if spec.name not in left], options.one_sparsity)
    if not isinstance(options.sparsity, Mapping):
        raise SparsityError(f"sparsity {options.sparsity!r} is of weights, which are not looked at here; give a number")
    share: dict[str, float] = {}
    for layer, value in options.sparsity.items():
        name = weight_name(layer, known, "sparsity")
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


def weight_name(name: str, names: Sequence[str], where: str) -> str:
    """The weight that `name` means: "layer1.0.conv1" or "layer1.0.conv1.weight"."""
    for candidate in (name, f"{name}.weight"):
        if candidate in names:
            return candidate
    raise UnknownName(f"{where} names {checks.shown(name)}, which is no layer of the model; layers: {', '.join(names)}")

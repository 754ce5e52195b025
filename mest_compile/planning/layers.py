"""Which layers are sparse, by how much, in which scheme, and how their index is cut: decided before anything is
compiled."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from mest_compile.base import checks
from mest_compile.base.errors import SparsityError, SpecError, UsageError
from mest_compile.hardware.target import Target
from mest_compile.ir.arrangement import image_shape
from mest_compile.ir.graph import BUFFER, LAYERS, ForwardGraph, LayerSpec
from mest_compile.operators.layers.family import FAMILIES, family_for
from mest_compile.options import AS_GIVEN, StepOptions
from mest_compile.planning.patterns import by_layer, check_counts, weight_name
from mest_compile.sparsity.defaults import default_dense_layers
from mest_compile.sparsity.distributions import distribute, together
from mest_compile.sparsity.layer import Layer
from mest_compile.sparsity.room import masked_layers
from mest_compile.sparsity.scheme import Scheme
from mest_compile.sparsity.schemes.dense import Dense

log = logging.getLogger(__name__)


def layer_specs(graph: ForwardGraph) -> list[LayerSpec]:
    """Every convolution and linear layer, in order; linear layers as 1x1 convolutions, transposed convolutions as those
    that they are the input gradient of."""
    shapes = {"input": graph.input_shape} | {node.name: node.shape for node in graph.nodes}
    specs = []
    for node in graph.nodes:
        if node.op in LAYERS:
            transposed = node.op == "conv_transpose2d"
            weight = graph.state_shapes[node.params["weight"]]
            source = node.shape if transposed else shapes[node.inputs[0]]
            specs.append(
                LayerSpec(
                    node.params["weight"],
                    image_shape(weight),
                    image_shape(source),
                    tuple(node.attrs.get("stride", (1, 1))),
                    tuple(node.attrs.get("padding", (0, 0))),
                    node.attrs.get("groups", 1),
                    tuple(node.attrs.get("dilation", (1, 1))),
                    node.attrs.get("padding_end"),
                    transposed,
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
    schemes = layer_schemes(specs, options)
    share, layers = _shares(graph, specs, options, schemes), {}
    if isinstance(options.scheme, Mapping):
        sparse = [name for name, scheme in options.scheme.items() if not isinstance(scheme, Dense)]
        check_counts(sparse, [spec.name for spec in specs], share, "scheme")
    for spec in specs:
        scheme: Scheme = scheme_of(spec.name, schemes) if spec.name in share else Dense()
        sparsity = share.get(spec.name, 0.0)
        scheme.check(spec)
        scheme.live_units(spec, sparsity)
        kernels = family_for(scheme, spec, target)
        forward, transposed = FAMILIES.find(kernels).sections(spec, scheme, target, options.activations)
        frozen = spec.name in graph.frozen
        layers[spec.name] = Layer(spec, scheme, sparsity, kernels, forward, transposed, frozen=frozen)
    return layers


def layer_schemes(specs: Sequence[LayerSpec], options: StepOptions) -> dict[str, tuple[Scheme, bool]]:
    """{weight name: (its scheme when it is sparse, whether it is named itself)}; a layer that `scheme` says nothing of
    is not in it. Raises UnknownName, UsageError."""
    if not isinstance(options.scheme, Mapping):
        return {spec.name: (options.scheme, False) for spec in specs}
    return by_layer(options.scheme, [spec.name for spec in specs], "scheme")


def scheme_of(name: str, schemes: Mapping[str, tuple[Scheme, bool]]) -> Scheme:
    """Raises UsageError where there is none."""
    if name not in schemes:
        raise UsageError(
            f'{name} is to be sparse, and no pattern of scheme matches it; add one, such as "*": "block", or "dense"'
        )
    return schemes[name][0]


def _shares(
    graph: ForwardGraph,
    specs: Sequence[LayerSpec],
    options: StepOptions,
    schemes: Mapping[str, tuple[Scheme, bool]],
) -> dict[str, float]:
    """{weight name: sparsity} of the layers that are not dense. What is said twice and differs is refused."""
    known = [spec.name for spec in specs]
    said = [weight_name(name, known, "dense_layers") for name in options.dense_layers or ()]
    for name in said:
        if name in schemes and schemes[name][1] and not isinstance(schemes[name][0], Dense):
            raise UsageError(f"scheme names {name}, and so does dense_layers; leave it out of one of them")
    # Layers that stay dense, and who says so; what nobody says is so unless the layer is named.
    left = {name: "" for name, why in graph.frozen.items() if why == BUFFER}  # nothing would make up for it
    if options.dense_layers is None:
        every = default_dense_layers(graph, specs, {name: scheme for name, (scheme, _) in schemes.items()})
        left |= {name: "" for name in every if not (name in schemes and schemes[name][1])}
    left |= dict.fromkeys(said, "dense_layers")
    if isinstance(options.scheme, Mapping):
        left |= {name: "scheme" for name, (scheme, _) in schemes.items() if isinstance(scheme, Dense)}
    if options.one_sparsity is not None:
        sparse = [spec for spec in specs if spec.name not in left]
        if not sparse and options.dense_layers is None:  # dense for other reasons, or the scheme fits nothing
            for spec in specs:
                if spec.name in schemes and every[spec.name].startswith(f"{schemes[spec.name][0]} "):
                    schemes[spec.name][0].check(spec)
        share = distribute(options.distribution, sparse, options.one_sparsity)
        for name, value in share.items():
            scheme_of(name, schemes).asked(value, f"{name}: ")
        return share
    if not isinstance(options.sparsity, Mapping):
        raise SparsityError(f"sparsity {options.sparsity!r} is of weights, which are not looked at here; give a number")
    share = {}
    for name, (value, itself) in by_layer(options.sparsity, known, "sparsity").items():
        value = checks.number(f"{name}: sparsity", value, below=1, error=SparsityError)
        if name not in left or (itself and not left[name]):
            share[name] = value
        elif itself:
            raise UsageError(f"sparsity names {name}, and so does {left[name]}; leave it out of one of them")
    check_counts(options.sparsity, known, share, "sparsity")
    return share


def why_dense(graph: ForwardGraph, options: StepOptions, layers: Mapping[str, Layer]) -> dict[str, str]:
    """{weight name: why} of the layers that have no mask, in their order. options: as the caller said them."""
    schemes = {
        name: scheme for name, (scheme, _) in layer_schemes([one.spec for one in layers.values()], options).items()
    }
    named = {weight_name(name, list(layers), "dense_layers") for name in options.dense_layers or ()}
    usual = {}
    if options.dense_layers is None:
        usual = default_dense_layers(graph, [layer.spec for layer in layers.values()], schemes)
    found = {}
    for name in layers.keys() - masked_layers(layers).keys():
        if graph.frozen.get(name) == BUFFER:
            found[name] = BUFFER
        elif name in named:
            found[name] = "dense_layers names it"
        elif isinstance(schemes.get(name), Dense):
            found[name] = "scheme dense"
        elif options.sparsity == AS_GIVEN:
            found[name] = "no weight of it is 0"
        else:
            found[name] = usual.get(name, "no sparsity is given for it")
    return {name: found[name] for name in layers if name in found}


def say_what_stays_dense(layers: Mapping[str, Layer], why: Mapping[str, str]) -> None:
    """A line in the log where a model that was to be sparse has no sparse layer, or less than half of its weights in
    such. why: as `why_dense` has it."""
    sparse = masked_layers(layers)
    elems = {name: layer.spec.weight_elems for name, layer in layers.items()}
    inside, every = (sum(elems[name] for name in some) for some in (sparse, layers))
    if 2 * inside < every:
        groups: dict[str, list[str]] = {}
        for name, reason in why.items():
            groups.setdefault(reason, []).append(name)
        listed = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in groups.items())
        log.warning(
            "%s of the weights are in sparse layers, so that the sparsity of all is %.3f; dense are: %s. "
            "dense_layers says which are",
            f"{inside / every:.0%}" if inside else "none",
            sparsity_of_all(layers),
            listed,
        )


def sparsity_of_all(layers: Mapping[str, Layer]) -> float:
    """Of all weights of convolutions and linear layers together, dense ones too."""
    elems = {name: layer.spec.weight_elems for name, layer in layers.items()}
    return together({name: layer.sparsity for name, layer in layers.items()}, elems)

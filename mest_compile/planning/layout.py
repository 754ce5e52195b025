"""Vector width and sections of a step, chosen from records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mest_compile.hardware.target import Target
from mest_compile.operators.layers.family import FAMILIES
from mest_compile.records.log import Records, key_of, text_digest
from mest_compile.records.record import SECTIONS, STEP
from mest_compile.sparsity.layer import Layer, live_cells


def step_facts(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """What records of whole steps know them by: `layers` tells them apart, the rest says which are alike."""
    entries = [
        [
            list(layer.spec.input_shape),
            list(layer.spec.weight_shape),
            list(layer.spec.stride),
            str(layer.scheme),
            layer.sparsity,
        ]
        for layer in layers.values()
    ]
    flop = sum(
        2
        * live_cells(layer)
        * layer.scheme.cell_elems(layer.spec)
        * layer.spec.output_size[0]
        * layer.spec.output_size[1]
        * layer.spec.input_shape[0]
        for layer in layers.values()
    )
    return {
        "layers": text_digest(repr(entries)),
        "schemes": sorted({str(layer.scheme) for layer in layers.values()}),
        "batch": next(iter(layers.values())).spec.input_shape[0],
        "flop": flop,
    }


def widened(target: Target, vector: int) -> Target:
    """`target` with images whose slices hold `vector` examples."""
    return target if vector == target.vector else replace(target, vector=vector)


def choose_vector(layers: Mapping[str, Layer], target: Target, records: Records) -> Target:
    """`target` with the vector width that was fastest for this step, or for one like it; as it is where no step was
    timed."""
    facts = step_facts(layers)
    batch = facts["batch"]

    def fits(knobs: Mapping[str, Any]) -> str | None:
        vector = knobs.get("vector", target.vector)
        return text_digest(STEP) if batch % vector == 0 else None

    return widened(target, records.best(STEP, facts, 0, fits).knobs.get("vector", target.vector))


def section_facts(layer: Layer, activations: str) -> dict[str, Any]:
    """What records of sections know a layer by."""
    batch, channels, height, width = layer.spec.input_shape
    return {
        "source": {"batch": batch, "channels": channels, "height": height, "width": width},
        "result": {"channels": layer.spec.weight_shape[0]},
        "kernel": list(layer.spec.weight_shape[2:]),
        "stride": list(layer.spec.stride),
        "scheme": str(layer.scheme),
        "activations": activations,
    }


def with_sections(layer: Layer, target: Target, activations: str, caches: tuple[int, int]) -> Layer:
    """The layer with its index cut so that a tile reads so many first-level caches full of a section, forward and
    transposed."""
    forward, transposed = FAMILIES.find(layer.kernels).sections(layer.spec, layer.scheme, target, activations, caches)
    return replace(layer, section_channels=forward, transposed_section_channels=transposed)


def section_knobs(
    layers: Mapping[str, Layer], records: Records, activations: str
) -> dict[tuple[str, str, int], Mapping[str, Any]]:
    """{key of a kind of section and a layer: how that is cut}, as was fastest for such layers."""
    found: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    for layer in layers.values():
        facts, live = section_facts(layer, activations), live_cells(layer)
        for kind in SECTIONS:
            key, digest = key_of(kind, facts, live), text_digest(kind)
            if key not in found:  # many layers of a net are alike
                found[key] = records.best(kind, facts, live, lambda _, digest=digest: digest).knobs  # type: ignore[misc]
    return found


def choose_sections(
    layers: Mapping[str, Layer], target: Target, records: Records, activations: str
) -> dict[str, Layer]:
    """The layers with their indices cut as was fastest for such layers; as they are where none was timed."""
    knobs = section_knobs(layers, records, activations)

    def cut(layer: Layer) -> Layer:
        facts, live = section_facts(layer, activations), live_cells(layer)
        forward, transposed = (knobs[key_of(kind, facts, live)].get("caches", 1) for kind in SECTIONS)
        return with_sections(layer, target, activations, (forward, transposed))

    return {name: cut(layer) for name, layer in layers.items()}

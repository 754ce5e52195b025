"""Vector width and sections of a step, chosen from records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target
from mest_compile.ir.graph import ForwardGraph
from mest_compile.ir.problem import ASIDE, SIZE
from mest_compile.operators.layers.family import FAMILIES
from mest_compile.records.knob import Knob
from mest_compile.records.log import Records, key_of, text_digest
from mest_compile.records.record import SECTIONS, STEP
from mest_compile.sparsity.layer import Layer, live_cells


@dataclass(frozen=True, slots=True)
class WholeStep:
    """What records of whole steps know them by: `layers` tells them apart, the rest says which are alike."""

    layers: str = field(metadata=ASIDE)
    schemes: tuple[str, ...]
    batch: int = field(metadata=SIZE)
    flop: int = field(metadata=SIZE)


@dataclass(frozen=True, slots=True)
class Pixels:
    """What a layer reads."""

    batch: int = field(metadata=SIZE)
    channels: int = field(metadata=SIZE)
    height: int = field(metadata=SIZE)
    width: int = field(metadata=SIZE)


@dataclass(frozen=True, slots=True)
class Channels:
    """What a layer writes."""

    channels: int = field(metadata=SIZE)


@dataclass(frozen=True, slots=True)
class CutLayer:
    """What records of sections know a layer by."""

    source: Pixels
    result: Channels
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    scheme: str
    activations: str


def _widths(step: WholeStep, target: Target) -> Iterator[int]:
    return (width for width in target.vectors if step.batch % width == 0 or width == target.vector)


VECTOR = Knob("vector", None, "examples of a slice of an image; None: as many as the target's registers hold", _widths)
CACHES = Knob("caches", 1, "first-level caches full of a section of an index, all that the second level allows", (2, 8))


def step_facts(layers: Mapping[str, Layer]) -> WholeStep:
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
    schemes = tuple(sorted({str(layer.scheme) for layer in layers.values()}))
    batch = next(iter(layers.values())).spec.input_shape[0]
    return WholeStep(text_digest(repr(entries)), schemes, batch, flop)


def widened(target: Target, vector: int) -> Target:
    """`target` with images whose slices hold `vector` examples."""
    return target if vector == target.vector else replace(target, vector=vector)


# Operators whose kernels take neighbouring pixels as a vector, or take hardly any time.
_BY_ROWS = frozenset(("conv2d", "batch_norm", "add", "relu", "max_pool2d", "global_avg_pool", "flatten", "linear"))


def with_slices(graph: ForwardGraph, target: Target, activations: str) -> Target:
    """`target` with the examples of a slice that steps of the graph's batch have: as many as a vector holds, or, of
    fewer, the largest power of two that divides the batch, so that none is empty.

    Vectors then cover neighbouring pixels, or, in kernels that take a pixel at a time, are as narrow. That is for
    processors and float32 or float16, where nothing is lost by it: pairs of bfloat16 are of examples. Of larger
    batches too slices hold half a vector where else more than a tenth of the lanes were empty: of 12 examples and 8
    lanes resnet20 then takes 0.8 of the time and of the bytes, and DS-CNN, whose depthwise layers take a pixel at a
    time, 1.15 of the time, so that it is for nets without such.
    """
    batch = graph.input_shape[0]
    largest, empty = batch & -batch, -batch % target.vector
    transposed = any(node.op == "conv_transpose2d" for node in graph.nodes)  # its roles of halos are exchanged
    by_rows = activations != "bfloat16" and backend_of(target).processor and not transposed
    halved = 2 * largest == target.vector and 10 * empty > batch and _takes_rows(graph)
    return replace(target, examples=largest if by_rows and (batch < target.vector or halved) else None)


def _takes_rows(graph: ForwardGraph) -> bool:
    """Whether most of a step's time is in kernels that take neighbouring pixels as a vector."""
    layers = [node for node in graph.nodes if node.op == "conv2d"]
    return (
        bool(layers)
        and {node.op for node in graph.nodes} <= _BY_ROWS
        and all(node.attrs.get("groups", 1) == 1 for node in layers)
    )


def choose_vector(layers: Mapping[str, Layer], target: Target, records: Records) -> Target:
    """`target` with the vector width that was fastest for this step, or for one like it; as it is where no step was
    timed."""
    facts = step_facts(layers)

    def fits(knobs: Mapping[str, Any]) -> str | None:
        return text_digest(STEP) if facts.batch % (VECTOR.of(knobs) or target.vector) == 0 else None

    return widened(target, VECTOR.of(records.best(STEP, facts, 0, fits).knobs) or target.vector)


def section_facts(layer: Layer, activations: str) -> CutLayer:
    spec = layer.spec
    source, result = Pixels(*spec.input_shape), Channels(spec.weight_shape[0])
    return CutLayer(source, result, spec.weight_shape[2:], spec.stride, str(layer.scheme), activations)


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
        forward, transposed = (CACHES.of(knobs[key_of(kind, facts, live)]) for kind in SECTIONS)
        return with_sections(layer, target, activations, (forward, transposed))

    return {name: cut(layer) for name, layer in layers.items()}

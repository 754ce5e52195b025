"""Which knobs each kernel of a step is compiled with, how wide its vectors are, how indices are cut: what tuning found out, applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mest_compile.building import KernelSource, kernel_source, knob_space
from mest_compile.graph.program import Call, Program
from mest_compile.hardware import Target
from mest_compile.records import SECTIONS, STEP, Choice, Records, key_of, knobs_from, plain, text_digest
from mest_compile.registry import FAMILIES
from mest_compile.sparsity.layer import Layer

Choices = dict[str, dict[str, Choice]]  # program name -> call name -> choice


def step_facts(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """What records of whole steps know them by: `layers` tells them apart, the rest says which are alike."""
    entries = [[list(layer.spec.input_shape), list(layer.spec.weight_shape), list(layer.spec.stride), str(layer.scheme), layer.sparsity]
               for layer in layers.values()]
    flop = sum(2 * live_cells(layer) * layer.scheme.cell_elems(layer.spec) * layer.spec.output_size[0] * layer.spec.output_size[1]
               * layer.spec.input_shape[0] for layer in layers.values())
    return {"layers": text_digest(repr(entries)), "schemes": sorted({str(layer.scheme) for layer in layers.values()}),
            "batch": next(iter(layers.values())).spec.input_shape[0], "flop": flop}


def live_cells(layer: Layer) -> int:
    return layer.scheme.live_cells(layer.spec, layer.sparsity)


def live_of(call: Call, layers: Mapping[str, Layer]) -> int:
    """Live cells of the layer that a call works for, 0 where it works for none."""
    layer = layers.get(call.buffers[0].weight)
    return live_cells(layer) if layer else 0


def widened(target: Target, vector: int) -> Target:
    """`target` with images whose slices hold `vector` examples."""
    return target if vector == target.vector else replace(target, vector=vector)


def choose_vector(layers: Mapping[str, Layer], target: Target, records: Records) -> Target:
    """`target` with the vector width that was fastest for this step, or for one like it; as it is where no step was timed."""
    facts = step_facts(layers)
    batch = facts["batch"]

    def fits(knobs: Mapping[str, Any]) -> str | None:
        vector = knobs.get("vector", target.vector)
        return text_digest(STEP) if batch % vector == 0 else None

    return widened(target, records.best(STEP, facts, 0, fits).knobs.get("vector", target.vector))


def section_facts(layer: Layer, activations: str) -> dict[str, Any]:
    """What records of sections know a layer by."""
    batch, channels, height, width = layer.spec.input_shape
    return {"source": {"batch": batch, "channels": channels, "height": height, "width": width},
            "result": {"channels": layer.spec.weight_shape[0]}, "kernel": list(layer.spec.weight_shape[2:]),
            "stride": list(layer.spec.stride), "scheme": str(layer.scheme), "activations": activations}


def with_sections(layer: Layer, target: Target, activations: str, caches: tuple[int, int]) -> Layer:
    """The layer with its index cut so that a tile reads so many first-level caches full of a section, forward and transposed."""
    forward, transposed = FAMILIES.find(layer.kernels).sections(layer.spec, layer.scheme, target, activations, caches)
    return replace(layer, section_channels=forward, transposed_section_channels=transposed)


def section_knobs(layers: Mapping[str, Layer], records: Records, activations: str) -> dict[tuple[str, str, int], Mapping[str, Any]]:
    """{key of a kind of section and a layer: how that is cut}, as was fastest for such layers."""
    found: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    for layer in layers.values():
        facts, live = section_facts(layer, activations), live_cells(layer)
        for kind in SECTIONS:
            key, digest = key_of(kind, facts, live), text_digest(kind)
            if key not in found:  # many layers of a net are alike
                found[key] = records.best(kind, facts, live, lambda _, digest=digest: digest).knobs  # type: ignore[misc]
    return found


def choose_sections(layers: Mapping[str, Layer], target: Target, records: Records, activations: str) -> dict[str, Layer]:
    """The layers with their indices cut as was fastest for such layers; as they are where none was timed."""
    knobs = section_knobs(layers, records, activations)

    def cut(layer: Layer) -> Layer:
        facts, live = section_facts(layer, activations), live_cells(layer)
        forward, transposed = (knobs[key_of(kind, facts, live)].get("caches", 1) for kind in SECTIONS)
        return with_sections(layer, target, activations, (forward, transposed))

    return {name: cut(layer) for name, layer in layers.items()}


def choose_knobs(programs: Sequence[Program], layers: Mapping[str, Layer], target: Target, records: Records) -> Choices:
    """Every call's choice. Equal kernels of layers with equally many live cells have equal ones."""
    found: dict[tuple[str, Any, int], Choice] = {}

    def choose(call: Call) -> Choice:
        kind = (call.kernel, call.problem, live_of(call, layers))
        if kind not in found:
            found[kind] = records.best(*kind, lambda knobs: _text(call, target, knobs))
        return found[kind]

    return {program.name: {call.name: choose(call) for call in program.calls} for program in programs}


def remembered(programs: Sequence[Program], knobs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Choices:
    """The choices that `facts` noted: what a step was compiled with before."""
    def choice(program: Program, call: Call) -> Choice:
        noted = knobs.get(program.name, {}).get(call.name, {"knobs": {}, "origin": "default"})
        return Choice(knobs_from(noted["knobs"]), noted["origin"], modelled=noted.get("modelled", False))

    return {program.name: {call.name: choice(program, call) for call in program.calls} for program in programs}


def facts(choices: Choices) -> dict[str, dict[str, Any]]:
    """Choices that records made, ready for JSON."""
    def noted(choice: Choice) -> dict[str, Any]:
        return {"knobs": plain(choice.knobs), "origin": choice.origin, "modelled": choice.modelled}

    return {program: {call: noted(choice) for call, choice in calls.items() if choice.origin != "default"}
            for program, calls in choices.items()}


def origins(choices: Choices) -> dict[str, int]:
    """How many calls of the training step are of each origin; of those that a model chose the name says so."""
    return dict(Counter(f"{choice.origin}, modelled" if choice.modelled else choice.origin for choice in choices["train"].values()))


def sources(programs: Sequence[Program], target: Target, choices: Choices) -> dict[str, dict[str, KernelSource]]:
    """Program name -> call name -> the text of its kernel. Text is made once for equal kernels."""
    made: dict[tuple[str, Any, str], KernelSource] = {}

    def source(call: Call, knobs: Mapping[str, Any]) -> KernelSource:
        key = (call.kernel, call.problem, repr(sorted(knobs.items())))
        if key not in made:
            made[key] = kernel_source(call.kernel, call.problem, target, **knobs)
        return made[key]

    return {program.name: {call.name: source(call, choices[program.name][call.name].knobs) for call in program.calls}
            for program in programs}


def _text(call: Call, target: Target, knobs: Mapping[str, Any]) -> str | None:
    """Digest of the kernel's text, None where its schedule does not take these knobs."""
    space = knob_space(call.kernel, call.problem, target)
    if any(name not in space or value not in space[name] for name, value in knobs.items()):
        return None
    return text_digest(kernel_source(call.kernel, call.problem, target, **knobs).text)

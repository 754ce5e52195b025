"""Which knobs each kernel of a step is compiled with, how wide its vectors are, how indices are cut: what tuning found
out, applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from mest_compile.hardware.target import Target
from mest_compile.ir.program import Call, Program
from mest_compile.kernels.source import KernelSource, kernel_source, knob_space
from mest_compile.records.log import Records, knobs_from, plain, text_digest
from mest_compile.records.record import Choice
from mest_compile.sparsity.layer import Layer, live_cells

Choices = dict[str, dict[str, Choice]]  # program name -> call name -> choice
Kind = tuple[str, Any, int]  # kernel, problem, live cells: equal ones have equal choices


def live_of(call: Call, layers: Mapping[str, Layer]) -> int:
    """Live cells of the layer that a call works for, 0 where it works for none."""
    layer = layers.get(call.layer)
    return live_cells(layer) if layer else 0


def kind_of(call: Call, layers: Mapping[str, Layer]) -> Kind:
    return call.kernel, call.problem, live_of(call, layers)


def choose_knobs(
    programs: Sequence[Program],
    layers: Mapping[str, Layer],
    target: Target,
    records: Records,
    known: Mapping[Kind, Choice] = MappingProxyType({}),
) -> Choices:
    """Every call's choice. Equal kernels of layers with equally many live cells have equal ones; known: those that are
    made already."""
    found = dict(known)

    def choose(call: Call) -> Choice:
        kind = kind_of(call, layers)
        if kind not in found:
            found[kind] = records.best(*kind, lambda knobs: _text(call, target, knobs))
        return found[kind]

    return {program.name: {call.name: choose(call) for call in program.calls} for program in programs}


def made(programs: Sequence[Program], layers: Mapping[str, Layer], choices: Choices) -> dict[Kind, Choice]:
    """What those choices are of."""
    return {kind_of(call, layers): choices[program.name][call.name] for program in programs for call in program.calls}


def remembered(programs: Sequence[Program], knobs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Choices:
    """The choices that `facts` noted: what a step was compiled with before."""

    def choice(program: Program, call: Call) -> Choice:
        noted = knobs.get(program.name, {}).get(call.name, {"knobs": {}, "origin": "default"})
        return Choice(knobs_from(noted["knobs"]), noted["origin"], modelled=noted.get("modelled", False))

    return {program.name: {call.name: choice(program, call) for call in program.calls} for program in programs}


def of_fewer(program: Program, train: Program, choices: Mapping[str, Choice], target: Target) -> Choices:
    """Choices of a training program for fewer examples than `train`: those of the same calls, as far as their kernels
    take them."""
    kernels = {call.name: call.kernel for call in train.calls}

    def choice(call: Call) -> Choice:
        if kernels.get(call.name) != call.kernel:
            return Choice({}, "default")
        known, space = choices[call.name], knob_space(call.kernel, call.problem, target)
        taken = {name: value for name, value in known.knobs.items() if name in space and value in space[name]}
        return replace(known, knobs=taken)

    return {program.name: {call.name: choice(call) for call in program.calls}}


def facts(choices: Choices) -> dict[str, dict[str, Any]]:
    """Choices that records made, ready for JSON."""

    def noted(choice: Choice) -> dict[str, Any]:
        return {"knobs": plain(choice.knobs), "origin": choice.origin, "modelled": choice.modelled}

    return {
        program: {call: noted(choice) for call, choice in calls.items() if choice.origin != "default"}
        for program, calls in choices.items()
    }


def origins(choices: Choices) -> dict[str, int]:
    """How many calls of the training step are of each origin; of those that a model chose the name says so."""
    return dict(
        Counter(
            f"{choice.origin}, modelled" if choice.modelled else choice.origin for choice in choices["train"].values()
        )
    )


def sources(programs: Sequence[Program], target: Target, choices: Choices) -> dict[str, dict[str, KernelSource]]:
    """Program name -> call name -> the text of its kernel. Text is made once for equal kernels."""
    made: dict[tuple[str, Any, str], KernelSource] = {}

    def source(call: Call, knobs: Mapping[str, Any]) -> KernelSource:
        key = (call.kernel, call.problem, repr(sorted(knobs.items())))
        if key not in made:
            made[key] = kernel_source(call.kernel, call.problem, target, **knobs)
        return made[key]

    return {
        program.name: {call.name: source(call, choices[program.name][call.name].knobs) for call in program.calls}
        for program in programs
    }


def _text(call: Call, target: Target, knobs: Mapping[str, Any]) -> str | None:
    """Digest of the kernel's text, None where its schedule does not take these knobs."""
    space = knob_space(call.kernel, call.problem, target)
    if any(name not in space or value not in space[name] for name, value in knobs.items()):
        return None
    return text_digest(kernel_source(call.kernel, call.problem, target, **knobs).text)

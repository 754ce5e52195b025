"""How a step's values lie in memory and how its indices are cut: what decides the kernels' problems, and is settled
before they are tuned.

Both are timed in whole untuned steps: vector widths by the step, sections by the calls of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from mest_compile.hardware.target import Target
from mest_compile.ir.program import Program
from mest_compile.planning.layout import CACHES, VECTOR, section_facts, step_facts, widened, with_sections
from mest_compile.records.log import (
    FixedRecords,
    LogFile,
    Measure,
    Outcome,
    Record,
    Records,
    key_of,
    plain,
    text_digest,
)
from mest_compile.records.record import SECTIONS, STEP, target_facts
from mest_compile.sparsity.layer import Layer, live_cells
from mest_compile.tuning.deadline import Deadline
from mest_compile.tuning.session import Progress

ROUNDS = 7  # in which whole steps of every layout take turns

Compile = Callable[[Target, Records], Any]  # a step of the model for that target, with those records
Batch = tuple[np.ndarray, np.ndarray]


def time_vectors(
    vectors: Sequence[int],
    layers: Mapping[str, Layer],
    target: Target,
    compiled: Compile,
    batch: Batch,
    log: LogFile,
    records: Records,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> None:
    """Records how long steps take with each vector width, unless each was timed before. Raises OutOfTime, and then
    records nothing."""
    deadline = deadline or Deadline()
    facts = step_facts(layers)
    knobs = {
        vector: {VECTOR.name: vector} for vector in vectors
    }  # said in so many words: what is a target's own width may change
    if _tried(records, STEP, facts, 0, knobs.values()):
        return
    deadline.check()
    if progress:
        progress.on_stage("timing whole steps by vector width", 0, 1)
    wide = {vector: widened(target, vector) for vector in vectors}
    steps = {vector: compiled(wide[vector], Records(wide[vector])) for vector in vectors}
    seconds: dict[int, list[float]] = {vector: [] for vector in vectors}
    for turn in range(ROUNDS + 1):
        for vector, step in steps.items():
            deadline.check()
            start = perf_counter()
            step(*batch)
            if turn:
                seconds[vector].append(perf_counter() - start)
    for vector, found in seconds.items():
        _note(log, records, STEP, facts, 0, target, knobs[vector], found)


def time_sections(
    program: Program,
    layers: Mapping[str, Layer],
    activations: str,
    target: Target,
    compiled: Compile,
    batch: Batch,
    log: LogFile,
    records: Records,
    progress: Progress | None = None,
    deadline: Deadline | None = None,
) -> None:
    """Records how long layers take with sections of each size, unless each was timed before: those that sizes make a
    difference to.

    program  the training step, however its indices are cut
    Raises OutOfTime, and then records nothing.
    """
    deadline, sizes = deadline or Deadline(), CACHES.values(program, target)
    alike: dict[tuple[str, str, int], list[str]] = {}  # key of a kind of section and a layer -> layers
    for name, layer in layers.items():
        cut = {
            (size.section_channels, size.transposed_section_channels)
            for size in (with_sections(layer, target, activations, (caches, caches)) for caches in sizes)
        }
        for kind, channels in zip(SECTIONS, zip(*cut, strict=True), strict=True):
            if len(set(channels)) > 1 and _calls(program, name, kind):
                alike.setdefault(key_of(kind, section_facts(layer, activations), live_cells(layer)), []).append(name)
    facts = {key: section_facts(layers[names[0]], activations) for key, names in alike.items()}
    knobs = {caches: CACHES.chosen(caches) for caches in sizes}
    if all(_tried(records, kind, facts[kind, text, live], live, knobs.values()) for kind, text, live in alike):
        return
    deadline.check()
    if progress:
        progress.on_stage("timing whole steps by size of sections", 0, 1)
    steps = {caches: compiled(target, FixedRecords(target, dict.fromkeys(alike, knobs[caches]))) for caches in sizes}
    calls = {key: [call for name in names for call in _calls(program, name, key[0])] for key, names in alike.items()}
    seconds: dict[int, dict[tuple, list[float]]] = {caches: {key: [] for key in alike} for caches in sizes}
    for _ in range(ROUNDS):
        for caches, step in steps.items():
            deadline.check()
            profile = step.profile(*batch, 1)
            for key, names in alike.items():
                seconds[caches][key].append(sum(profile[call] for call in calls[key]) / len(names))
    for caches, of in seconds.items():
        for (kind, text, live), found in of.items():
            _note(log, records, kind, facts[kind, text, live], live, target, knobs[caches], found)


def _calls(program: Program, name: str, kind: str) -> list[str]:
    """Names of the calls that read the index of a layer which `kind` cuts."""
    pointers = "pointers" if kind == SECTIONS[0] else "transposed_pointers"
    return [call.name for call in program.calls if call.layer == name and call.buffers[0].role == pointers]


def _tried(records: Records, kernel: str, facts: Any, live: int, knobs: Iterable[Mapping[str, Any]]) -> bool:
    ranked = [known for _, known, _ in records.trials(kernel, facts, live).ranking()]
    return all(one in ranked for one in knobs)


def _note(
    log: LogFile,
    records: Records,
    kernel: str,
    facts: Any,
    live: int,
    target: Target,
    knobs: Mapping[str, Any],
    seconds: Sequence[float],
) -> None:
    record = Record(
        kernel,
        plain(facts),
        live,
        target_facts(target),
        records.cpu,
        knobs,
        Outcome.OK,
        Measure.MEASURED,
        tuple(seconds),
        text_digest(kernel),
    )
    log.append(record)
    records.add(record)

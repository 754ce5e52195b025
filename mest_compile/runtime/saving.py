"""A step's state in a checkpoint, and the parts of a change that takes it from one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import SpecError, StateError, UsageError
from mest_compile.models.inputs import Reading
from mest_compile.operators.optimizers.optimizer import read_optimizer
from mest_compile.runtime import arguments, checkpoint
from mest_compile.runtime.changes import Part
from mest_compile.runtime.compiled import Compiled
from mest_compile.runtime.state import Arrangement, HeldState


def write(
    path: str | Path,
    document: Mapping[str, Any],
    state: HeldState,
    rng: np.random.Generator,
    extra: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Writes all of it to one file, whole or not at all.

    document  JSON from which the same step is compiled again
    extra, arrays  the caller's
    Raises UsageError where `extra` is no JSON, StateError where the file cannot be written.
    """
    try:
        json.dumps(extra)
    except (TypeError, ValueError) as problem:
        raise UsageError(f"extra cannot be written as JSON ({problem}); arrays go to `arrays`") from problem
    held = {f"held/{name}": state.get(name) for name in state.own()}
    orders = {f"order/{name}": state.order(name) for name in state.places}
    others = {f"extra/{name}": array for name, array in arrays.items()} | {
        f"kept/{name}": array for name, array in state.kept.items()
    }
    checkpoint.write(
        path, held | orders | others, dict(document) | {"extra": dict(extra), "rng": rng.bit_generator.state}
    )


def check_same(mine: Mapping[str, Any], theirs: Mapping[str, Any], path: str | Path) -> None:
    """Raises StateError where a checkpoint's document is of another model, scheme or optimizer than a step's."""
    if mine["graph"] != theirs.get("graph"):
        if _unfrozen(mine["graph"]) == _unfrozen(theirs.get("graph")):
            raise StateError(
                f"checkpoint {path} is of a step that trains other parameters; load it with mest.load, or compile the "
                "step with the same trainable"
            )
        raise StateError(f"checkpoint {path} is of another model; load it with mest.load, or compile the step as then")
    if _masks(mine) != _masks(theirs):
        raise StateError(
            f"checkpoint {path} is of another sparsity scheme or dense layers; load it with mest.load, or compile the "
            f"step as then"
        )
    rule, its = (read_optimizer(document["optimizer"]).rule_name for document in (mine, theirs))
    if rule != its:
        raise StateError(
            f"checkpoint {path} is of optimizer {its!r}, the step has {rule!r}; load it with mest.load, or "
            "compile the step "
            "as then"
        )


def _unfrozen(graph: Any) -> Any:
    """A document's graph without what is frozen in it."""
    if not isinstance(graph, Mapping):
        return None
    nodes = [{**node, "attrs": {**node["attrs"], "evaluating": None}} for node in graph["nodes"]]
    return {**graph, "nodes": nodes, "frozen": None}


def parts_of(
    arrays: Mapping[str, np.ndarray],
    path: str | Path,
    compiled: Compiled,
    state: HeldState,
    install: Callable[[Arrangement], Any],
) -> list[Part]:
    """The parts of a change that takes the arrays of a checkpoint. install: lets a layer hold an arrangement.

    Raises StateError where some are missing.
    """
    held = {name.removeprefix("held/"): array for name, array in arrays.items() if name.startswith("held/")}
    held = {name: array for name, array in held.items() if name in state.held}  # momentum of 0 had an array, once
    lacking = {f"order/{name}" for name in compiled.layers} - arrays.keys()
    lacking |= {f"held/{name}" for name in state.own() if name not in held}
    lacking |= {f"kept/{name}" for name in state.kept} - arrays.keys()
    if lacking:
        raise StateError(
            f"checkpoint {path} lacks {arguments.shortened(sorted(lacking))}; it is of another version of mest-compile"
        )
    parts: list[Part] = []
    kept = {name: arrays[f"kept/{name}"].reshape(compiled.graph.state_shapes[name]) for name in state.kept}
    for name in compiled.layers:
        own = {part: held.pop(part) for part in state.parts(name)}
        # Tuning since then may have cut the index otherwise, or a device has other kernels.
        parts.append(partial(install, state.ordered(name, arrays[f"order/{name}"], own)))
    return [*parts, partial(state.write, held), partial(setattr, state, "kept", kept)]


def rest_of(
    arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], path: str | Path
) -> tuple[dict, int, dict, dict[str, np.ndarray]]:
    """(state of the random generator, updates so far, the caller's extra, the caller's arrays) of a checkpoint. Raises
    StateError."""
    rng = np.random.default_rng()
    try:
        rng.bit_generator.state = facts["rng"]
        extra, updates = dict(facts["extra"]), int(facts.get("updates", 0))
    except (KeyError, TypeError, ValueError) as problem:
        raise StateError(
            f"checkpoint {path} lacks a random generator's state ({problem}); take another one"
        ) from problem
    return (
        dict(rng.bit_generator.state),
        updates,
        extra,
        {name.removeprefix("extra/"): array for name, array in arrays.items() if name.startswith("extra/")},
    )


def reading_of(facts: Mapping[str, Any], path: str | Path) -> Reading | None:
    """What a checkpoint says of pictures and classes; None: nothing. Raises StateError."""
    try:
        return None if facts.get("reading") is None else Reading.from_json(facts["reading"])
    except (KeyError, TypeError, ValueError, SpecError) as problem:
        raise StateError(f"checkpoint {path} is damaged: its reading of pictures is none ({problem})") from problem


def _masks(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a document says of layers, but for what only orders their values."""
    return [
        {fact: value for fact, value in layer.items() if fact not in ("kernels", "sections")}
        for layer in facts.get("layers", ())
    ]

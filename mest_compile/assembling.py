"""From a plan to a step: its kernels are chosen, compiled or found, and put where they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base import exclusive
from mest_compile.base.screens import CompileLine
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import find_target, is_foreign, obstacle
from mest_compile.ir.program import Functions, functions_of, functions_of_fewer
from mest_compile.kernels import choosing
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.choosing import choose_knobs, remembered
from mest_compile.kernels.linking import link_steps
from mest_compile.kernels.workers import Workers
from mest_compile.operators.layers.family import FAMILIES, family_for
from mest_compile.planning.facts import Facts
from mest_compile.planning.layers import sparsity_of_all
from mest_compile.planning.memory import warn_beyond_memory
from mest_compile.planning.plan import Plan
from mest_compile.records.log import Records
from mest_compile.sparsity.layer import Layer
from mest_compile.sparsity.schemes.dense import Dense

if TYPE_CHECKING:
    from mest_compile.devices.session import Device
    from mest_compile.runtime.compiled import Compiled, Knobs
    from mest_compile.runtime.runner import Runner
    from mest_compile.runtime.step import TrainStep


def make_step(
    plan: Plan,
    state: Mapping[str, np.ndarray],
    builder: Builder | None,
    device: Device | None,
    knobs: Knobs | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
) -> TrainStep:
    """knobs: of kernels, as a checkpoint noted them; None: the plan's records choose them. masks: as `TrainStep` has
    them."""
    from mest_compile.runtime.step import TrainStep

    builder = builder or Builder(progress=CompileLine())
    with exclusive.COMPILER:
        compiled = _compile(plan, builder, device, knobs)
    return TrainStep(compiled, state, masks or {})


def _dense(facts: Facts, builder: Builder, device: Device | None) -> Callable[[], TrainStep]:
    """What compiles the dense twin of a step."""

    def dense() -> TrainStep:
        """The same step with all weights alive, which has the gradient of every weight. Untuned, so that it is the same
        after a load. A device has room for one step: it runs here, where float16 may be unknown.
        """
        where, threads, activations = facts.target, facts.threads, facts.activations
        if device is not None:
            where, activations = find_target("local"), "float32"
            threads = where.cores

        def alive(layer: Layer) -> Layer:
            kernels = family_for(Dense(), layer.spec, where)
            forward, transposed = FAMILIES.find(kernels).sections(layer.spec, Dense(), where, activations)
            return Layer(layer.spec, Dense(), 0.0, kernels, forward, transposed, frozen=layer.frozen)

        every = {name: alive(layer) for name, layer in facts.layers.items()}
        zeros = {name: np.zeros(shape, np.float32) for name, shape in facts.graph.state_shapes.items()}
        twin = replace(facts, layers=every, target=where, threads=threads, activations=activations)
        return make_step(Plan(twin, Records(where)), zeros, builder, None, {})

    return dense


class Again:
    """Compiles a step's model for other facts (`runtime.compiled.Recompiles`): on the same device, kernels that there
    were before with the knobs that they had.

    builder, device, records  the step's; device None: it runs here
    known  what the knobs of the step's first kernels were
    """

    def __init__(
        self, builder: Builder, device: Device | None, records: Records, known: Mapping[choosing.Kind, choosing.Choice]
    ):
        self.builder, self.device, self.records, self._known = builder, device, records, known

    def knobs(self, facts: Facts) -> Knobs:
        choices = choose_knobs(facts.lower(), facts.layers, facts.target, self.records, self._known)
        return choosing.facts(choices)

    def ahead(self, coming: Sequence[tuple[Facts, Knobs]]) -> None:
        """On the machine's own processor; elsewhere kernels are compiled when they are needed."""
        missing = []
        for facts, knobs in coming:
            if self.device is None and backend_of(facts.target).processor and not obstacle(facts.target):
                programs = facts.lower()
                sources = choosing.sources(programs, facts.target, remembered(programs, knobs))
                every = [source for by_call in sources.values() for source in by_call.values()]
                missing += [source for source in every if not self.builder.has(source)]
        if missing:
            workers = Workers(self.builder.folder)
            workers.ask(missing)
            workers.dismiss()

    def compiled(self, facts: Facts, knobs: Knobs) -> Compiled:
        with exclusive.COMPILER:
            return _compile(Plan(facts, self.records), self.builder, self.device, knobs, self)


def _compile(
    plan: Plan, builder: Builder, device: Device | None, knobs: Knobs | None, again: Again | None = None
) -> Compiled:
    """again: what asked for it; None: a step that is new."""
    from mest_compile.runtime.compiled import Compiled

    facts, target, threads, programs = plan.facts, plan.target, plan.facts.threads, plan.programs
    train, predict = programs
    kind = backend_of(target)
    kind.check(programs, target)
    here = device is None and kind.processor and not is_foreign(target)
    warn_beyond_memory(plan.memory()["total"], target, here)
    choices = (
        choose_knobs(programs, facts.layers, target, plan.records) if knobs is None else remembered(programs, knobs)
    )
    sources = choosing.sources(programs, target, choices)
    every = [source for calls in sources.values() for source in calls.values()]
    functions = functions_of(train, predict)

    def library(coming: Sequence[tuple[Facts, Knobs]] = ()) -> bytes:
        """coming: the steps that this one will become, whose code is in it as well."""
        with exclusive.COMPILER:
            return link_steps(functions, sources, coming, target, builder)

    def kernels() -> dict[str, dict[str, Any]]:
        built = builder.build(every)
        return {name: {call: built[source.key] for call, source in calls.items()} for name, calls in sources.items()}

    def fewer(examples: int) -> tuple[Functions, Any]:
        """A training program for so many examples, with the code that the step's runner wants of it."""
        program = facts.lower_fewer(examples, train)
        chosen = choosing.sources([program], target, choosing.of_fewer(program, train, choices["train"], target))
        functions = functions_of_fewer(program, examples)
        with exclusive.COMPILER:
            if device is not None:
                return functions, link_steps(functions, chosen, (), target, builder)
            built = builder.build(list(chosen[program.name].values()))
        return functions, {program.name: {call: built[source.key] for call, source in chosen[program.name].items()}}

    runner: Callable[[], Runner]
    if device is not None:
        from mest_compile.devices.runner import RemoteRunner

        runner = partial(RemoteRunner, device, library(), functions, threads, target)
    elif kind.processor and (why := obstacle(target)):
        from mest_compile.runtime.store import StoreRunner

        runner = partial(StoreRunner, target.name, why)
    else:
        kind.find_device(target)  # before anything is compiled for it
        runner = partial(kind.runner, kernels(), functions, target, threads)
    document = facts.to_json() | {"knobs": choosing.facts(choices)}
    described = {
        "target": target.name,
        "cpu": target.tvm_fields.get("mcpu"),
        "threads": threads,
        "seed": facts.seed,
        "vector": target.vector,
        "slice_examples": target.slice_examples,
        "kernels": choosing.origins(choices),
        "input_shape": [facts.batch, *facts.graph.input_shape[1:]],
        "microbatch": facts.graph.input_shape[0] if facts.passes > 1 else None,
        "recomputed": document["recomputed"],
        "schemes": {name: str(layer.scheme) for name, layer in facts.layers.items()},
        "sparsity": {name: layer.sparsity for name, layer in facts.layers.items()},
        "sparsity_of_all": sparsity_of_all(facts.layers),
        "weights": sum(layer.spec.weight_elems for layer in facts.layers.values()),
        "trainable": facts.graph.trainable(),
        "frozen": dict(facts.graph.frozen),
        **({} if plan.spared is None else {"spared_bytes": dict(plan.spared)}),
        **({} if plan.chosen is None else {"update_budget": dict(plan.chosen)}),
        "optimizer": document["optimizer"],
        "loss": document["loss"],
        "label_smoothing": getattr(facts.loss, "smoothing", 0.0),
        "output_shape": [facts.batch, *facts.graph.nodes[-1].shape[1:]],
        "activations": facts.activations,
        "versions": {
            name: metadata.version(name) for name in ("mest-compile", "apache-tvm", "apache-tvm-ffi", "numpy")
        },
    }
    by_call = {(name, call): source for name, calls in sources.items() for call, source in calls.items()}
    return Compiled(
        facts,
        train,
        predict,
        document | {"describe": described},
        runner,
        _dense(facts, builder, device),
        library,
        by_call,
        builder,
        choices["train"],
        again or Again(builder, device, plan.records, choosing.made(programs, facts.layers, choices)),
        fewer,
    )

"""mest.check: what of a model would be taken, sparse, dense, frozen and refused, without compiling anything."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mest_compile.base import checks, exclusive
from mest_compile.base.errors import Refusal, SpecError, UnsupportedOperator, UsageError
from mest_compile.base.pages import table
from mest_compile.frontend.naming import REFUSED
from mest_compile.frontend.refusals import Refusals
from mest_compile.hardware.target import find_target
from mest_compile.ir.graph import LAYERS, ForwardGraph, Node
from mest_compile.kernels.choosing import choose_knobs
from mest_compile.models.sources import is_trained
from mest_compile.operators.losses.cross_entropy import CrossEntropy
from mest_compile.options import StepOptions, find_loss, find_optimizer
from mest_compile.planning.facts import read_facts
from mest_compile.planning.given import first_masks
from mest_compile.planning.layers import plan_layers, sparsity_of_all, why_dense
from mest_compile.planning.layout import step_facts
from mest_compile.planning.plan import Plan, plan_step
from mest_compile.planning.retargeting import retargeted
from mest_compile.planning.trainable import choose_trainable
from mest_compile.records.log import STEP, Records, text_digest
from mest_compile.runtime import checkpoint
from mest_compile.runtime.trained import read_any
from mest_compile.sparsity import parse_schemes
from mest_compile.sparsity.layer import Layer
from mest_compile.sparsity.schemes.dense import Dense

BATCHES = (1, 8, 16, 32, 64)  # whose memory is told


@dataclass(frozen=True, slots=True)
class CheckedLayer:
    """A convolution, a linear layer, or an operator that is refused.

    name          torch path of the layer
    kind          "conv2d 3x3", "depthwise 3x3", "linear", or the refused operator as its author called it
    output_shape  with the batch
    state         "sparse", "dense" or "refused"
    sparsity      share of its weights that are zero
    why           it is dense or refused
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    state: str
    weights: int = 0
    live_weights: int = 0
    sparsity: float = 0.0
    frozen: bool = False
    why: str = ""


@dataclass(frozen=True, slots=True)
class StepTime:
    """What the target's tuning records say of a step's time.

    seconds  of the whole step, where such a one was timed, else the sum of the kernel calls that were
    timed    calls whose time is in it; calls: of the step
    """

    seconds: float
    timed: int
    calls: int


@dataclass(frozen=True, slots=True, repr=False)
class Check:
    """What becomes of a model.

    layers    in the model's order
    refused   all that keeps it from being compiled; empty: it is taken
    words     of the error that `mest.compile` would raise
    sparsity  of all weights of convolutions and linear layers together, dense ones too
    memory    {examples of a step: planned bytes on the target}, of a model that is taken, at batches that it can have
    step      its time at its own batch; None: nothing of it is on record
    """

    input_shape: tuple[int, ...]
    target: str
    layers: tuple[CheckedLayer, ...]
    refused: tuple[Refusal, ...]
    words: str
    sparsity: float
    memory: Mapping[int, int]
    step: StepTime | None = None

    def __repr__(self) -> str:
        states = [layer.state for layer in self.layers]
        kinds = [kind for kind in ("sparse", "dense", "refused") if kind in states]
        counts = ", ".join(f"{states.count(kind)} {kind}" for kind in kinds)
        live = f"{self.live_weights} of {self.weights} weights live"
        return f"<Check {'taken' if self.taken else 'refused'}: layers {counts}; {live}>"

    def _repr_html_(self) -> str:
        rows = [
            (layer.name, layer.kind, layer.weights, f"{layer.sparsity:.3f}", layer.state, layer.why)
            for layer in self.layers
        ]
        said = "" if self.taken else f"<p>{html.escape(self.words)}</p>"
        columns = ("layer", "operator", "weights", "sparsity", "state", "why")
        return f"<p>{html.escape(repr(self))}</p>{table(rows, columns)}{said}"

    @property
    def taken(self) -> bool:
        return not self.refused

    @property
    def weights(self) -> int:
        """Of convolutions and linear layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def live_weights(self) -> int:
        return sum(layer.live_weights for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        counted = {"taken": self.taken, "weights": self.weights, "live_weights": self.live_weights}
        return counted | {**asdict(self), "memory": {str(batch): need for batch, need in self.memory.items()}}


def check(model: Any, input_shape: Sequence[int], **options: Any) -> Check:
    """What `mest.compile` would make of a model, in seconds, whether it takes it or not.

    model, input_shape  as in `compile`; or the path of a run folder, a checkpoint or an
                        artifact, which have their shape and options already
    options             those of `compile` that decide what is sparse and what trains
    Raises MestError for what is wrong with the call, and where there is no forward pass to look at.
    """
    if isinstance(model, str | Path) and is_trained(model):
        if options:
            raise UsageError(f"the checkpoint {model} has its {next(iter(options))} already; leave it out")
        return _of_checkpoint(model)
    taken = {**options, "optimizer": find_optimizer(options.get("optimizer"), model)}
    try:
        said = StepOptions(
            **{
                **taken,
                "scheme": parse_schemes(options.get("scheme", "block")),
                "loss": find_loss(options.get("loss", CrossEntropy())),
            }
        )
    except TypeError as problem:
        raise UsageError(f"{problem}; check takes the options of mest.compile that decide about layers") from problem
    exclusive.this_process()
    shape, refusals = checks.shapes("input_shape", input_shape)[0], Refusals()
    try:
        with exclusive.COMPILER:
            graph, state = read_any(model, input_shape, refusals, said.output)
    except UnsupportedOperator as error:
        return Check(shape, str(said.target), (), error.refused, str(error), 0.0, {})
    if refusals.found:
        graph = choose_trainable(graph, said.trainable)
        layers = plan_layers(graph, first_masks(model, graph, state, said)[0], find_target(said.target))
        return _check(graph, layers, why_dense(graph, said, layers), str(said.target), refusals, {})
    plan = plan_step(graph, first_masks(model, graph, state, said)[0], Records.of)
    return _check(
        plan.facts.graph,
        plan.layers,
        why_dense(plan.facts.graph, said, plan.layers),
        plan.target.name,
        refusals,
        _memory(plan),
        _step_time(plan),
    )


def _of_checkpoint(path: str | Path) -> Check:
    _, document = checkpoint.read(path)
    facts = read_facts(document, f"checkpoint {path}")
    plan = Plan(facts, Records.of(facts.target))
    return _check(facts.graph, facts.layers, {}, facts.target.name, Refusals(), _memory(plan), _step_time(plan))


def _memory(plan: Plan) -> dict[int, int]:
    found = {}
    for batch in BATCHES:
        with suppress(SpecError):  # BatchNorm of features has no statistics of one example
            found[batch] = retargeted(plan.facts, plan.target, batch).memory()["total"]
    return found


def _step_time(plan: Plan) -> StepTime | None:
    calls, facts = len(plan.train.calls), step_facts(plan.layers)
    whole = plan.records.best(STEP, facts, 0, lambda knobs: text_digest(STEP))
    if whole.seconds is not None and not whole.modelled:
        return StepTime(whole.seconds, calls, calls)
    chosen = choose_knobs((plan.train,), plan.layers, plan.target, plan.records)[plan.train.name].values()
    known = [choice.seconds for choice in chosen if choice.seconds is not None and not choice.modelled]
    return StepTime(sum(known) * plan.facts.passes, len(known), calls) if known else None


def _check(
    graph: ForwardGraph,
    layers: Mapping[str, Layer],
    dense: Mapping[str, str],
    target: str,
    refusals: Refusals,
    memory: Mapping[int, int],
    step: StepTime | None = None,
) -> Check:
    rows = []
    for node in graph.nodes:
        if node.op == REFUSED and node.attrs["error"] is not None:
            error: UnsupportedOperator = node.attrs["error"]
            rows += [
                CheckedLayer(one.layer, one.operator, node.shape, "refused", why=one.what) for one in error.refused
            ]
        elif node.op in LAYERS:
            rows.append(_row(node, layers[node.params["weight"]], dense))
    shown = {(row.name, row.kind) for row in rows}
    rows += [
        CheckedLayer(one.layer, one.operator, (), "refused", why=one.what)
        for one in refusals.found
        if (one.layer, one.operator) not in shown
    ]
    return Check(
        graph.input_shape,
        target,
        tuple(rows),
        tuple(refusals.found),
        refusals.words(),
        sparsity_of_all(layers),
        dict(memory),
        step,
    )


def _row(node: Node, layer: Layer, dense: Mapping[str, str]) -> CheckedLayer:
    spec, name = layer.spec, layer.spec.name
    units = layer.scheme.live_units(spec, layer.sparsity)
    live = units * layer.scheme.unit_cells(spec) * layer.scheme.cell_elems(spec)
    kind = "depthwise" if node.op == "conv2d" and spec.depthwise else node.op
    kind = kind if kind == "linear" else f"{kind} {_kernel(spec)}"
    return CheckedLayer(
        name.removesuffix(".weight"),
        kind,
        node.shape,
        "dense" if isinstance(layer.scheme, Dense) else "sparse",
        spec.weight_elems,
        live,
        layer.sparsity,
        layer.frozen,
        dense.get(name, ""),
    )


def _kernel(spec: Any) -> str:
    return "x".join(map(str, spec.weight_shape[2:]))

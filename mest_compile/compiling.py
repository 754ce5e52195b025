"""mest.compile: model, scheme and target in, a training step out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile import choosing
from mest_compile.building import Builder
from mest_compile.choosing import choose_knobs, choose_vector, remembered
from mest_compile.errors import NotYet, StateError, UsageError
from mest_compile.graph.fusing import fuse
from mest_compile.graph.lowering import lower
from mest_compile.graph.program import FUNCTIONS
from mest_compile.hardware import Gpu, Target, find_target
from mest_compile.planning import meet_budget, plan_layers
from mest_compile.records import Records
from mest_compile.registry import FAMILIES
from mest_compile.runtime import checkpoint
from mest_compile.sparsity import parse_scheme
from mest_compile.sparsity.layer import Layer
from mest_compile.sparsity.scheme import Scheme
from mest_compile.sparsity.schemes.dense import Dense
from mest_compile.spec import SGD, ForwardGraph, Node

if TYPE_CHECKING:
    import torch

    from mest_compile.runtime.runner import Runner
    from mest_compile.runtime.step import Compiled, TrainStep

# With one thread TVM would pin the calling thread to a core, and every thread that it starts later, torch's too.
os.environ.setdefault("TVM_BIND_THREADS", "0")
# TVM makes half as many workers as there are processors, taking the others for second threads of a core; two real cores would give one.
os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))

Tuned = Records | Mapping[str, Mapping[str, Mapping[str, Any]]]


def compile(model: Any, input_shape: Sequence[int], scheme: str | Scheme = "block", sparsity: float | Mapping[str, float] = 0.9,
            distribution: str = "uniform", dense_layers: Sequence[str] | None = None, optimizer: SGD | None = None,
            target: str | Path | Target = "local", device: Any = None, threads: int | None = None, seed: int = 0,
            label_smoothing: float = 0.0, memory_budget: int | None = None, lower_density: bool = False,
            builder: Builder | None = None, records: Records | None = None) -> TrainStep:
    """A training step that computes `model`'s convolutions and linear layers at the live weights only.

    model          torch.nn.Module (left unchanged), path of an .onnx file, or a built-in model's name
    input_shape    (N, C, H, W) or (N, features); N is the batch of every step
    scheme         name, "name:arguments" or a scheme object
    sparsity       share of zero weights in the sparse layers together, 0 <= s < 1, or {layer name: sparsity}, other layers dense
    distribution   "uniform" or "erk"
    dense_layers   names that stay dense; None: the first layer, 1x1 convolutions on images, the classifier
    threads        None: all cores
    label_smoothing  share of every label that is spread evenly over all classes, 0 <= share < 1
    memory_budget  bytes that the whole step may need (`step.memory()["total"]`). To meet it, activations are computed again in the
                   backward pass instead of kept: first those that cost one pass over memory, then those of sparse convolutions
    lower_density  when that is not enough: raise the sparsity until the budget is met, and say so in the log; else BudgetError
    builder        where kernels are compiled and cached; None: the user's cache folder
    records        what tuning found, which decides the kernels' knobs and the vector width; None: the user's logs and the shipped ones;
                   Records(target) has none
    Raises MestError: UnsupportedOperator, SpecError, SparsityError, UnknownName, UsageError, BudgetError, BuildError.
    """
    from mest_compile.frontend import import_model

    scheme, target, optimizer = parse_scheme(scheme), find_target(target), optimizer or SGD()
    if not 0 <= label_smoothing < 1:
        raise UsageError(f"label_smoothing is {label_smoothing}; wanted a share of 0 or more and below 1")
    if device is not None:
        raise NotYet("device: running a step on another device over RPC is not in this version; leave device=None")
    input_shape = _check_shape(input_shape)
    target = target.for_batch(input_shape[0])
    threads = _check_threads(threads, target)
    graph, state = import_model(model, input_shape)
    records = records or Records.of(target)
    layers = plan_layers(graph, scheme, sparsity, distribution, dense_layers, target)
    tuned = choose_vector(layers, target, records)
    if tuned != target:
        target, records = tuned, records.for_target(tuned)
        layers = plan_layers(graph, scheme, sparsity, distribution, dense_layers, target)
    recomputed: frozenset[str] = frozenset()
    if memory_budget is not None:
        recomputed, raised = meet_budget(fuse(graph), layers, target, memory_budget, lower_density)
        if raised is not None:
            layers = plan_layers(graph, scheme, raised, distribution, dense_layers, target)
    return _make(graph, state, layers, recomputed, optimizer, target, threads, seed, label_smoothing, builder, records)


def load(path: str | Path, threads: int | None = None, builder: Builder | None = None) -> TrainStep:
    """The step that `step.save` wrote, with all its state and on the kernels that it had: tuning since then changes nothing, so that a run
    that goes on gives the same numbers. Raises StateError, BuildError.
    """
    arrays, facts = checkpoint.read(path)
    try:
        graph = _graph_from(facts["graph"])
        target = Target(**{**facts["target"], "llvm": tuple((key, value) for key, value in facts["target"]["llvm"]),
                           "gpu": Gpu(**facts["target"]["gpu"]) if facts["target"].get("gpu") else None})
        layers = {entry["spec"]["name"]: Layer(_spec_from(entry["spec"]), parse_scheme(entry["scheme"]), entry["sparsity"],
                                               entry["kernels"], *entry["sections"]) for entry in facts["layers"]}
        optimizer = SGD(**facts["optimizer"])
    except (KeyError, TypeError) as problem:
        raise StateError(f"checkpoint {path} lacks {problem}; it is of another version of mest-compile") from problem
    zeros = {name: np.zeros(shape, np.float32) for name, shape in graph.state_shapes.items()}
    step = _make(graph, zeros, layers, frozenset(facts["recomputed"]), optimizer, target, threads or facts["threads"], facts["seed"],
                 facts["label_smoothing"], builder, facts.get("knobs", {}))
    step._restore(arrays, facts, path)
    return step


def to_torch(step: TrainStep, model: torch.nn.Module) -> None:
    """Writes the step's parameters and statistics into the torch module that it was compiled from. Raises StateError."""
    import torch

    trained = {name: torch.from_numpy(array) for name, array in step.state_dict().items()}
    there = {name: tuple(value.shape) for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    if there != {name: tuple(value.shape) for name, value in trained.items()}:
        odd = sorted(there.items() ^ {name: tuple(value.shape) for name, value in trained.items()}.items())
        raise StateError(f"the module is not the one that was compiled: they differ in {odd[0][0]}")
    model.load_state_dict(trained, strict=False)


def _make(graph: ForwardGraph, state: Mapping[str, np.ndarray], layers: Mapping[str, Layer], recomputed: frozenset[str],
          optimizer: SGD, target: Target, threads: int, seed: int, label_smoothing: float, builder: Builder | None,
          tuned: Tuned) -> TrainStep:
    from mest_compile.runtime.step import TrainStep

    builder = builder or Builder()

    def dense() -> TrainStep:
        """The same step with all weights alive, which has the gradient of every weight. Untuned, so that it is the same after a load."""
        every = {name: Layer(layer.spec, Dense(), 0.0, "gather", *FAMILIES.find("gather").sections(layer.spec, Dense(), target))
                 for name, layer in layers.items()}
        zeros = {name: np.zeros(shape, np.float32) for name, shape in graph.state_shapes.items()}
        return _make(graph, zeros, every, recomputed, optimizer, target, threads, seed, label_smoothing, builder, {})

    return TrainStep(_compile(graph, layers, recomputed, optimizer, target, threads, seed, label_smoothing, builder, tuned), state, dense)


def _compile(graph: ForwardGraph, layers: Mapping[str, Layer], recomputed: frozenset[str], optimizer: SGD, target: Target, threads: int,
             seed: int, label_smoothing: float, builder: Builder, tuned: Tuned) -> Compiled:
    """tuned: records to choose knobs by, or the knobs that a checkpoint noted."""
    from mest_compile.runtime.step import Compiled

    train, predict = lower(fuse(graph), layers, target, recomputed, label_smoothing)
    programs = (train, predict)
    choices = choose_knobs(programs, layers, target, tuned) if isinstance(tuned, Records) else remembered(programs, tuned)
    sources = choosing.sources(programs, target, choices)
    built = builder.build(source for calls in sources.values() for source in calls.values())
    kernels = {name: {call: built[source.key] for call, source in calls.items()} for name, calls in sources.items()}

    functions = {name: ({"train": train, "predict": predict}[program], stages) for name, (program, stages) in FUNCTIONS.items()}

    if target.device == "opencl":
        from mest_compile.runtime.opencl import OpenclRunner

        runner: Callable[[], Runner] = partial(OpenclRunner, kernels, functions)
    else:
        from mest_compile.runtime.local import LocalRunner

        runner = partial(LocalRunner, kernels, functions, target, threads)
    facts = {
        "graph": _graph_facts(graph), "optimizer": asdict(optimizer), "threads": threads, "seed": seed,
        "recomputed": sorted(recomputed), "label_smoothing": label_smoothing, "knobs": choosing.facts(choices),
        "target": {**asdict(target), "llvm": [list(pair) for pair in target.llvm]},
        "layers": [{"spec": _plain(asdict(layer.spec)), "scheme": str(layer.scheme), "sparsity": layer.sparsity,
                    "kernels": layer.kernels,
                    "sections": [layer.section_channels, layer.transposed_section_channels]} for layer in layers.values()],
        "describe": {"target": target.name, "cpu": target.tvm_fields.get("mcpu"), "threads": threads, "seed": seed,
                     "vector": target.vector, "kernels": choosing.origins(choices),
                     "input_shape": list(graph.input_shape), "recomputed": sorted(recomputed),
                     "schemes": {name: str(layer.scheme) for name, layer in layers.items()},
                     "sparsity": {name: layer.sparsity for name, layer in layers.items()},
                     "optimizer": asdict(optimizer), "label_smoothing": label_smoothing,
                     "versions": {name: metadata.version(name) for name in ("mest-compile", "apache-tvm", "apache-tvm-ffi", "numpy")}},
    }
    by_call = {(name, call): source for name, calls in sources.items() for call, source in calls.items()}
    return Compiled(graph, layers, train, predict, optimizer, threads, seed, facts, runner, by_call, builder,
                    choices["train"])


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        found = tuple(int(size) for size in shape)
    except (TypeError, ValueError):
        found = ()
    if len(found) not in (2, 4) or min(found) < 1:
        raise UsageError(f"input_shape is {shape!r}; wanted (N, C, H, W) or (N, features), whole numbers of 1 or more")
    return found


def _check_threads(threads: int | None, target: Target) -> int:
    if threads is None:
        return target.cores
    if not isinstance(threads, int) or threads < 1:
        raise UsageError(f"threads is {threads!r}; wanted a whole number of 1 or more, or None for all cores")
    return threads


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _graph_facts(graph: ForwardGraph) -> dict[str, Any]:
    return {"input_shape": list(graph.input_shape), "state_shapes": _plain(dict(graph.state_shapes)),
            "nodes": [{"op": node.op, "name": node.name, "inputs": list(node.inputs), "shape": list(node.shape),
                       "params": dict(node.params), "attrs": _plain(node.attrs)} for node in graph.nodes]}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _graph_from(facts: Mapping[str, Any]) -> ForwardGraph:
    nodes = tuple(Node(node["op"], node["name"], tuple(node["inputs"]), tuple(node["shape"]), node["params"],
                       {key: _tuples(value) for key, value in node["attrs"].items()}) for node in facts["nodes"])
    return ForwardGraph(nodes, tuple(facts["input_shape"]), {name: tuple(shape) for name, shape in facts["state_shapes"].items()})


def _spec_from(facts: Mapping[str, Any]):
    from mest_compile.spec import LayerSpec

    return LayerSpec(**{key: _tuples(value) for key, value in facts.items()})

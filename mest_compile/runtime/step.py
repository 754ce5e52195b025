"""A compiled training step: its state on the device, and everything a caller does with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.errors import InputError, StateError, UsageError
from mest_compile.facts import Facts
from mest_compile.graph.footprint import footprint
from mest_compile.graph.program import Program
from mest_compile.mutation import importance
from mest_compile.runtime import checkpoint
from mest_compile.runtime.runner import Runner
from mest_compile.runtime.state import HeldState, as_conv
from mest_compile.sparsity.layer import Layer
from mest_compile.sparsity.packing import cells_of
from mest_compile.sparsity.room import held_cells, sparse_layers, units_at
from mest_compile.spec import SGD, ForwardGraph

if TYPE_CHECKING:
    from mest_compile.building import Builder, KernelSource
    from mest_compile.records import Choice
    from mest_compile.runtime.specializer import LayerTimes, Planned, Specializer


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler hands to a step.

    train, predict   the two programs
    document  JSON from which the same step is compiled again
    runner    makes what holds the arrays and runs the programs
    library   makes the shared library with all of the step's code; None: an artifact has no more to give
    sources   (program name, call name) -> what its kernel was compiled from
    builder   compiled them; None: nothing can be compiled here
    choices   call name of the training program -> its kernel's knobs and where they are from
    """

    facts: Facts
    train: Program
    predict: Program
    document: Mapping[str, Any]
    runner: Callable[[], Runner]
    library: Callable[[], bytes] | None = None
    sources: Mapping[tuple[str, str], KernelSource] = field(default_factory=dict)
    builder: Builder | None = None
    choices: Mapping[str, Choice] = field(default_factory=dict)

    @property
    def graph(self) -> ForwardGraph:
        """As imported, before fusing."""
        return self.facts.graph

    @property
    def layers(self) -> Mapping[str, Layer]:
        return self.facts.layers

    @property
    def optimizer(self) -> SGD:
        return self.facts.optimizer


@dataclass(frozen=True, slots=True)
class StepResult:
    """loss: mean cross-entropy of the batch; correct: (N,) bool, whether the largest logit is the label's."""

    loss: float
    correct: np.ndarray


@dataclass(frozen=True, slots=True)
class MutationReport:
    """What a mutation did, and what it took of the thread that trains.

    layers           {weight name: "unchanged" | "re-indexed" | "recompiled"}
    seconds          of the whole mutation
    reindex_seconds  of these, once all units were chosen: for the index arrays and what moves with them, weights, momentum and gradients
    uploaded_bytes   what went to another device, 0 where there is none
    """

    layers: dict[str, str]
    seconds: float
    reindex_seconds: float
    uploaded_bytes: int = 0


class TrainStep:
    """One SGD step of a sparse model, compiled. Made by `mest.compile` and `mest.load`."""

    def __init__(self, compiled: Compiled, state: Mapping[str, np.ndarray], dense: Callable[[], TrainStep]):
        """state: {torch name: array} to start from; masks are taken by magnitude. dense: compiles the same step with all weights alive."""
        self._compiled = compiled
        self._make_dense = dense
        self._specializer: Specializer | None = None
        self._rng = np.random.default_rng(compiled.facts.seed)
        self._ahead: tuple[Any, Any] | None = None
        self._runner = compiled.runner()
        self._state = HeldState((compiled.train, compiled.predict), compiled.layers, compiled.graph.state_shapes, self._runner)
        self._state.check(state)
        self._units_at = cache(lambda overall: units_at(compiled.layers, overall))  # mutations ask for the same few sparsities
        for name, layer in compiled.layers.items():
            energy = layer.scheme.energy(layer.spec, as_conv(state[name]))
            keep = layer.scheme.start(layer.spec, energy, layer.scheme.live_units(layer.spec, layer.sparsity))
            self._state.install(name, cells_of(keep))
        self._state.fill(state)

    # Facts.

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(N, C, H, W) or (N, features)."""
        return tuple(self._compiled.graph.input_shape)

    @property
    def batch(self) -> int:
        return self.input_shape[0]

    @property
    def classes(self) -> int:
        return self._compiled.graph.nodes[-1].shape[1]

    @property
    def optimizer(self) -> SGD:
        return self._compiled.optimizer

    @property
    def program(self) -> Program:
        """The training step's kernel calls, in order."""
        return self._compiled.train

    @property
    def layers(self) -> Mapping[str, Layer]:
        """{weight name: Layer}, every convolution and linear layer."""
        return self._compiled.layers

    def live_weights(self) -> dict[str, int]:
        """{weight name: weights that are computed with now}, every convolution and linear layer."""
        layers = self._compiled.layers
        return {name: int(self._state.keep(name).sum()) * layer.scheme.cell_elems(layer.spec) for name, layer in layers.items()}

    def describe(self) -> dict[str, Any]:
        """Target, threads, seed, schemes and versions, ready for JSON."""
        return dict(self._compiled.document["describe"])

    def kernel_choices(self) -> dict[str, Choice]:
        """{name of a call of `program`: its kernel's knobs, and whether they are "exact", "nearest" or "default"}."""
        return dict(self._compiled.choices)

    def sparsity(self) -> dict[str, float]:
        """{weight name: share of weights that are zero now}, sparse layers only."""
        return {name: 1.0 - float(self._state.keep(name).mean()) for name in self._sparse_layers()}

    def memory(self, at_capacity: bool = False) -> dict[str, int]:
        """Bytes by kind: values, indices, gradients, optimizer, activations (saved for the backward pass), workspace, batch, total.

        at_capacity  when every layer is as dense as it may become (`grow_to` of `mest.compile`); layers without a bound count as they are
        """
        layers = self._compiled.layers
        units = {name: len(cells) // layers[name].scheme.unit_cells(layers[name].spec) for name, cells in self._state.cells.items()}
        if at_capacity:
            units |= {name: layer.capacity for name, layer in layers.items() if layer.capacity is not None}
        target = self._compiled.facts.target
        return footprint(self._compiled.train, self._compiled.predict, layers, held_cells(layers, units), target)

    # Running.

    def __call__(self, images, labels, lr: float | None = None, clip_norm: float | None = None, ahead: tuple | None = None) -> StepResult:
        """Forward, backward and update on one batch.

        images (N, C, H, W) float32, labels (N,) int in [0, classes); numpy or torch. lr: None takes the optimizer's.
        clip_norm: where the norm of all gradients together is larger, they are scaled down to it, as torch's clip_grad_norm_ does.
        ahead: (images, labels) of the next call, the very same objects; they go to another device while it computes with these.
        Raises InputError on a wrong shape, a value that is not finite, or a label out of range; nothing is changed then. Raises DeviceLost
        when the device is gone.
        """
        if self._specializer is not None:
            self._specializer.poll()
        self._load_batch(images, labels)
        rule = self._compiled.optimizer
        rate = rule.lr if lr is None else float(lr)
        if not (np.isfinite(rate) and rate >= 0):
            raise InputError(f"lr is {lr}; wanted a finite number of 0 or more")
        self._state.put("hyper", np.array([rate, rule.momentum, rule.weight_decay, rule.nesterov], np.float32))
        if clip_norm is None:
            self._run("train")
        else:
            self._run("backward")
            self._clip(clip_norm)
            self._run("update")
        self._send_ahead(ahead)
        return self._result()

    def _clip(self, most: float) -> None:
        """Scales all gradients, so that their norm is at most `most`. A weight that its kernel computes twice counts once."""
        gradients = self._state.of_kinds("gradients")
        squares = 0.0
        for name, array in gradients.items():
            layer = self._compiled.layers.get(weight := name.removesuffix(":gradient"))
            once = array if layer is None else array.reshape(-1, layer.scheme.cell_elems(layer.spec))[self._state.places[weight]]
            squares += float(np.square(once, dtype=np.float64).sum())
        norm = squares ** 0.5
        if norm > most:
            for name, array in gradients.items():
                self._state.put(name, array * np.float32(most / norm))

    def _result(self) -> StepResult:
        return StepResult(float(self._state.get("loss")[0]), self._state.get("correct")[: self.batch].astype(bool))

    def predict(self, images) -> np.ndarray:
        """Logits (n, classes) in evaluation mode (running statistics), for any number n of images."""
        images = _numpy(images, np.float32, "images")
        if images.shape[1:] != self.input_shape[1:] or len(images) == 0:
            raise InputError(f"images have shape {images.shape}; wanted (n, {', '.join(map(str, self.input_shape[1:]))}), n 1 or more")
        _check_finite(images)
        logits = np.empty((len(images), self.classes), np.float32)
        for start in range(0, len(images), self.batch):
            part = images[start:start + self.batch]
            whole = np.zeros(self.input_shape, np.float32)
            whole[: len(part)] = part
            self._state.put("images", whole.ravel())
            self._run("predict")
            logits[start:start + len(part)] = self._state.get("logits").reshape(self.batch, -1)[: len(part)]
        return logits

    def gradients(self, images, labels) -> dict[str, np.ndarray]:
        """{torch name: gradient in torch's shape}, 0 at dead weights; nothing is updated."""
        self._load_batch(images, labels)
        self._run("gradients")
        return self._state.collect(":gradient")

    def dense_gradients(self, images, labels) -> tuple[dict[str, np.ndarray], int]:
        """({torch name: gradient of every weight of a sparse layer, live or not, in torch's shape}, bytes that it took beside the step).

        They come from a dense step on the same weights, which exists for this call only: what RigL needs at a mutation.
        """
        twin = self._make_dense()
        twin.load_state_dict(self.state_dict())
        found = twin.gradients(images, labels)
        return {name: found[name] for name in self._sparse_layers()}, twin.memory()["total"]

    def profile(self, images, labels, repeats: int = 5) -> dict[str, float]:
        """{name of a call of `program`: seconds}, the median of `repeats` whole steps; the state is afterwards what it was.

        "rest" is what a step that nobody watches takes beside its kernels: the machine that calls them.
        """
        with self._timed(images, labels):
            return self._runner.profile("train", repeats)

    def device_seconds(self, images, labels, repeats: int = 5) -> list[float]:
        """Seconds of each of `repeats` whole steps by the clock of the device behind a tracker; the state is afterwards what it was."""
        if not hasattr(self._runner, "seconds"):
            raise UsageError("this step runs here; device_seconds is for one with device=mest.rpc(...)")
        with self._timed(images, labels):
            return self._runner.seconds("train", repeats)

    @contextmanager
    def _timed(self, images, labels) -> Iterator[None]:
        self._load_batch(images, labels)
        state = self._state.of_kinds("values", "optimizer", "gradients")
        self._state.put("hyper", np.array([0, 0, 0, 0], np.float32))
        try:
            yield
        finally:
            for name, array in state.items():
                self._state.put(name, array)

    # Parameters.

    def state_dict(self) -> dict[str, np.ndarray]:
        """{torch name: array in torch's shape}, zeros at dead weights, BatchNorm statistics included."""
        found = self._state.collect("")
        return {name: found[name] for name in self._compiled.graph.state_shapes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets every parameter and statistic; momentum is kept.

        Raises StateError on names or shapes that do not fit, and on weights that are not 0 where the mask is dead.
        """
        shapes, kept = self._compiled.graph.state_shapes, self._state.kept
        state = {name: _numpy(array, kept[name].dtype.type if name in kept else np.float32, name) for name, array in state.items()
                 if name in shapes or not name.endswith("num_batches_tracked")}
        self._state.check(state)
        for name, layer in self._compiled.layers.items():
            wrong = np.count_nonzero(as_conv(state[name])[~layer.scheme.expand(layer.spec, self._state.keep(name))])
            if wrong:
                raise StateError(f"{name}: {wrong} weights are not 0 where the mask is dead; call set_masks first or zero them")
        self._state.fill(state)

    # Masks.

    def masks(self) -> dict[str, np.ndarray]:
        """{torch weight name: bool array in torch's shape, True where the weight lives}, sparse layers only."""
        return {name: self._state.mask(name) for name in self._sparse_layers()}

    def set_masks(self, masks: Mapping[str, np.ndarray]) -> MutationReport:
        """Installs masks; units that stay keep weight and momentum, new ones start at 0.

        Raises StateError, CapacityError; nothing is changed then.
        """
        start = self._begin()
        sparse = self._sparse_layers()
        keeps = {}
        for name, mask in masks.items():
            if name not in sparse:
                raise StateError(f"no sparse layer {name!r}; there are: {', '.join(sparse)}")
            layer = self._compiled.layers[name]
            keeps[name] = layer.scheme.collapse(layer.spec, as_conv(np.asarray(mask)))
            units = layer.scheme.count(layer.spec, keeps[name])
            layer.check_room(units, 1 - units * layer.scheme.unit_cells(layer.spec) / keeps[name].size)
        changes = {name: (np.flatnonzero(keep.ravel()[self._state.cells[name]]), cells_of(keep & ~self._state.keep(name)))
                   for name, keep in keeps.items()}
        return self._exchange_all(changes, start)

    def mutate(self, prune_to: float, grow_to: float, importance_lambda: float = 0.0, rng: np.random.Generator | None = None,
               gradients: Mapping[str, np.ndarray] | None = None) -> MutationReport:
        """Elastic Mutation: in every sparse layer the least important units die until `prune_to`, others grow until `grow_to`.

        prune_to, grow_to  sparsity of all sparse layers together; grow_to <= prune_to
        importance_lambda  weight of the last step's gradient in |w| + lambda * |g|
        gradients          {weight name: dense gradient}: the dead units of largest gradient norm grow, as in RigL; None: random ones
        Source: MEST, arXiv:2110.14032; RigL, arXiv:1911.11134. Raises UsageError, SparsityError, CapacityError; nothing is changed then.
        """
        start = self._begin()
        if not 0 <= grow_to <= prune_to < 1:
            raise UsageError(f"mutate needs 0 <= grow_to <= prune_to < 1, got prune_to={prune_to}, grow_to={grow_to}")
        rng = self._rng if rng is None else rng
        layers = self._compiled.layers
        fewest_units, most_units = self._units_at(prune_to), self.check_room(grow_to)
        changes = {}
        for name in self._sparse_layers():
            spec, scheme = layers[name].spec, layers[name].scheme
            cells, places = self._state.cells[name], self._state.places[name]
            score = importance(self._state.get(name), self._state.get(f"{name}:gradient") if importance_lambda else None, importance_lambda)
            squares = np.square(score, dtype=np.float64).reshape(-1, scheme.cell_elems(spec))
            energy = (squares[:, 0] if squares.shape[1] == 1 else squares @ np.ones(squares.shape[1])).take(places)
            fewest = min(fewest_units[name], len(cells) // scheme.unit_cells(spec))
            stay = np.flatnonzero(scheme.prune(spec, cells, energy, fewest))
            wanted = None if gradients is None else scheme.energy(spec, as_conv(np.asarray(gradients[name])))
            changes[name] = stay, scheme.grow(spec, cells.take(stay), most_units[name], rng, wanted)
        return self._exchange_all(changes, start)  # nothing is changed before all layers were asked, any of which may refuse

    def check_room(self, grow_to: float) -> dict[str, int]:
        """{weight name: live units} of the sparse layers at that sparsity of all of them. Raises CapacityError where there is no room."""
        units = self._units_at(grow_to)
        for name, count in units.items():
            self._compiled.layers[name].check_room(count, grow_to)
        return units

    # Kernels.

    def plan(self, steps: int | None = None) -> list[Planned]:
        """Which kernel every phase of every layer should run on under the present masks, and why.

        steps  between two mutations; None: there are none. Compiles the candidates and times them on the layers' own index arrays.
        Raises UsageError when the step does not run on this machine's processor.
        """
        return (self._specializer or self._new_specializer(steps)).plan()

    def specialize(self, steps: int | None = None) -> None:
        """From now on layers run on kernels with their structure baked in where that is planned to be faster (see `plan`).

        Results stay the same bit for bit. After a mutation that changes a layer's structure it runs on the indexed kernels while others
        are compiled in the background; they are put in place between two steps. Raises as `plan` does.
        """
        self._specializer = self._new_specializer(steps)
        self._specializer.begin()

    def kernel_times(self) -> dict[str, LayerTimes]:
        """{weight name: seconds of compiling and exchanging since the last call}, of layers where there were any."""
        return {} if self._specializer is None else self._specializer.report()

    def _new_specializer(self, steps: int | None) -> Specializer:
        compiled, exchange = self._compiled, getattr(self._runner, "exchange", None)
        if exchange is None or compiled.builder is None:
            raise UsageError("specialized kernels are for steps that run in this process on the processor; leave specialize out")
        from mest_compile.runtime.specializer import Specializer

        return Specializer(compiled.train, compiled.layers, compiled.sources, exchange, self._state.get,
                           compiled.builder, steps, compiled.facts.threads)

    # Files.

    def save(self, path: str | Path, extra: Mapping[str, Any] | None = None, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Writes all state to one file, whole or not at all: weights, momentum, masks, statistics, the caller's `extra` and `arrays`."""
        held = {f"held/{name}": array for name, array in self._state.of_kinds("values", "optimizer", "gradients").items()
                if not name.endswith(":transposed")}
        orders = {f"order/{name}": self._state.order(name) for name in self._state.cells}
        others = {f"extra/{name}": array for name, array in (arrays or {}).items()}
        others |= {f"kept/{name}": array for name, array in self._state.kept.items()}
        facts = dict(self._compiled.document) | {"extra": dict(extra or {}), "rng": self._rng.bit_generator.state}
        checkpoint.write(path, held | orders | others, facts)

    def export(self, path: str | Path) -> dict[str, Any]:
        """Writes an artifact, a folder from which a device trains on without a compiler; returns its manifest. Raises MestError."""
        from mest_compile.runtime import artifact

        return artifact.write(self, path)

    def restore(self, path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Takes all state from a file that a step of the same model and scheme wrote; returns its (extra, arrays). Raises StateError."""
        arrays, facts = checkpoint.read(path)
        return self._restore(arrays, facts, path)

    def _restore(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], path: str | Path) -> tuple[dict, dict]:
        mine, theirs = self._compiled.document, facts
        if mine["graph"] != theirs.get("graph"):
            raise StateError(f"checkpoint {path} is of another model; load it with mest.load, or compile the step as then")
        if _masks(mine) != _masks(theirs):
            raise StateError(f"checkpoint {path} is of another sparsity scheme or dense layers; load it with mest.load, or compile the "
                             f"step as then")
        held = {name.removeprefix("held/"): array for name, array in arrays.items() if name.startswith("held/")}
        shapes = self._compiled.graph.state_shapes
        kept = {name: arrays[f"kept/{name}"].reshape(shapes[name]) for name in self._state.kept if f"kept/{name}" in arrays}
        if len(kept) != len(self._state.kept):
            raise StateError(f"checkpoint {path} lacks {min(self._state.kept.keys() - kept.keys())}, which the model does not use; it is "
                             "of another version of mest-compile")
        for name in self._compiled.layers:
            order = arrays[f"order/{name}"]
            cells = np.unique(order)
            ours = cells[self._state.install(name, cells).sort]
            self._moved(name)
            if not np.array_equal(order, ours):  # tuning since then has cut the index otherwise, or a device has other kernels
                sort = np.argsort(order, kind="stable")
                there = sort[np.searchsorted(order, ours, sorter=sort)]
                for part in (name, f"{name}:gradient", f"{name}:momentum"):
                    held[part] = held[part].reshape(len(order), -1)[there]
        for name, array in held.items():
            self._state.put(name, array)
        self._state.kept = kept
        for name in self._compiled.layers:
            self._state.transpose(name)
        self._rng.bit_generator.state = facts["rng"]
        return dict(facts["extra"]), {name.removeprefix("extra/"): array for name, array in arrays.items() if name.startswith("extra/")}

    # Devices.

    def reconnect(self) -> None:
        """After DeviceLost: takes another device, whose arrays are all 0 until `restore`. Raises DeviceError when there is none in time."""
        self.close()
        self._ahead = None
        self._runner = self._compiled.runner()
        self._state.start_on(self._runner)

    def close(self) -> None:
        """Gives a device that is not this process back; the step cannot run after it."""
        if hasattr(self._runner, "close"):
            self._runner.close()

    # Internal.

    def _run(self, function: str) -> None:
        self._runner.run(function)

    def _sparse_layers(self) -> list[str]:
        return list(sparse_layers(self._compiled.layers))

    def _send_ahead(self, batch: tuple | None) -> None:
        send = getattr(self._runner, "put_ahead", None)
        if batch is None or send is None:
            return
        images, labels = self._check_batch(*batch)
        send("images", images)
        send("labels", labels)
        self._ahead = batch

    def _load_batch(self, images, labels) -> None:
        sent, self._ahead = self._ahead, None
        if sent is not None and sent[0] is images and sent[1] is labels:
            self._runner.turn()  # type: ignore[attr-defined]  # who was sent something ahead has it
            return
        images, labels = self._check_batch(images, labels)
        self._state.put("images", images)
        self._state.put("labels", labels)

    def _check_batch(self, images, labels) -> tuple[np.ndarray, np.ndarray]:
        """The batch as it is sent. Raises InputError."""
        images, labels = _numpy(images, np.float32, "images"), _numpy(labels, np.int64, "labels")
        if images.shape != self.input_shape:
            raise InputError(f"images have shape {images.shape}; this step was compiled for {self.input_shape}")
        if labels.shape != (self.batch,):
            raise InputError(f"labels have shape {labels.shape}; wanted ({self.batch},)")
        if labels.min() < 0 or labels.max() >= self.classes:
            raise InputError(f"labels go from {labels.min()} to {labels.max()}; the model has classes 0 to {self.classes - 1}")
        _check_finite(images)
        return images.ravel(), labels.astype(np.int32)

    def _begin(self) -> tuple[float, int]:
        """Clock and bytes sent before a mutation."""
        return time.perf_counter(), self._runner.uploaded_bytes

    def _exchange_all(self, changes: Mapping[str, tuple[np.ndarray, np.ndarray]], begun: tuple[float, int]) -> MutationReport:
        """changes: {weight name: arguments of `_exchange`}; the other layers stay as they are."""
        chosen = time.perf_counter()
        fates = {name: self._exchange(name, *changes[name]) if name in changes else "unchanged" for name in self._sparse_layers()}
        end = time.perf_counter()
        return MutationReport(fates, end - begun[0], end - chosen, self._runner.uploaded_bytes - begun[1])

    def _exchange(self, name: str, stay: np.ndarray, new: np.ndarray) -> str:
        """Lets those live cells that `stay`, told by their places in the list of them, and new ones live, where that changes anything.
        Returns the layer's fate.
        """
        if not len(new) and len(stay) == len(self._state.cells[name]):
            return "unchanged"
        self._state.move(name, stay, new)
        return "recompiled" if self._moved(name) else "re-indexed"

    def _moved(self, name: str) -> bool:
        """Tells who specializes kernels of a layer's new mask; whether others are compiled for it."""
        return self._specializer is not None and self._specializer.changed(name)


def _masks(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a document says of layers, but for what only orders their values."""
    return [{fact: value for fact, value in layer.items() if fact not in ("kernels", "sections")} for layer in facts.get("layers", ())]


def _numpy(array: Any, dtype: type, what: str) -> np.ndarray:
    """A C-ordered numpy array of a numpy array, torch tensor or nested list. Raises InputError."""
    if hasattr(array, "detach"):
        array = array.detach().cpu().numpy()
    try:
        found = np.asarray(array)
        if dtype is np.int64 and found.dtype.kind not in "iu":
            raise InputError(f"{what} have type {found.dtype}; wanted whole numbers")
        return np.ascontiguousarray(found, dtype).reshape(found.shape)  # it makes one of a number
    except (TypeError, ValueError) as problem:
        raise InputError(f"{what} are no array of numbers ({problem})") from problem


def _check_finite(images: np.ndarray) -> None:
    if not np.isfinite(images).all():
        raise InputError(f"{np.count_nonzero(~np.isfinite(images))} image values are NaN or infinite; clean the data first")

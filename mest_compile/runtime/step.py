"""A compiled training step: its state on the device, and everything a caller does with it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeVar

import numpy as np

from mest_compile.base import checks, exclusive
from mest_compile.base.errors import InputError, StateError, UsageError
from mest_compile.base.interrupts import uninterrupted
from mest_compile.ir.program import Program
from mest_compile.operators.layers.family import held_cells
from mest_compile.operators.layers.values import cells_of
from mest_compile.operators.optimizers.optimizer import Optimizer
from mest_compile.planning.footprint import footprint
from mest_compile.runtime import arguments, checkpoint
from mest_compile.runtime.changes import Changes, Part
from mest_compile.runtime.compiled import Compiled, StepResult
from mest_compile.runtime.mutating import Change, MutationReport
from mest_compile.runtime.state import Arrangement, HeldState, as_conv
from mest_compile.sparsity.layer import Layer
from mest_compile.sparsity.mutation import importance
from mest_compile.sparsity.room import sparse_layers, units_at

if TYPE_CHECKING:
    from mest_compile.records.record import Choice
    from mest_compile.runtime.specializer import LayerTimes, Planned, Specializer


P = ParamSpec("P")
R = TypeVar("R")


def in_turn(method: Callable[Concatenate[TrainStep, P], R]) -> Callable[Concatenate[TrainStep, P], R]:
    """Callers in several threads take turns, and a change that was interrupted is finished before anything else."""

    @wraps(method)
    def call(self: TrainStep, /, *args: P.args, **kwargs: P.kwargs) -> R:
        exclusive.check_process()  # first: in a forked process nobody would give the turn back
        with self._turn:
            self._changes.finish()
            return method(self, *args, **kwargs)

    return call


class TrainStep:
    """One training step of a sparse model, compiled. Made by `mest.compile` and `mest.load`.

    Several threads may use it, one after another; each call is whole, and its answer its own. A change that Ctrl-C interrupts is either
    not begun or finished by the next call, so that all is old or all is new. In a process forked off this one every call raises UsageError.
    """

    def __init__(self, compiled: Compiled, state: Mapping[str, np.ndarray], dense: Callable[[], TrainStep]):
        """state: {torch name: array} to start from; masks are taken by magnitude. dense: compiles the same step with all weights alive."""
        self._compiled = compiled
        self._make_dense = dense
        self._specializer: Specializer | None = None
        self._turn, self._changes = threading.RLock(), Changes()
        self._rng = np.random.default_rng(compiled.facts.seed)
        self._ahead: tuple[Any, Any] | None = None
        self._updates = 0  # of the parameters since the first weights
        self._from_file = False
        self._runner = compiled.runner()
        self._state = HeldState((compiled.train, compiled.predict), compiled.layers, compiled.graph.state_shapes, self._runner)
        self._state.check(state)
        self._units_at = cache(lambda overall: units_at(compiled.layers, overall))  # mutations ask for the same few sparsities
        for name, layer in compiled.layers.items():
            energy = layer.scheme.energy(layer.spec, as_conv(state[name]))
            keep = layer.scheme.start(layer.spec, energy, layer.scheme.live_units(layer.spec, layer.sparsity), self._rng)
            self._state.install(self._state.arranged(name, cells_of(keep)))
        self._state.write(self._state.filling(state))
        self._state.kept = self._state.unused(state)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Of copy, deepcopy and pickle. Raises UsageError."""
        raise UsageError("a step holds compiled code and memory of its device, which cannot be copied or pickled: step.save(path) and "
                         "mest.load(path) give another one, step.export(path) and mest.open_artifact(path) one without a compiler")

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
        """Outputs an example."""
        return self._compiled.graph.nodes[-1].shape[1]

    @property
    def optimizer(self) -> Optimizer:
        return self._compiled.optimizer

    @property
    def asked_lr(self) -> float | None:
        """The learning rate that the caller gave the optimizer; None: the default, or a step from a file, where it is nobody's wish now."""
        rule = self._compiled.optimizer
        return None if self._from_file or rule.lr == type(rule)().lr else rule.lr

    @property
    def program(self) -> Program:
        """The training step's kernel calls, in order."""
        return self._compiled.train

    @property
    def layers(self) -> Mapping[str, Layer]:
        """{weight name: Layer}, every convolution and linear layer."""
        return self._compiled.layers

    @in_turn
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

    @in_turn
    def sparsity(self) -> dict[str, float]:
        """{weight name: share of weights that are zero now}, sparse layers only."""
        return {name: 1.0 - float(self._state.keep(name).mean()) for name in self._sparse_layers()}

    @in_turn
    def not_finite(self) -> list[str]:
        """Which arrays hold NaN or infinity, of live weights, statistics, optimizer state and gradients; none when training is sound."""
        held = self._state.of_kinds("values", "optimizer", "gradients")
        return [name for name, array in held.items() if not np.isfinite(array).all()]

    @in_turn
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

    @in_turn
    def __call__(self, images, labels, lr: float | None = None, clip_norm: float | None = None, ahead: tuple | None = None) -> StepResult:
        """Forward, backward and update on one batch.

        images (N, C, H, W) float32; labels as the loss takes them: (N,) int in [0, classes), or (N, outputs) numbers for mest.MSE; numpy
        or torch. lr: None takes the optimizer's.
        clip_norm: where the norm of all gradients together is larger, they are scaled down to it, as torch's clip_grad_norm_ does: by NaN
        where it is NaN. Above 0.
        ahead: (images, labels) of the next call, the very same objects; they go to another device while it computes with these.
        Raises InputError on a wrong shape, a value that is not finite, or a label out of range; nothing is changed then. Raises DeviceLost
        when the device is gone.
        """
        rule = self._compiled.optimizer
        rate = rule.lr if lr is None else checks.number("lr", lr, error=InputError)
        bound = None if clip_norm is None else checks.number("clip_norm", clip_norm, also=", or None for no bound", error=InputError)
        if bound == 0:
            raise InputError("clip_norm is 0, which leaves no gradient; wanted a number above 0, or None for no bound")
        if self._specializer is not None:
            self._specializer.poll()
        self._load_batch(images, labels)
        self._updates += 1
        self._state.put("hyper", rule.hyper(self._updates, rate))
        if bound is None:
            self._run("train")
        else:
            with uninterrupted():
                self._run("backward")
                self._clip(bound)
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
        if not norm <= most:
            for name, array in gradients.items():
                self._state.put(name, array * np.float32(most / norm))

    def _result(self) -> StepResult:
        tells = self._compiled.facts.loss.tells_correct
        return StepResult(float(self._state.get("loss")[0]), self._state.get("correct")[: self.batch].astype(bool) if tells else None)

    @in_turn
    def predict(self, images) -> np.ndarray:
        """Logits (n, classes) in evaluation mode (running statistics), for any number n of images."""
        images = arguments.array(images, np.float32, "images")
        if images.shape[1:] != self.input_shape[1:] or len(images) == 0:
            raise InputError(f"images have shape {images.shape}; wanted (n, {', '.join(map(str, self.input_shape[1:]))}), n 1 or more")
        arguments.within_range(images, self._compiled.facts.activations)
        logits = np.empty((len(images), self.classes), np.float32)
        for start in range(0, len(images), self.batch):
            part = images[start:start + self.batch]
            whole = np.zeros(self.input_shape, np.float32)
            whole[: len(part)] = part
            self._state.put("images", whole.ravel())
            self._run("predict")
            logits[start:start + len(part)] = self._state.get("logits").reshape(self.batch, -1)[: len(part)]
        return logits

    @in_turn
    def gradients(self, images, labels) -> dict[str, np.ndarray]:
        """{torch name: gradient in torch's shape}, 0 at dead weights; nothing is updated."""
        self._load_batch(images, labels)
        self._run("gradients")
        return self._state.collect(":gradient")

    @in_turn
    def dense_gradients(self, images, labels) -> tuple[dict[str, np.ndarray], int]:
        """({torch name: gradient of every weight of a sparse layer, live or not, in torch's shape}, bytes that it took beside the step).

        They come from a dense step on the same weights, which exists for this call only: what RigL needs at a mutation.
        """
        twin = self._make_dense()
        twin.load_state_dict(self.state_dict())
        found = twin.gradients(images, labels)
        return {name: found[name] for name in self._sparse_layers()}, twin.memory()["total"]

    @in_turn
    def profile(self, images, labels, repeats: int = 5) -> dict[str, float]:
        """{name of a call of `program`: seconds}, the median of `repeats` whole steps; the state is afterwards what it was.

        "rest" is what a step that nobody watches takes beside its kernels: the machine that calls them.
        """
        repeats = checks.whole("repeats", repeats, 1)
        with self._timed(images, labels):
            return self._runner.profile("train", repeats)

    @in_turn
    def device_seconds(self, images, labels, repeats: int = 5) -> list[float]:
        """Seconds of each of `repeats` whole steps by the clock of the device behind a tracker; the state is afterwards what it was."""
        if not hasattr(self._runner, "seconds"):
            raise UsageError("this step runs here; device_seconds is for one with device=mest.rpc(...)")
        repeats = checks.whole("repeats", repeats, 1)
        with self._timed(images, labels):
            return self._runner.seconds("train", repeats)

    @contextmanager
    def _timed(self, images, labels) -> Iterator[None]:
        self._load_batch(images, labels)
        self._changes.begin(partial(self._state.write, {name: self._state.get(name) for name in self._state.own()}))
        try:
            self._state.put("hyper", self._compiled.optimizer.hyper(1, 0.0))
            yield
        finally:
            self._changes.finish()

    # Parameters.

    @in_turn
    def state_dict(self) -> dict[str, np.ndarray]:
        """{torch name: array in torch's shape}, zeros at dead weights, BatchNorm statistics included."""
        found = self._state.collect("")
        return {name: found[name] for name in self._compiled.graph.state_shapes}

    @in_turn
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets every parameter and statistic; optimizer state is kept.

        Raises StateError on names or shapes that do not fit, on values that are not finite, and on weights that are not 0 where the mask is
        dead; nothing is changed then.
        """
        state = arguments.state(state, self._compiled.graph.state_shapes, self._state.kept)
        self._state.check(state)
        for name, layer in self._compiled.layers.items():
            wrong = np.count_nonzero(as_conv(state[name])[~layer.scheme.expand(layer.spec, self._state.keep(name))])
            if wrong:
                raise StateError(f"{name}: {wrong} weights are not 0 where the mask is dead; call set_masks first or zero them")
        self._changes.make(partial(self._state.write, self._state.filling(state)),
                           partial(setattr, self._state, "kept", self._state.unused(state)))

    # Masks.

    @in_turn
    def masks(self) -> dict[str, np.ndarray]:
        """{torch weight name: bool array in torch's shape, True where the weight lives}, sparse layers only."""
        return {name: self._state.mask(name) for name in self._sparse_layers()}

    @in_turn
    def set_masks(self, masks: Mapping[str, np.ndarray]) -> MutationReport:
        """Installs masks; units that stay keep weight and optimizer state, new ones start at 0.

        masks  {torch weight name: bool, or 0 and 1, in torch's shape}; layers that are not named stay as they are
        Raises StateError, CapacityError; nothing is changed then.
        """
        start = self._begin()
        sparse = self._sparse_layers()
        keeps = {}
        for name, mask in arguments.mapping(masks, "what to set as masks").items():
            if name not in sparse:
                raise StateError(f"no sparse layer {name!r}; there are: {', '.join(sparse)}")
            layer = self._compiled.layers[name]
            keeps[name] = layer.scheme.collapse(layer.spec, as_conv(arguments.mask(mask, name, self._compiled.graph.state_shapes[name])))
            units = layer.scheme.count(layer.spec, keeps[name])
            layer.check_room(units, 1 - units * layer.scheme.unit_cells(layer.spec) / keeps[name].size)
        changes = {name: (np.flatnonzero(keep.ravel()[self._state.cells[name]]), cells_of(keep & ~self._state.keep(name)), None)
                   for name, keep in keeps.items()}
        return self._exchange_all(changes, start, lambda: None)

    @in_turn
    def mutate(self, prune_to: float, grow_to: float, importance_lambda: float = 0.0, rng: np.random.Generator | None = None,
               gradients: Mapping[str, np.ndarray] | None = None) -> MutationReport:
        """Elastic Mutation: in every sparse layer the least important units die until `prune_to`, others grow until `grow_to`.

        prune_to, grow_to  sparsity of all sparse layers together; grow_to <= prune_to
        importance_lambda  weight of the last step's gradient in |w| + lambda * |g|
        gradients          {weight name: dense gradient}: the dead units of largest gradient norm grow, as in RigL; None: random ones
        Source: MEST, arXiv:2110.14032; RigL, arXiv:1911.11134. Raises UsageError, SparsityError, CapacityError; nothing is changed then.
        """
        start = self._begin()
        prune_to, grow_to = (checks.number(name, value, below=1) for name, value in (("prune_to", prune_to), ("grow_to", grow_to)))
        importance_lambda = checks.number("importance_lambda", importance_lambda)
        if grow_to > prune_to:
            raise UsageError(f"mutate needs 0 <= grow_to <= prune_to < 1, got prune_to={prune_to}, grow_to={grow_to}")
        rng = self._rng if rng is None else rng
        if not isinstance(rng, np.random.Generator):
            raise UsageError(f"rng is {checks.shown(rng)}; wanted np.random.default_rng(seed), or None for the step's own")
        if gradients is not None:
            shapes = self._compiled.graph.state_shapes
            gradients = arguments.gradients(gradients, {name: shapes[name] for name in self._sparse_layers()})
        drawn = deepcopy(rng)  # what is refused or interrupted has drawn nothing
        layers = self._compiled.layers
        fewest_units, most_units = self._units_at(prune_to), self.check_room(grow_to)
        changes: dict[str, Change] = {}
        for name in self._sparse_layers():
            spec, scheme = layers[name].spec, layers[name].scheme
            cells, places = self._state.cells[name], self._state.places[name]
            score = importance(self._state.get(name), self._state.get(f"{name}:gradient") if importance_lambda else None, importance_lambda)
            squares = np.square(score, dtype=np.float64).reshape(-1, scheme.cell_elems(spec))
            energy = (squares[:, 0] if squares.shape[1] == 1 else squares @ np.ones(squares.shape[1])).take(places)
            fewest = min(fewest_units[name], len(cells) // scheme.unit_cells(spec))
            stay, dead = scheme.prune(spec, cells, energy, fewest, drawn)
            wanted = None if gradients is None else scheme.energy(spec, as_conv(gradients[name]))
            new = scheme.grow(spec, cells.take(stay), most_units[name], drawn, wanted, dead)
            changes[name] = stay, new, self._start_of(name, stay, new, dead, drawn)
        # Nothing is changed before all layers were asked, any of which may refuse.
        return self._exchange_all(changes, start, partial(_set_state, rng, drawn.bit_generator.state))

    def _start_of(self, name: str, stay: np.ndarray, new: np.ndarray, dead: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        """What new cells start at: 0, next to live ones. A filter all of whose weights are 0 may get no gradient: the normalisation behind
        it gives its bias, and a ReLU nothing where that is not above 0. So those of `dead`, the groups of filters of which nothing stays,
        are drawn as large as the layer's weights are. (new, weights of a cell) float32; None: all start at 0. Ours: MEST's start at 0.
        """
        if not len(dead) or not len(new):
            return None
        layer = self._compiled.layers[name]
        elems, revived = layer.scheme.cell_elems(layer.spec), layer.scheme.lie_in(layer.spec, new, dead)
        living = self._state.get(name).reshape(-1, elems).take(self._state.places[name].take(stay), axis=0)
        start = np.zeros((len(new), elems), np.float32)
        start[revived] = rng.standard_normal((int(revived.sum()), elems)) * np.sqrt(np.square(living, dtype=np.float64).mean())
        return start

    def check_room(self, grow_to: float) -> dict[str, int]:
        """{weight name: live units} of the sparse layers at that sparsity of all of them. Raises CapacityError where there is no room."""
        units = self._units_at(checks.number("grow_to", grow_to, below=1))
        for name, count in units.items():
            self._compiled.layers[name].check_room(count, grow_to)
        return units

    # Kernels.

    @in_turn
    def plan(self, steps: int | None = None) -> list[Planned]:
        """Which kernel every phase of every layer should run on under the present masks, and why.

        steps  between two mutations; None: there are none. Compiles the candidates and times them on the layers' own index arrays.
        Raises UsageError when the step does not run on this machine's processor.
        """
        return (self._specializer or self._new_specializer(steps)).plan()

    @in_turn
    def specialize(self, steps: int | None = None) -> None:
        """From now on layers run on kernels with their structure baked in where that is planned to be faster (see `plan`).

        Results stay the same bit for bit. After a mutation that changes a layer's structure it runs on the indexed kernels while others
        are compiled in the background; they are put in place between two steps. Raises as `plan` does.
        """
        self._specializer = self._new_specializer(steps)
        self._specializer.begin()

    @in_turn
    def kernel_times(self) -> dict[str, LayerTimes]:
        """{weight name: seconds of compiling and exchanging since the last call}, of layers where there were any."""
        return {} if self._specializer is None else self._specializer.report()

    def _new_specializer(self, steps: int | None) -> Specializer:
        compiled, exchange = self._compiled, getattr(self._runner, "exchange", None)
        steps = None if steps is None else checks.whole("steps", steps, 1, " between two mutations, or None for no mutations")
        if exchange is None or compiled.builder is None:
            raise UsageError("specialized kernels are for steps that run in this process on the processor; leave specialize out")
        from mest_compile.runtime.specializer import Specializer

        return Specializer(compiled.train, compiled.layers, compiled.sources, exchange, self._state.get,
                           compiled.builder, steps, compiled.facts.threads)

    # Files.

    @in_turn
    def save(self, path: str | Path, extra: Mapping[str, Any] | None = None, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Writes all state to one file, whole or not at all: weights, optimizer state, masks, statistics, the caller's `extra` and
        `arrays`.
        """
        held = {f"held/{name}": self._state.get(name) for name in self._state.own()}
        orders = {f"order/{name}": self._state.order(name) for name in self._state.cells}
        others = {f"extra/{name}": array for name, array in (arrays or {}).items()}
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as problem:
            raise UsageError(f"extra cannot be written as JSON ({problem}); arrays go to `arrays`") from problem
        others |= {f"kept/{name}": array for name, array in self._state.kept.items()}
        facts = dict(self._compiled.document) | {"extra": dict(extra or {}), "rng": self._rng.bit_generator.state, "updates": self._updates}
        checkpoint.write(path, held | orders | others, facts)

    @in_turn
    def export(self, path: str | Path) -> dict[str, Any]:
        """Writes an artifact, a folder from which a device trains on without a compiler; returns its manifest. Raises MestError."""
        from mest_compile.runtime import artifact

        return artifact.write(self._compiled, self.save, path)

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
        rule, its = (document["optimizer"].get("name", "sgd") for document in (mine, theirs))
        if rule != its:
            raise StateError(f"checkpoint {path} is of optimizer {its!r}, the step has {rule!r}; load it with mest.load, or compile the "
                             f"step as then")
        exclusive.check_process()
        with self._turn:
            changed = self._held_by(arrays, path)
            rng = np.random.default_rng()
            try:
                rng.bit_generator.state = facts["rng"]
                extra, updates = dict(facts["extra"]), int(facts.get("updates", 0))
            except (KeyError, TypeError, ValueError) as problem:
                raise StateError(f"checkpoint {path} lacks a random generator's state ({problem}); take another one") from problem
            # Whatever was left of an earlier change goes: all that it could have changed is written here.
            self._changes.make(*changed, partial(_set_state, self._rng, rng.bit_generator.state),
                               partial(setattr, self, "_updates", updates))
            self._from_file = True
        return extra, {name.removeprefix("extra/"): array for name, array in arrays.items() if name.startswith("extra/")}

    def _held_by(self, arrays: Mapping[str, np.ndarray], path: str | Path) -> list[Part]:
        """The parts of a change that takes the arrays of a checkpoint. Raises StateError where some are missing."""
        held = {name.removeprefix("held/"): array for name, array in arrays.items() if name.startswith("held/")}
        lacking = {f"order/{name}" for name in self._compiled.layers} - arrays.keys()
        lacking |= {f"held/{name}" for name in self._state.own() if name not in held}
        lacking |= {f"kept/{name}" for name in self._state.kept} - arrays.keys()
        if lacking:
            raise StateError(f"checkpoint {path} lacks {arguments.shortened(sorted(lacking))}; it is of another version of mest-compile")
        parts: list[Part] = []
        kept = {name: arrays[f"kept/{name}"].reshape(self._compiled.graph.state_shapes[name]) for name in self._state.kept}
        for name in self._compiled.layers:
            order = arrays[f"order/{name}"]
            arranged = self._state.arranged(name, np.unique(order))
            parts_of = self._state.parts(name)
            if not np.array_equal(order, arranged.order):  # tuning since then has cut the index otherwise, or a device has other kernels
                sort = np.argsort(order, kind="stable")
                there = sort[np.searchsorted(order, arranged.order, sorter=sort)]
                held |= {part: held[part].reshape(len(order), -1)[there] for part in parts_of}
            arranged.arrays.update({part: held.pop(part) for part in parts_of})
            parts.append(partial(self._install, arranged))
        return [*parts, partial(self._state.write, held), partial(setattr, self._state, "kept", kept)]

    # Devices.

    def reconnect(self) -> None:
        """After DeviceLost: takes another device. Until `restore` gives it a state other calls raise StateError. Raises DeviceError when
        there is none in time.
        """
        exclusive.check_process()
        with self._turn:
            self._changes.begin(_has_no_state)
            self.close()
            self._ahead = None
            runner = self._compiled.runner()
            self._state.start_on(runner)
            self._runner = runner

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
        try:
            images, labels = self._check_batch(*batch)
        except InputError:  # which the next call tells; this one is done
            return
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
        loss = self._compiled.facts.loss
        images, labels = arguments.array(images, np.float32, "images"), arguments.array(labels, loss.reads, "labels")
        if images.shape != self.input_shape:
            raise InputError(f"images have shape {images.shape}; this step was compiled for {self.input_shape}")
        labels = loss.targets(labels, (self.batch, self.classes))
        arguments.within_range(images, self._compiled.facts.activations)
        return images.ravel(), labels

    def _begin(self) -> tuple[float, int]:
        """Clock and bytes sent before a mutation."""
        return time.perf_counter(), self._runner.uploaded_bytes

    def _exchange_all(self, changes: Mapping[str, Change], begun: tuple[float, int], last: Part) -> MutationReport:
        """Lets those live cells of layers that stay, told by their places in the list of them, and new ones live; then comes `last`.

        changes  {weight name: (places that stay, new cells, what these start at)}; the other layers stay as they are
        """
        chosen = time.perf_counter()
        fates = dict.fromkeys(self._sparse_layers(), "unchanged")
        changing = {name: change for name, change in changes.items() if len(change[1]) or len(change[0]) < len(self._state.cells[name])}
        self._changes.make(*(partial(self._exchange, name, *change, fates) for name, change in changing.items()), last)
        end = time.perf_counter()
        return MutationReport(fates, end - begun[0], end - chosen, self._runner.uploaded_bytes - begun[1])

    def _exchange(self, name: str, stay: np.ndarray, new: np.ndarray, start: np.ndarray | None, fates: dict[str, str]) -> list[Part]:
        """Layer by layer: there need not be room for two states. start: what the new ones start at, None: 0."""
        return [partial(self._install, self._state.moved(name, stay, new, start), fates)]

    def _install(self, arrangement: Arrangement, fates: dict[str, str] | None = None) -> None:
        """Lets a layer hold that, and notes its fate."""
        self._state.install(arrangement)
        fate = "recompiled" if self._moved(arrangement.name) else "re-indexed"
        if fates is not None:
            fates[arrangement.name] = fate

    def _moved(self, name: str) -> bool:
        """Tells who specializes kernels of a layer's new mask; whether others are compiled for it."""
        return self._specializer is not None and self._specializer.changed(name)


def _masks(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a document says of layers, but for what only orders their values."""
    return [{fact: value for fact, value in layer.items() if fact not in ("kernels", "sections")} for layer in facts.get("layers", ())]


def _set_state(rng: np.random.Generator, state: Mapping[str, Any]) -> None:
    rng.bit_generator.state = state


def _has_no_state() -> NoReturn:
    raise StateError("the step has another device, which has no state yet; call step.restore(path) first")

"""A compiled training step: its state on the device, and everything a caller does with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mest_compile.base import checks, exclusive
from mest_compile.base.errors import InputError, StateError, UsageError
from mest_compile.base.interrupts import uninterrupted
from mest_compile.hardware.host import give_memory_back
from mest_compile.models.inputs import Reading
from mest_compile.operators.optimizers.groups import hyper_name
from mest_compile.runtime import arguments, checkpoint, saving
from mest_compile.runtime.changes import Changes, in_turn
from mest_compile.runtime.compiled import Compiled, StepResult
from mest_compile.runtime.feeding import Part
from mest_compile.runtime.freezing import Freezes, held_by
from mest_compile.runtime.masked import Masked, set_state
from mest_compile.runtime.runner import Clocked, Closes, Spares
from mest_compile.runtime.telling import Tells

if TYPE_CHECKING:
    from mest_compile.runtime.specializer import LayerTimes, Planned, Specializer


class TrainStep(Masked, Tells, Freezes):
    """One training step of a sparse model, compiled. Made by `mest.compile` and `mest.load`.

    `reading` says how pictures become what it is fed and what its answers are called, where somebody does: a Trainer by
    its data. Whatever is written of the step carries it.
    Several threads may use it, one after another; each call is whole, and its answer its own. A change that Ctrl-C
    interrupts is either not begun or finished by the next call, so that all is old or all is new. In a process forked
    off this one every call raises UsageError.
    """

    def __init__(self, compiled: Compiled, state: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray] = {}):
        """state: {torch name: array} to start from. masks: {weight name: (out, in, kh, kw) bool}; those of other layers
        are taken by magnitude."""
        self._specializer: Specializer | None = None
        self._turn, self._changes = threading.RLock(), Changes()
        self._rng = np.random.default_rng(compiled.facts.seed)
        self._updates = 0  # of the parameters since the first weights
        self._from_file = False
        self.reading: Reading | None = None
        self._coming = []
        runner = compiled.runner()
        self._be(compiled, runner, held_by(compiled, runner))
        self._state.check(state)
        for name, cells in self._mutating.first(state, masks, self._rng):
            self._state.install(self._state.arranged(name, cells))
        self._state.write(self._state.filling(state))
        self._state.kept = self._state.unused(state)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Of copy, deepcopy and pickle. Raises UsageError."""
        raise UsageError(
            "a step holds compiled code and memory of its device, which cannot be copied or pickled: "
            "step.save(path) and "
            "mest.load(path) give another one, step.export(path) and mest.open_artifact(path) one without a compiler"
        )

    # Running.

    @in_turn
    def __call__(
        self,
        images: Any,
        labels: Any,
        lr: float | Sequence[float] | None = None,
        clip_norm: float | None = None,
        ahead: tuple | None = None,
    ) -> StepResult:
        """Forward, backward and update on one batch.

        images (n, C, H, W), (n, C, L) or (n, features) float32, n from 1 to the batch that the step was compiled for,
        or a tuple of several inputs;
        labels as the loss takes them: (n,) int in [0, classes), (n, outputs) numbers for mest.MSE, a pair for
        mest.Distill; numpy or torch. The loss, and statistics of BatchNorms, are those of the n examples. The first
        batch of a smaller size compiles a training program for it, the last four of which are kept; a step of an
        artifact takes whole batches only.
        lr: None takes the optimizer's; a list has one for each part of `plan_freezing`, and one for all else.
        clip_norm: where the norm of all gradients together is larger, they are scaled down to it, as torch's
        clip_grad_norm_ does: by NaN where it is NaN. Above 0.
        ahead: (images, labels) of the next call, the very same objects; they go to another device while it computes
        with these. Raises InputError on a wrong shape, a value that is not finite, or a label out of range, and
        SpecError where a BatchNorm would see one value of a channel; nothing is changed then. Raises DeviceLost when
        the device is gone.
        """
        rates = arguments.rates(lr, self._compiled.optimizer.lr, len(self._compiled.facts.parts))
        bound = (
            None
            if clip_norm is None
            else checks.number("clip_norm", clip_norm, also=", or None for no bound", error=InputError)
        )
        if bound == 0:
            raise InputError("clip_norm is 0, which leaves no gradient; wanted a number above 0, or None for no bound")
        if self._specializer is not None:
            self._specializer.poll()
        parts = self._ready(images, labels)
        with uninterrupted():
            self._updates += 1
            self._state.count_batches(len(parts))
            self._put_hyper(self._updates, rates)
            loss, told = self._passes.train(parts, self._updates, bound, ahead)
        if not self.loss.tells_correct:
            return StepResult(loss, None, told.reshape(len(told), *self.output_shape[1:]))
        return StepResult(loss, told.astype(bool).reshape(len(told), *self.output_shape[2:]))

    @in_turn
    def predict(self, images: Any) -> np.ndarray:
        """Logits (n, classes), or maps of them (n, classes, H, W), in evaluation mode (running statistics), for any
        number n of images."""
        images = self._feeding.check_images(images)
        logits = np.empty((len(images), *self.output_shape[1:]), np.float32)
        each = self._compiled.graph.input_shape[0]
        for start in range(0, len(images), each):
            part = images[start : start + each]
            self._feeding.load_images(part)
            self._runner.run("predict")
            logits[start : start + len(part)] = self._state.get("logits").reshape(each, *logits.shape[1:])[: len(part)]
        return logits

    @in_turn
    def gradients(self, images: Any, labels: Any) -> dict[str, np.ndarray]:
        """{torch name: gradient in torch's shape} of what trains, 0 at dead weights; nothing is updated. images,
        labels: as a call takes them."""
        self._passes.gradients(self._ready(images, labels), self._updates + 1)
        return self._state.collect(":gradient")

    @in_turn
    def dense_gradients(self, images: Any, labels: Any) -> tuple[dict[str, np.ndarray], int]:
        """({torch name: gradient of every weight of a sparse layer, live or not, in torch's shape}, bytes that it took
        beside the step).

        They come from a dense step on the same weights, which exists for this call only: what RigL needs at a mutation.
        """
        twin = self.dense_twin()
        twin.load_state_dict(self.state_dict())
        found = twin.gradients(images, labels)
        return {name: found[name] for name in self._mutating.mutating}, twin.memory()["total"]

    def dense_twin(self) -> TrainStep:
        """A step of the same model with all weights alive, and 0, for this machine, untuned."""
        return self._compiled.dense()

    @in_turn
    def profile(self, images: Any, labels: Any, repeats: int = 5) -> dict[str, float]:
        """{name of a call of `program`: seconds}, the median of `repeats` whole steps; the state is afterwards what it
        was.

        "rest" is what a step that nobody watches takes beside its kernels: the machine that calls them.
        """
        repeats = checks.whole("repeats", repeats, 1)
        with self._timed(images, labels):
            return self._added_up(lambda function: self._runner.profile(function, repeats))

    @in_turn
    def device_seconds(self, images: Any, labels: Any, repeats: int = 5) -> list[float]:
        """Seconds of each of `repeats` whole steps by the clock of the device behind a tracker; the state is afterwards
        what it was."""
        if not isinstance(self._runner, Clocked):
            raise UsageError("this step runs here; device_seconds is for one with device=mest.rpc(...)")
        repeats = checks.whole("repeats", repeats, 1)
        runner = self._runner
        with self._timed(images, labels):
            seconds = self._added_up(lambda function: dict(enumerate(runner.seconds(function, repeats))))
        return list(seconds.values())

    def _added_up(self, timed: Callable[[str], Mapping[Any, float]]) -> dict[Any, float]:
        """What the functions of a whole step take together. timed: {what: seconds} of one of them."""
        passes = self._compiled.facts.passes
        counts = {"zero": 1, "add": passes, "update": 1} if self._passes.adds else {"train": 1}
        found: dict[Any, float] = {}
        for function, count in counts.items():
            for name, seconds in timed(function).items():
                found[name] = found.get(name, 0.0) + count * seconds
        return found

    @contextmanager
    def _timed(self, images: Any, labels: Any) -> Iterator[None]:
        parts = self._feeding.parts(images, labels)
        if (examples := sum(part.examples for part in parts)) != self.batch:
            raise InputError(f"times are of a whole batch: give {self.batch} examples, and not {examples}")
        self._passes.put(parts[0], self._updates + 1)
        self._changes.begin(partial(self._state.write, {name: self._state.get(name) for name in self._state.own()}))
        try:
            self._put_hyper(1, [0.0] * (1 + len(self._compiled.facts.parts)))
            yield
        finally:
            self._changes.finish()

    @in_turn
    def prepare(self, examples: int) -> None:
        """Has compiled what batches of so many examples need, which else the first such batch does. Raises InputError
        where a step takes no such batches, SpecError where a BatchNorm would see one value of a channel, BuildError."""
        self._passes.ready(checks.whole("examples", examples, 1, f" to {self.batch}", InputError))

    # Parameters.

    @in_turn
    def state_dict(self) -> dict[str, np.ndarray]:
        """{torch name: array in torch's shape}, zeros at dead weights, BatchNorm statistics included."""
        found = self._state.collect("")
        return {name: found[name] for name in self._compiled.graph.state_shapes}

    @in_turn
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets every parameter and statistic; optimizer state is kept.

        Raises StateError on names or shapes that do not fit, on values that are not finite, and on weights that are not
        0 where the mask is dead; nothing is changed then.
        """
        state = arguments.state(state, self._compiled.graph.state_shapes, self._state.kept)
        self._state.check(state)
        self._state.check_dead(state)
        self._changes.make(
            partial(self._state.write, self._state.filling(state)),
            partial(setattr, self._state, "kept", self._state.unused(state)),
        )

    # Kernels.

    @in_turn
    def plan(self, steps: int | None = None) -> list[Planned]:
        """Which kernel every phase of every layer should run on under the present masks, and why.

        steps  between two mutations; None: there are none. Compiles the candidates and times them on the layers' own
               index arrays.
        Raises UsageError when the step does not run on this machine's processor.
        """
        return (self._specializer or self._new_specializer(steps)).plan()

    @in_turn
    def specialize(self, steps: int | None = None) -> None:
        """From now on layers run on kernels with their structure baked in where that is planned to be faster (see
        `plan`).

        Results stay the same bit for bit. After a mutation that changes a layer's structure it runs on the indexed
        kernels while others are compiled in the background; they are put in place between two steps. Raises as `plan`
        does.
        """
        self._specializer = self._new_specializer(steps)
        self._specializer.begin()

    @in_turn
    def kernel_times(self) -> dict[str, LayerTimes]:
        """{weight name: seconds of compiling and exchanging since the last call}, of layers where there were any."""
        return {} if self._specializer is None else self._specializer.report()

    def _new_specializer(self, steps: int | None) -> Specializer:
        from mest_compile.runtime.specializer import Specializer

        return Specializer.of(self._compiled, self._runner, self._state.get, steps)

    # Files.

    @in_turn
    def save(
        self, path: str | Path, extra: Mapping[str, Any] | None = None, arrays: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Writes all state to one file, whole or not at all: weights, optimizer state, masks, statistics, the caller's
        `extra` and `arrays`.
        """
        document = dict(self._compiled.document) | {"updates": self._updates}
        if self._coming:
            document["coming"] = self._coming
        if self.reading is not None:
            document["reading"] = self.reading.to_json()
        saving.write(path, document, self._state, self._rng, extra or {}, arrays or {})

    @in_turn
    def export(self, path: str | Path) -> dict[str, Any]:
        """Writes an artifact, a folder from which a device trains on without a compiler, and freezes what
        `plan_freezing` said; returns its manifest. Raises MestError."""
        from mest_compile.runtime import artifact

        return artifact.write(self._compiled, self.save, path, self._still_coming())

    def restore(self, path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Takes all state from a file that a step of the same model and scheme wrote; returns its (extra, arrays).
        Raises StateError."""
        arrays, facts = checkpoint.read(path)
        return self._restore(arrays, facts, path)

    def _restore(
        self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], path: str | Path
    ) -> tuple[dict, dict]:
        exclusive.check_process()
        with self._turn:
            self._match(facts)
            saving.check_same(self._compiled.document, facts, path)
            changed = saving.parts_of(arrays, path, self._compiled, self._state, self._install)
            drawn, updates, extra, others = saving.rest_of(arrays, facts, path)
            # Whatever was left of an earlier change goes: all that it could have changed is written here.
            self._changes.make(
                *changed,
                partial(set_state, self._rng, drawn),
                partial(setattr, self, "_updates", updates),
                partial(setattr, self, "reading", saving.reading_of(facts, path)),
            )
            self._from_file = True
        return extra, others

    # Devices.

    def reconnect(self) -> None:
        """After DeviceLost: takes another device. Until `restore` gives it a state other calls raise StateError. Raises
        DeviceError when there is none in time.
        """
        exclusive.check_process()
        with self._turn:
            self._changes.begin(_has_no_state)
            self.close()
            runner = self._compiled.runner()
            self._state.start_on(runner)
            self._runner = runner
            self._feed(runner)

    def close(self) -> None:
        """Gives a device that is not this process back; the step cannot run after it."""
        if isinstance(self._runner, Closes):
            self._runner.close()

    @in_turn
    def spare(self) -> None:
        """Gives back memory that is not state; the next call takes it again."""
        if isinstance(self._runner, Spares):
            self._runner.spare()
        give_memory_back()

    # Internal.

    def _ready(self, images: Any, labels: Any) -> list[Part]:
        """A batch for which there are programs."""
        parts = self._feeding.parts(images, labels)
        self._passes.ready(sum(part.examples for part in parts))
        return parts

    def _put_hyper(self, count: int, rates: Sequence[float]) -> None:
        """The optimizer's scalars of update number `count`, of every group of parameters."""
        for place, setting in enumerate(self._settings):
            if (name := hyper_name(place)) in self._state.held:
                self._state.put(name, self._compiled.optimizer.hyper_of(setting, count, rates))


def _has_no_state() -> NoReturn:
    raise StateError("the step has another device, which has no state yet; call step.restore(path) first")

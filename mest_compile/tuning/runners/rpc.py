"""Candidates on devices behind TVM's RPC tracker: compiled here, run and timed there, several devices of one key at
once."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mest_compile.base.errors import DeviceError, MestError, TargetError, UsageError
from mest_compile.devices import probe
from mest_compile.devices.session import Session, last_line, rpc
from mest_compile.hardware.target import Target
from mest_compile.kernels.source import KernelSource
from mest_compile.records.log import Measure, Outcome, cpu_of
from mest_compile.records.record import COUNTED
from mest_compile.tuning.deadline import OutOfTime
from mest_compile.tuning.runner import Runner, RunnerOptions, Timing, runner
from mest_compile.tuning.task import Arrays, Task
from mest_compile.tuning.worker import compile_kernel

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0  # to wait for a device when none is left
ASKING_SECONDS = 2.0  # for one, before looking whether another candidate has left one
TRIES = 2  # of a candidate whose session ended: the first time the device may have been taken away


@runner("rpc")
class RpcRunner(Runner):
    """One session a device, as many as the tracker has, or `options.devices`. A device may vanish: its candidate goes
    to another one, or to itself when it comes back. One that takes its session down twice is recorded as crashed.

    Times of an emulated device are marked so, and kept apart from those of all others.
    """

    measure = Measure.MEASURED

    def __init__(self, target: Target, options: RunnerOptions):
        from tvm.support.popen_pool import PopenWorker

        super().__init__(target, options)
        if not options.tracker or not options.key:
            raise UsageError("the rpc runner needs --tracker HOST:PORT and --key KEY")
        # A device that hangs is cut off by the link, and ends the session by itself some time later.
        device = rpc(options.tracker, options.key, max(PATIENCE_SECONDS, self._limit), options.timeout_seconds)
        self._device = replace(device, early=False)
        self._free: list[_Seat] = []
        self._open, self._changed = 0, threading.Condition()
        self._compiler, self._compiling = PopenWorker(), threading.Lock()
        self._facts: probe.DeviceFacts | None = None
        self.devices = 1
        self._leave(self._take())
        self.devices = options.devices or max(1, self._device.listed())

    @property
    def cpu(self) -> str:
        assert self._facts is not None
        if self.measure is Measure.MODELLED:
            return f"{self._facts.clock}, by the device's counter"
        return self._facts.machine

    @property
    def _limit(self) -> float:
        """Seconds after which a device ends a session; ours are given back long before."""
        return 4 * self.options.timeout_seconds

    def build(self, source: KernelSource, folder: Path) -> Path:
        path = folder / f"{source.symbol}.so"
        with self._compiling:
            self._compiler.send(compile_kernel, (source, str(path)), timeout=self.patience_seconds)
            self._compiler.recv()
        return path

    def run(self, task: Task, artifact: Path, symbol: str, repeats: int | None = None) -> Timing:
        for _ in range(TRIES):
            seat = self._take()
            started = time.monotonic()
            # The link waits as long as any candidate may take; at the deadline it is cut.
            ending = threading.Timer(min(self.deadline.left, threading.TIMEOUT_MAX), seat.session.close)
            ending.daemon = True
            ending.start()
            try:
                # What is counted is the same on every run.
                timing = seat.time(
                    task, artifact, symbol, 1 if self.measure is Measure.MODELLED else repeats or self.options.repeats
                )
            except Exception as problem:  # of TVM's many types
                if self.deadline.left <= 0:
                    self._leave(seat, False)
                    raise OutOfTime from None
                lost = seat.session.lost()
                self._leave(seat, lost is None)
                if lost is None:
                    return Timing(Outcome.CRASHED, message=last_line(problem)[:200])
                if time.monotonic() - started >= self.options.timeout_seconds:
                    return Timing(Outcome.TIMED_OUT, message=f"no answer after {self.options.timeout_seconds} s")
                log.warning("device %s was lost while it timed %s: %s; trying again", self._device, task.name, lost)
            else:
                self._leave(seat)
                return timing
            finally:
                ending.cancel()
        return Timing(Outcome.CRASHED, message=f"the session ended: {lost}")

    def close(self) -> None:
        self._compiler.kill()
        for seat in self._free:
            seat.session.close()

    def _take(self) -> _Seat:
        """A device that is ours. Raises DeviceError when there is none in time; while another candidate has one, that
        is waited for."""
        end, waiting = time.monotonic() + self._device.wait_seconds, False
        while True:
            self.deadline.check()
            with self._changed:
                while self._free:
                    if (seat := self._free.pop()).age < self._limit / 2:
                        return seat
                    self._close(seat)
                others, asking = self._open, self._open < self.devices
                self._open += asking
            if asking:
                try:
                    return self._new()
                except Exception as problem:
                    with self._changed:
                        self._open -= 1
                    if not isinstance(problem, DeviceError):
                        raise
                    if not others and time.monotonic() >= end:
                        raise DeviceError(
                            f"{problem}; asked for {self._device.wait_seconds:g} s, again and again. What was "
                            "measured is "
                            "recorded: start again to go on"
                        ) from None
                    if not others and not waiting:
                        waiting = True
                        log.warning("%s; waiting up to %g s", problem, self._device.wait_seconds)
            if others:
                end = time.monotonic() + self._device.wait_seconds
                with self._changed:
                    self._changed.wait_for(lambda: self._free, ASKING_SECONDS)

    def _leave(self, seat: _Seat, whole: bool = True) -> None:
        with self._changed:
            if whole:
                self._free.append(seat)
            else:
                self._close(seat)
            self._changed.notify()

    def _close(self, seat: _Seat) -> None:
        seat.session.close()
        self._open -= 1

    def _new(self) -> _Seat:
        """Raises DeviceError (none is free), TargetError (it is no such device)."""
        session = replace(self._device, wait_seconds=ASKING_SECONDS).open(self._limit)
        try:
            session.place(self.target.device)
            self._know(probe.check(session, self.target))
        except MestError:
            session.close()
            raise
        return _Seat(session)

    def _know(self, facts: probe.DeviceFacts) -> None:
        """Raises TargetError when the target is another device's, or devices of one key differ."""
        if self.target.name == "local" and not facts.emulated and facts.cpu != cpu_of(self.target):
            raise TargetError(
                f"target 'local' is this machine, {cpu_of(self.target)}; device {self._device} is "
                f"{facts.cpu or 'unknown'}: "
                "choose a target that describes it"
            )
        if self._facts is None:
            self._facts = facts
            if facts.emulated:
                self.measure = Measure.MODELLED if facts.clock.startswith(COUNTED) else Measure.EMULATED
        elif facts != self._facts:
            raise TargetError(
                f"devices under the key {self._device.key!r} differ: {facts.cpu}, and before it "
                f"{self._facts.cpu}; give each "
                "kind a key of its own"
            )


class _Seat:
    """A device's session, and the arguments of the task that was there last."""

    def __init__(self, session: Session) -> None:
        self.session, self._began = session, time.monotonic()
        self._held: tuple[Path, Arrays, list[Any]] | None = None

    @property
    def age(self) -> float:
        return time.monotonic() - self._began

    def time(self, task: Task, artifact: Path, symbol: str, repeats: int) -> Timing:
        import tvm

        remote, device = self.session.rpc, self.session.place(task.target.device)
        if self._held is None or self._held[0] != task.arrays:
            self._held = None
            arrays = task.load()
            self._held = task.arrays, arrays, [tvm.runtime.tensor(array, device) for array in arrays.arguments]
        _, arrays, tensors = self._held
        remote.upload(bytearray(artifact.read_bytes()), artifact.name)
        library = remote.load_module(artifact.name)
        remote.remove(artifact.name)
        for tensor, array in zip(tensors, arrays.arguments):
            tensor.copyfrom(array)
        library[symbol](*tensors)
        wrong = arrays.check([tensor.numpy() for tensor in tensors])
        if wrong:
            return Timing(Outcome.WRONG, message=wrong)
        timed = library.time_evaluator(symbol, device, number=1, repeat=repeats)(*tensors)
        return Timing(Outcome.OK, tuple(map(float, timed.results)))

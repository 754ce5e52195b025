"""Candidates on devices behind TVM's RPC tracker: compiled here, run and timed there, several devices of one key at once."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import Any

from mest_compile.building import KernelSource
from mest_compile.errors import DeviceError, UsageError
from mest_compile.hardware import Target
from mest_compile.records import Measure, Outcome
from mest_compile.tuning.runner import Runner, RunnerOptions, Timing, runner
from mest_compile.tuning.task import Arrays, Task
from mest_compile.tuning.worker import compile_kernel

PATIENCE_SECONDS = 20.0  # to wait for a free device, and for one that a candidate took down


@runner("rpc")
class RpcRunner(Runner):
    """One session a device. A candidate that takes its session down is recorded as crashed, or timed out, and another session begins."""

    measure = Measure.MEASURED

    def __init__(self, target: Target, options: RunnerOptions):
        from tvm.support.popen_pool import PopenWorker

        super().__init__(target, options)
        if not options.tracker or not options.key:
            raise UsageError("the rpc runner needs --tracker HOST:PORT and --key KEY")
        host, _, port = options.tracker.rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(f"--tracker {options.tracker}; wanted HOST:PORT")
        self._address = host, int(port)
        self.devices = options.devices
        self._compiler, self._compiling = PopenWorker(), threading.Lock()
        self._free: queue.Queue[_Seat] = queue.Queue()
        for _ in range(self.devices):
            self._free.put(_Seat())

    def build(self, source: KernelSource, folder: Path) -> Path:
        path = folder / f"{source.symbol}.so"
        with self._compiling:
            self._compiler.send(compile_kernel, (source, str(path)), timeout=self.options.timeout_seconds)
            self._compiler.recv()
        return path

    def run(self, task: Task, artifact: Path, symbol: str, repeats: int | None = None) -> Timing:
        seat = self._free.get()
        started = time.monotonic()
        try:
            if seat.session is None:
                seat.session = self._request()
            started = time.monotonic()
            return seat.time(task, artifact, symbol, repeats or self.options.repeats)
        except DeviceError:
            raise
        except Exception as problem:  # of TVM's many types: the session is gone with whatever happened there
            seat.leave()
            if time.monotonic() - started >= self.options.timeout_seconds:
                return Timing(Outcome.TIMED_OUT, message=f"no answer after {self.options.timeout_seconds} s")
            return Timing(Outcome.CRASHED, message=f"the session ended: {str(problem).strip().splitlines()[-1][:200]}")
        finally:
            self._free.put(seat)

    def close(self) -> None:
        self._compiler.kill()
        while not self._free.empty():
            self._free.get().leave()

    def _request(self) -> Any:
        """A session of a device. Raises DeviceError when none is free in time."""
        import tvm.rpc

        deadline, said = time.monotonic() + PATIENCE_SECONDS, ""
        while time.monotonic() < deadline:
            try:
                tracker = tvm.rpc.connect_tracker(*self._address)
                if any(server["key"] == f"server:{self.options.key}" for server in tracker.summary()["server_info"]):
                    return tracker.request(self.options.key, session_timeout=self.options.timeout_seconds, max_retry=1)
                said = "none serves under that key"
            except Exception as problem:  # of TVM's many types
                said = str(problem).strip().splitlines()[-1]
            time.sleep(0.5)
        raise DeviceError(f"no device {self.options.key!r} at the tracker {self.options.tracker} within {PATIENCE_SECONDS:g} s: {said}; "
                          "is it served under that key?")


class _Seat:
    """A device's session, and the arguments of the task that was there last."""

    def __init__(self) -> None:
        self.session: Any = None
        self._held: tuple[Path, Arrays, list[Any]] | None = None

    def time(self, task: Task, artifact: Path, symbol: str, repeats: int) -> Timing:
        import tvm

        device = self.session.cpu(0)
        if self._held is None or self._held[0] != task.arrays:
            self._held = None
            arrays = task.load()
            self._held = task.arrays, arrays, [tvm.runtime.tensor(array, device) for array in arrays.arguments]
        _, arrays, tensors = self._held
        self.session.upload(str(artifact))
        library = self.session.load_module(artifact.name)
        self.session.remove(artifact.name)
        for tensor, array in zip(tensors, arrays.arguments):
            tensor.copyfrom(array)
        library[symbol](*tensors)
        wrong = arrays.check([tensor.numpy() for tensor in tensors])
        if wrong:
            return Timing(Outcome.WRONG, message=wrong)
        timed = library.time_evaluator(symbol, device, number=1, repeat=repeats)(*tensors)
        return Timing(Outcome.OK, tuple(map(float, timed.results)))

    def leave(self) -> None:
        self.session = self._held = None

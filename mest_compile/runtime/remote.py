"""Runs a step's programs on a device behind TVM's RPC tracker: arrays stay there, batches are sent ahead, results are read back."""

from __future__ import annotations

import logging
import math
import secrets
import subprocess
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from mest_compile.errors import DeviceError, DeviceLost, MestError, TargetError, UsageError
from mest_compile.graph.program import Program, Stage
from mest_compile.hardware import Target
from mest_compile.runtime import link, tracker
from mest_compile.runtime.tracker import Address, check_key

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
SILENT_SECONDS = 3.0  # of waiting for a device, before the log says so
DEVICE_TYPES = {"cpu": 1, "opencl": 4}  # DLPack's
POOLED = 2  # TVM's allocator that hands the same memory out again
AHEAD = ("images", "labels")  # arrays that may be sent while the device computes with the ones before


@dataclass(frozen=True, slots=True)
class Device:
    """Any device that serves under `key` at the tracker.

    wait_seconds     how long to wait until one is free
    silence_seconds  how long a device may take for one answer before it counts as lost; a step of a slow board may take minutes
    early            whether the link answers a step's calls before the device does; not where calls have results, as in timing
    """

    tracker: Address
    key: str
    wait_seconds: float = 60.0
    silence_seconds: float = 300.0
    early: bool = True

    def __str__(self) -> str:
        return f"{self.key} at {self.tracker}"

    def open(self, limit_seconds: float | None = None) -> Session:
        """A session on a device, which is ours alone until it is closed. Raises DeviceError when none is free in time.

        limit_seconds  after which the device ends the session, whatever it is doing; None: never
        """
        end, said = time.monotonic() + self.wait_seconds, ""
        while (left := end - time.monotonic()) > 0:
            try:
                return Session(self, *tracker.request(self.tracker, self.key, left if said else min(left, SILENT_SECONDS)), limit_seconds)
            except TimeoutError:
                now = "no device of that key is free"
            except (OSError, DeviceError) as problem:  # the tracker restarts, or gave away a device that is gone by now
                now = getattr(problem, "strerror", None) or str(problem)
                time.sleep(min(RETRY_SECONDS, max(0.0, end - time.monotonic())))
            if not said and self.wait_seconds > SILENT_SECONDS:
                log.warning("device %s: %s; waiting up to %g s", self, now, self.wait_seconds)
            said = now
        raise DeviceError(f"device {self}: none to be had within {self.wait_seconds:g} s ({said}); look at the tracker with "
                         f"mest-compile tracker --query {self.tracker}")

    def listed(self) -> int:
        """How many devices are at the tracker under the key. Raises OSError (no tracker answers)."""
        return sum(entry["key"] == f"server:{self.key}" for entry in tracker.summary(self.tracker)["server_info"])


def rpc(tracker: str, key: str, wait_seconds: float = 60.0, silence_seconds: float = 300.0) -> Device:
    """A device for `mest.compile(device=...)`. tracker: "host:port". Raises UsageError. Nothing is connected yet."""
    for name, seconds in (("wait_seconds", wait_seconds), ("silence_seconds", silence_seconds)):
        if not isinstance(seconds, Real) or not 0 < seconds < math.inf:
            raise UsageError(f"{name} is {seconds!r}; wanted a number of seconds that is more than 0")
    return Device(Address.parse(tracker), check_key(key), float(wait_seconds), float(silence_seconds))


class Session:
    """One device, ours until `close()`. rpc: TVM's session over the link."""

    def __init__(self, device: Device, there: Address, key: str, limit_seconds: float | None = None):
        from tvm import rpc

        self.device = device
        self._link, local = link.start(there.host, there.port, device.silence_seconds, device.early)
        self.close = weakref.finalize(self, _end, self._link)  # gives the device back, whatever still refers to it here
        try:
            self.rpc: Any = rpc.connect("127.0.0.1", local, key, limit_seconds or 0)
        except Exception as problem:
            said = self.lost() or last_line(problem)
            self.close()
            raise DeviceError(f"{there} does not take the session: {said}") from problem
        log.info("device %s is %s", device, there)

    def place(self, kind: str) -> Any:
        """TVM's device for arrays and kernels, of a kind in DEVICE_TYPES. Raises TargetError when what serves there has none."""
        there = self.rpc.device(DEVICE_TYPES[kind], 0)
        if not there.exist:
            raise TargetError(f"device {self.device}: its TVM runtime has no {kind}, or finds no driver; serve there with a runtime that "
                              "has it (docs/devices.md), or choose a target that is the device's CPU")
        return there

    def lost(self) -> str | None:
        """Why the device is gone; None: it is not. The link's process ends with the connection."""
        if not self.close.alive:
            return "the session was closed, by close() or by Ctrl-C in the middle of an exchange; call step.reconnect(), then restore"
        try:
            self._link.wait(2)
        except subprocess.TimeoutExpired:
            return None
        assert self._link.stderr
        return self._link.stderr.read().strip() or "the connection is closed"


def _end(process: subprocess.Popen) -> None:
    process.kill()  # also one that is stopped, which no other signal reaches
    process.wait()
    for end in (process.stdout, process.stderr):
        assert end
        end.close()


class RemoteRunner:
    """A step's arrays and library on one device.

    library   what `linking` made: for the device's CPU, or for its CPU and its OpenCL driver
    programs  what `run` runs, by name: a program and the stages of it
    target    that all this was compiled for; the device must be one
    """

    def __init__(self, device: Device, library: bytes, programs: Mapping[str, tuple[Program, tuple[Stage, ...]]], threads: int,
                 target: Target):
        from mest_compile.runtime.probe import check

        kind = target.device
        self._programs = programs
        self.uploaded_bytes = 0
        self._tensors: dict[str, Any] = {}
        self._ahead: dict[str, Any] = {}
        self._arguments: dict[str, list] = {}
        self._session = device.open()
        try:
            with self._told("it does not say what it has"):
                self._device = self._session.place(kind)
            check(self._session, target)
            with self._told("the step cannot be loaded"):
                remote = self._session.rpc
                name = f"step.{secrets.token_hex(8)}.so"  # servers may share a folder, and nobody writes into what another one runs
                remote.upload(bytearray(library), name)
                self.uploaded_bytes += len(library)
                self._module = remote.load_module(name)
                remote.remove(name)
                self._machine = self._module["vm_load_executable"]()
                cpu = [] if kind == "cpu" else [DEVICE_TYPES["cpu"], 0, POOLED]
                self._machine["vm_initialization"](DEVICE_TYPES[kind], 0, POOLED, *cpu)
                remote.get_function("runtime.config_threadpool")(1, threads)
                self._functions = {name: self._machine[name] for name in programs}
        except MestError:
            self.close()
            raise

    def put(self, name: str, array: np.ndarray) -> None:
        """Sends an array, flat; does not wait until it is there."""
        flat, there = np.ascontiguousarray(array).ravel(), self._tensors.get(name)
        if there is None or there.shape[0] != flat.size or there.dtype != flat.dtype:
            self._arguments.clear()
            self._tensors[name] = there = self._new(name, flat)
        self._send(name, flat, there)

    def put_ahead(self, name: str, array: np.ndarray) -> None:
        """Sends the array that `name` is to be after `turn`, while the device still computes with the present one."""
        flat = np.ascontiguousarray(array).ravel()
        if name not in self._ahead:
            self._ahead[name] = self._new(name, flat)
        self._send(name, flat, self._ahead[name])

    def turn(self) -> None:
        """What was sent ahead is the present from now on."""
        self._arguments.clear()
        for name, tensor in self._ahead.items():
            self._tensors[name], self._ahead[name] = tensor, self._tensors[name]

    def get(self, name: str) -> np.ndarray:
        """A copy of the array, after all that was asked for before is done."""
        with self._told(f"{name} cannot be read"):
            return self._tensors[name].numpy()

    def run(self, function: str) -> None:
        """Starts one of `programs`; `get` waits for it, and tells when it failed."""
        if function not in self._arguments:
            self._arguments[function] = [self._tensors[buffer.name] for buffer in self._programs[function][0].held()]
        with self._told(f"{function} cannot be run"):
            self._functions[function](*self._arguments[function])

    def seconds(self, function: str, repeats: int) -> list[float]:
        """Of each of `repeats` runs by the device's own clock, after one that is not counted; the device's `early` must be off."""
        self.run(function)
        with self._told(f"{function} cannot be timed"):
            timed = self._machine.time_evaluator(function, self._device, number=1, repeat=repeats)(*self._arguments[function])
        return list(map(float, timed.results))

    def profile(self, function: str, repeats: int) -> dict[str, float]:
        raise DeviceError("a step on another device cannot be profiled call by call; tune or analyze its kernels instead")

    def close(self) -> None:
        """Gives the device back. What the step held there is lost."""
        self._session.close()

    def _new(self, name: str, flat: np.ndarray) -> Any:
        from tvm import runtime

        with self._told(f"{name} cannot be allocated"):
            return runtime.empty((flat.size,), str(flat.dtype), self._device)

    def _send(self, name: str, flat: np.ndarray, tensor: Any) -> None:
        if flat.size:
            with self._told(f"{name} cannot be sent"):
                tensor.copyfrom(flat)
            self.uploaded_bytes += flat.nbytes

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except MestError:
            raise
        except Exception as problem:  # of TVM's many types
            device = self._session.device
            if (lost := self._session.lost()) is not None:
                raise DeviceLost(f"device {device} is lost: {lost}") from problem
            raise DeviceError(f"device {device}: {what}: {last_line(problem)}. Is the target that of the device?") from problem
        except BaseException:  # Ctrl-C in the middle of a packet, or of an answer, which the next question would get
            self.close()
            raise


def last_line(problem: Exception) -> str:
    """What TVM says at the end of a long text."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[-1] if lines else type(problem).__name__

"""Runs a step's programs on a device behind TVM's RPC tracker: arrays stay there, batches are sent ahead, results are
read back."""

from __future__ import annotations

import logging
import math
import subprocess
import time
import weakref
from dataclasses import dataclass
from numbers import Real
from typing import Any

from mest_compile.base.errors import DeviceError, TargetError, UsageError
from mest_compile.devices import link, tracker
from mest_compile.devices.tracker import Address, check_key
from mest_compile.hardware.backend import BACKENDS

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
SILENT_SECONDS = 3.0  # of waiting for a device, before the log says so
POOLED = 2  # TVM's allocator that hands the same memory out again


@dataclass(frozen=True, slots=True)
class Device:
    """Any device that serves under `key` at the tracker.

    wait_seconds     how long to wait until one is free
    silence_seconds  how long a device may take for one answer before it counts as lost; a step of a slow board may take
                     minutes
    early            whether the link answers a step's calls before the device does; not where calls have results, as in
                     timing
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
                return Session(
                    self,
                    *tracker.request(self.tracker, self.key, left if said else min(left, SILENT_SECONDS)),
                    limit_seconds,
                )
            except TimeoutError:
                now = "no device of that key is free"
            except (OSError, DeviceError) as problem:  # the tracker restarts, or gave away a device that is gone by now
                now = getattr(problem, "strerror", None) or str(problem)
                time.sleep(min(RETRY_SECONDS, max(0.0, end - time.monotonic())))
            if not said and self.wait_seconds > SILENT_SECONDS:
                log.warning("device %s: %s; waiting up to %g s", self, now, self.wait_seconds)
            said = now
        raise DeviceError(
            f"device {self}: none to be had within {self.wait_seconds:g} s ({said}); look at the tracker with "
            f"mest-compile tracker --query {self.tracker}"
        )

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
        """TVM's device for arrays and kernels, of a kind. Raises TargetError when what serves there has none."""
        there = self.rpc.device(BACKENDS.find(kind).device_type, 0)
        if not there.exist:
            raise TargetError(
                f"device {self.device}: its TVM runtime has no {kind}, or finds no driver; serve there with a "
                "runtime that "
                "has it (docs/devices.md), or choose a target that is the device's CPU"
            )
        return there

    def lost(self) -> str | None:
        """Why the device is gone; None: it is not. The link's process ends with the connection."""
        if not self.close.alive:
            return (
                "the session was closed, by close() or by Ctrl-C in the middle of an exchange; call "
                "step.reconnect(), then restore"
            )
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


def last_line(problem: Exception) -> str:
    """What TVM says at the end of a long text."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[-1] if lines else type(problem).__name__

"""Runs a step's programs on a device behind a tracker."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mest_compile.base.errors import DeviceError, DeviceLost, MestError
from mest_compile.devices.session import POOLED, Device, last_line
from mest_compile.hardware.backend import BACKENDS
from mest_compile.hardware.target import Target
from mest_compile.ir.program import Functions

AHEAD = ("images", "labels")  # arrays that may be sent while the device computes with the ones before


class RemoteRunner:
    """A step's arrays and library on one device.

    library   what `linking` made: for the device's CPU, or for its CPU and its OpenCL driver
    programs  what `run` runs, by name: a program and the stages of it
    target    that all this was compiled for; the device must be one
    """

    def __init__(
        self,
        device: Device,
        library: bytes,
        programs: Functions,
        threads: int,
        target: Target,
    ):
        from mest_compile.devices.probe import check

        kind = target.device
        self._programs = dict(programs)
        self._kinds = dict.fromkeys((kind, "cpu"))  # a machine needs a processor beside another device
        self._functions: dict[str, Any] = {}
        self._machines: dict[str, Any] = {}
        self._modules: dict[str, Any] = {}
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
                self._load(programs, library)
                self._session.rpc.get_function("runtime.config_threadpool")(1, threads)
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
        if name not in self._ahead or self._ahead[name].shape[0] != flat.size:
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

    def extend(self, programs: Functions, library: bytes) -> None:
        """Lets `run` run more, of the same arrays and in the same memory. library: with it."""
        with self._told("a step of fewer examples cannot be loaded"):
            self._load(programs, library)
        self._programs |= programs

    def forget(self, functions: Iterable[str]) -> None:
        """Lets go of what `extend` brought."""
        for name in functions:
            for held in (self._programs, self._functions, self._machines, self._modules, self._arguments):
                held.pop(name, None)

    def _load(self, programs: Functions, library: bytes) -> None:
        """Sends a library and makes a machine of it."""
        remote = self._session.rpc
        # servers may share a folder, and nobody writes into what another one runs
        name = f"step.{secrets.token_hex(8)}.so"
        remote.upload(bytearray(library), name)
        self.uploaded_bytes += len(library)
        module = remote.load_module(name)
        remote.remove(name)
        machine = module["vm_load_executable"]()
        machine["vm_initialization"](
            *(fact for each in self._kinds for fact in (BACKENDS.find(each).device_type, 0, POOLED))
        )
        self._modules |= dict.fromkeys(programs, module)
        self._machines |= dict.fromkeys(programs, machine)
        self._functions |= {name: machine[name] for name in programs}

    def seconds(self, function: str, repeats: int) -> list[float]:
        """Of each of `repeats` runs by the device's own clock, after one that is not counted; the device's `early` must
        be off."""
        self.run(function)
        with self._told(f"{function} cannot be timed"):
            timed = self._machines[function].time_evaluator(function, self._device, number=1, repeat=repeats)(
                *self._arguments[function]
            )
        return list(map(float, timed.results))

    def profile(self, function: str, repeats: int) -> dict[str, float]:
        raise DeviceError(
            "a step on another device cannot be profiled call by call; tune or analyze its kernels instead"
        )

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
            raise DeviceError(
                f"device {device}: {what}: {last_line(problem)}. Is the target that of the device?"
            ) from problem
        except BaseException:  # Ctrl-C in the middle of a packet, or of an answer, which the next question would get
            self.close()
            raise

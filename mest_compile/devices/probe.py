"""What a device says about itself: its CPU, and whether it is emulated.

Any TVM RPC server can be asked: a kernel reads the device's files.
"""

from __future__ import annotations

import secrets
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import DeviceLost, MestError, TargetError
from mest_compile.devices.session import Device, Session, last_line
from mest_compile.hardware.cpu import cpu_features, lacking_in, machine_model
from mest_compile.hardware.host import BOARD, CPUINFO
from mest_compile.hardware.target import Target, needed_features
from mest_compile.kernels.linking import link_kernel, triple_of
from mest_compile.kernels.source import KernelSource

KERNEL = Path("/sys/devices/system/cpu/modalias")  # begins with the architecture of the running kernel
MOST_BYTES = 65536
SYSTEM_CALLS = ("open", "read", "close")
CLOCK = "mest.clock"  # a function of devices whose timer counts something else than time; it gives what
READER = f"""
@T.prim_func
def kernel(path: T.Buffer((64,), "uint8"), content: T.Buffer(({MOST_BYTES},), "uint8"), size: T.Buffer((2,), "int32")):
    T.func_attr({{"tirx.noalias": True}})
    size[0] = T.call_extern("int32", "open", path.data, 0)
    size[1] = 0
    for _ in T.serial(64):
        size[1] = size[1] + T.max(0, T.call_extern(
            "int32", "read", size[0], T.address_of(content[T.min(size[1], {MOST_BYTES - 1})]),
            {MOST_BYTES - 1} - size[1]
        ))
    T.evaluate(T.call_extern("int32", "close", size[0]))
"""
_ARM = ("aarch64", "arm")


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """cpu       `records.machine_model`: of an emulated device that of the machine behind it; "" where it tells nothing
    features  of the CPU, as the kernel lists them
    emulated  its kernel runs on another architecture than our code did
    clock     what its timer counts; "": time
    gpu       name of the OpenCL device that was asked for
    """

    cpu: str
    features: frozenset[str]
    emulated: bool
    clock: str = ""
    gpu: str = ""

    @property
    def machine(self) -> str:
        """Whose times its times are, for records."""
        named = ", ".join(filter(None, (self.gpu, self.cpu))) or "a device that does not say what it is"
        return f"emulated on {named}" if self.emulated else named

    def lacks(self, target: Target) -> list[str]:
        """Features that code for the target may use and the device does not have, so far as it can be told."""
        known = self.features and not self.emulated
        return lacking_in(needed_features(target), self.features) if known else []


def check(session: Session, target: Target) -> DeviceFacts:
    """What the device of a session is. Raises TargetError when it is not one that the target describes, DeviceLost when
    it is gone."""
    device = session.device
    gpu = "" if target.gpu is None else str(session.place(target.device).device_name)
    try:
        facts = replace(_ask(session.rpc, target), gpu=gpu)
    except MestError:
        raise
    except Exception as problem:  # of TVM's many types
        if (lost := session.lost()) is not None:
            raise DeviceLost(
                f"device {device} is lost: {lost}; does it run code for target {target.name!r}?"
            ) from problem
        raise TargetError(
            f"device {device} does not run code for target {target.name!r}; choose the device's own target. It said: "
            f"{last_line(problem)}"
        ) from problem
    if target.gpu and (target.gpu.name or "").lower() not in gpu.lower():
        raise TargetError(
            f"device {device} serves the GPU {gpu!r}, target {target.name!r} asks for one named "
            f"{target.gpu.name!r}; serve "
            "that one, or change gpu.name in the target's file"
        )
    if lacking := facts.lacks(target):
        raise TargetError(
            f"device {device} is {facts.cpu or 'unknown'} and lacks {', '.join(lacking)}, which code for target "
            f"{target.name!r} may use; choose the device's own target"
        )
    return facts


def machine_of(device: Device, target: Target) -> str:
    """Which machine, as records name it, a device is. Raises TargetError, DeviceError."""
    session = device.open()
    try:
        return check(session, target).machine
    finally:
        session.close()


def _ask(session: Any, target: Target) -> DeviceFacts:
    """session: TVM's own. Raises what TVM does when the device does not run code for the target."""
    symbol, library = _reader(target)
    name = f"probe.{secrets.token_hex(8)}.so"
    session.upload(bytearray(library), name)
    read = session.load_module(name)[symbol]
    session.remove(name)
    cpuinfo, kernel, board = (_read(session, read, str(path)) for path in (CPUINFO, KERNEL, BOARD))
    try:
        clock = str(session.get_function(CLOCK)())
    except (AttributeError, RuntimeError, ValueError):  # TVM's ways to say that there is none
        clock = ""
    model = machine_model(cpuinfo, board)
    return DeviceFacts(
        model, frozenset(cpu_features(cpuinfo)), is_emulated(triple_of(target.processor)[0], cpuinfo, kernel), clock
    )


def is_emulated(architecture: str, cpuinfo: str, kernel: str) -> bool:
    """Whether code of that architecture ran on a machine whose files are those of another. ARM runs 32-bit code on
    64-bit kernels."""
    if kernel.startswith("cpu:type:"):
        arm = kernel.startswith("cpu:type:aarch64") or kernel.startswith("cpu:type:arm")
    elif cpuinfo:
        arm = "CPU implementer" in cpuinfo
    else:
        return False
    return arm != (architecture in _ARM)


@cache
def _reader(target: Target) -> tuple[str, bytes]:
    """(symbol, library) of a kernel that reads a file, for the target's processor."""
    source = KernelSource("probe", READER, target.processor)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "probe.so"
        link_kernel(source, made, SYSTEM_CALLS)
        return source.symbol, made.read_bytes()


def _read(session: Any, read: Any, path: str) -> str:
    from tvm import runtime

    device = session.cpu(0)
    arrays = [
        np.frombuffer(path.encode().ljust(64, b"\0"), np.uint8),
        np.zeros(MOST_BYTES, np.uint8),
        np.zeros(2, np.int32),
    ]
    there = [runtime.tensor(array, device) for array in arrays]
    read(*there)
    return there[1].numpy()[: there[2].numpy()[1]].tobytes().decode(errors="replace")

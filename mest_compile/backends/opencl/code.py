"""Kernel text to OpenCL C with all that launching it takes: which arguments in which order, how many work-groups, which
scratch memory.

TVM splits a kernel's text into device kernels and a host function that launches them; the launches are read from that
function, so they are of the same build as the code. What comes out is plain data: the machine that runs it needs no
TVM.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mest_compile.base.errors import BuildError
from mest_compile.hardware.target import Gpu, Target
from mest_compile.ir.layouts.layout import ITEM_BYTES
from mest_compile.ir.program import Program
from mest_compile.kernels.reader import parse

_LOCAL = re.compile(r"^\s*__local (\w+?)(\d*) (\w+)\[(\d+)\];", re.MULTILINE)
_SCALAR_BYTES = {"float": 4, "int": 4, "uint": 4, "uchar": 1, "char": 1, "half": 2, "short": 2}
_AXES = ("x", "y", "z")


@dataclass(frozen=True, slots=True)
class Launch:
    """One device kernel.

    name         of the OpenCL kernel
    arguments    names of parameters, scratch buffers and symbols, in its order
    groups, threads  work-groups, and threads of one, along x, y, z
    local_bytes  local memory of a work-group
    """

    name: str
    arguments: tuple[str, ...]
    groups: tuple[int, int, int]
    threads: tuple[int, int, int]
    local_bytes: int


@dataclass(frozen=True, slots=True)
class Scratch:
    """Global memory that the launches of one call share: `unit_bytes` bytes, times the value of `symbol` where there is
    one."""

    name: str
    symbol: str
    unit_bytes: int

    def size_bytes(self, symbols: dict[str, int]) -> int:
        return self.unit_bytes * (symbols[self.symbol] if self.symbol else 1)


@dataclass(frozen=True, slots=True)
class OpenclKernel:
    """A kernel call as launches, which run in order.

    source      OpenCL C of all launches
    parameters  names of the call's buffers, in the call's order
    symbols     name of a size that is only known when the kernel runs -> position of the parameter that has so many
                elements
    """

    source: str
    launches: tuple[Launch, ...]
    parameters: tuple[str, ...]
    symbols: dict[str, int]
    scratch: tuple[Scratch, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> OpenclKernel:
        facts = json.loads(text)
        launches = tuple(
            Launch(
                each["name"],
                tuple(each["arguments"]),
                tuple(each["groups"]),
                tuple(each["threads"]),
                each["local_bytes"],
            )
            for each in facts["launches"]
        )
        return cls(
            facts["source"],
            launches,
            tuple(facts["parameters"]),
            facts["symbols"],
            tuple(Scratch(**each) for each in facts["scratch"]),
        )


def compile_opencl(text: str, symbol: str, target: Target) -> OpenclKernel:
    """The kernel of a TVMScript text; its OpenCL functions are named `symbol` + "_kernel...". Raises what TVM does,
    BuildError."""
    import tvm

    function = parse(text, symbol)
    split = _Split({symbol: function}, target)
    scratch = _scratch(str(function.attrs["mest.scratch"]))
    names = tuple(str(parameter.name) for parameter in function.params)
    sizes = [parameter.shape[0] for parameter in function.params]
    symbols = {str(size.name): position for position, size in enumerate(sizes) if isinstance(size, tvm.tirx.Var)}
    found = OpenclKernel(split.source, split.launches(symbol), names, symbols, scratch)
    known = {*names, *symbols, *(each.name for each in scratch)}
    for launch in found.launches:
        strange = [name for name in launch.arguments if name not in known]
        assert not strange, f"{launch.name} takes {strange}, which nobody gives it"
    return found


def compile_opencl_library(texts: Mapping[str, str], target: Target) -> Any:
    """A TVM module of several kernels, {symbol: TVMScript text}, for a device whose TVM runtime has OpenCL: what
    launches them is compiled for the device's CPU, their OpenCL C is kept in the library and compiled by the device's
    driver. Raises what TVM does, BuildError.
    """
    split = _Split({symbol: parse(text, symbol) for symbol, text in texts.items()}, target)
    for symbol in texts:
        split.launches(symbol)  # refuses what exceeds the limits
    return split.library()


class _Split:
    """Functions, split by TVM into OpenCL code and what launches it. source: the OpenCL C of all of them."""

    def __init__(self, functions: Mapping[str, Any], target: Target):
        import sys

        import tvm

        self._target = target
        self._device = device = tvm.target.Target({**target.tvm_fields, "host": target.processor.tvm_fields})
        # By name: the pipeline that TVM 0.27 takes for Adreno is about textures, which no kernel here uses, and has no
        # part for the device.
        prepare, self._finish_host, finish_device = tvm.tirx.get_tir_pipeline("s_tir")
        with tvm.transform.PassContext(
            config={"tirx.disable_cse_tir": True}
        ):  # it would compute arguments of launches on the host
            module = prepare(tvm.tirx.transform.BindTarget(device)(tvm.IRModule(dict(functions))))
        self._building = sys.modules["tvm.tirx.build"]  # the package has a function of the same name
        self._host, devices = self._building.split_host_device_mods(module)
        (code,) = (finish_device()(each) for each in devices.values())
        self._parameters = {
            str(each.attrs["global_symbol"]): [str(p.name).removesuffix("_ptr") for p in each.params]
            for each in code.functions.values()
        }
        self._code = self._building.codegen_build(code, device)
        self.source = str(self._code.inspect_source())

    def launches(self, symbol: str) -> tuple[Launch, ...]:
        """Of one function, in order. Raises BuildError where one exceeds the target's limits."""
        found = tuple(_launch(call, self._parameters, self.source) for call in _calls(self._host[symbol].body))
        for launch in found:
            check_limits(launch, self._target.limits, self._target.name)
        return found

    def library(self) -> Any:
        """A TVM module: compiled code that launches, with the OpenCL C."""
        import tvm

        # Without its checks of arguments: a kernel may read as float4 what the step holds as float.
        with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
            library = self._building.codegen_build(self._finish_host()(self._host), self._device.host)
        library.import_module(self._code)
        return library


def check_limits(launch: Launch, gpu: Gpu, target: str) -> None:
    """Raises BuildError when a launch needs more than the device has."""
    threads = math.prod(launch.threads)
    if threads > gpu.most_threads:
        raise BuildError(
            f"kernel {launch.name} has work-groups of {threads} threads; {target} allows {gpu.most_threads}: choose a "
            "schedule with fewer, or correct gpu.most_threads in the target's file"
        )
    if launch.local_bytes > gpu.local_bytes:
        raise BuildError(
            f"kernel {launch.name} needs {launch.local_bytes} bytes of local memory; {target} has "
            f"{gpu.local_bytes}: choose a "
            "schedule that needs less, or correct gpu.local_bytes in the target's file"
        )


def check_buffers(programs: Iterable[Program], target: Target) -> None:
    """Raises BuildError when a buffer whose size is known, or a slot of the arena, is larger than the device's buffers
    may be."""
    for program in programs:
        held = {
            buffer.name: buffer.elems * ITEM_BYTES[buffer.dtype]
            for buffer in program.held()
            if buffer.elems is not None
        }
        for name, size in [
            *held.items(),
            *((f"activations {number}", size) for number, size in enumerate(program.slots)),
        ]:
            if size > target.limits.most_buffer_bytes:
                raise BuildError(
                    f"buffer {name} has {size} bytes; {target.name} allows {target.limits.most_buffer_bytes}: "
                    "use a smaller "
                    "batch, or correct gpu.most_buffer_bytes in the target's file"
                )


def _scratch(facts: str) -> tuple[Scratch, ...]:
    """From the attribute that the schedules' text carries: "name symbol bytes, ...", symbol "-" where there is none."""
    found = []
    for entry in filter(None, facts.split(", ")):
        name, symbol, unit_bytes = entry.split()
        found.append(Scratch(name, symbol.removeprefix("-"), int(unit_bytes)))
    return tuple(found)


def _calls(statement: Any) -> list[Any]:
    """The kernel launches of a host function, in order."""
    if hasattr(statement, "seq"):
        return [call for each in statement.seq for call in _calls(each)]
    if hasattr(statement, "body"):
        return _calls(statement.body)
    value = getattr(statement, "value", None)
    return [value] if value is not None and "call_ffi_kernel" in str(getattr(value, "op", "")) else []


def _launch(call: Any, parameters: dict[str, list[str]], source: str) -> Launch:
    name, rest = str(call.args[0].value), list(call.args[1:])
    arguments = parameters[name]
    tags = [str(tag) for tag in call.attrs["launch_params"]]
    sizes = dict(zip(tags, (int(each) for each in rest[len(arguments) :]), strict=True))
    groups, threads = (tuple(sizes.get(f"{kind}.{axis}", 1) for axis in _AXES) for kind in ("blockIdx", "threadIdx"))
    body = source[source.index("{", _definition(source, name)) :]
    body = body[: body.index("\n}")]
    local_bytes = sum(
        _SCALAR_BYTES[kind] * int(lanes or 1) * int(elems) for kind, lanes, _, elems in _LOCAL.findall(body)
    )
    return Launch(name, tuple(arguments), groups, threads, local_bytes)  # type: ignore[arg-type]


def _definition(source: str, name: str) -> int:
    found = re.search(rf"__kernel void (?:__attribute__\S* )?{name}\([^)]*\) \{{", source)
    assert found, f"no definition of {name} in its source"
    return found.start()

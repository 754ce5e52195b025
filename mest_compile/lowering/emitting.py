"""Programs to a Relax module: one function a program, its arena as storages, its kernels called by name.

Kernels are looked up by name when a virtual machine is made, so one of them is exchanged without building the module
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mest_compile.ir.program import Buffer, Program, Stage

_TEXT = Path(__file__).read_text(encoding="utf-8")


def emit(
    functions: Mapping[str, tuple[Program, tuple[Stage, ...]]],
    symbol: Callable[[Program, str], str],
    arena: str | None = None,
) -> Any:
    """An IRModule with a function for each name: the program's calls of the given stages.

    symbol  (program, call name) -> name under which the machine finds the call's kernel
    arena   a name: beside the functions stands "arena", which shows all storages to the function of that name, as the
            allocator hands the same ones out again
    A function takes the program's held buffers (`Program.held()`) in order, each flat, writes its results into them,
    and returns 0, which unlike an object needs no releasing at the far end of a link. TVM keeps one stack of builders
    for all threads: whoever calls this holds `exclusive.COMPILER`.
    """
    from tvm import relax

    builder = relax.BlockBuilder()
    for name, (program, stages) in functions.items():
        held = program.held()
        variables = {
            buffer: relax.Var(f"b{i}", relax.TensorType(ndim=1, dtype=buffer.dtype)) for i, buffer in enumerate(held)
        }
        with builder.function(name, list(variables.values()), pure=False):
            known: dict[Buffer, Any] = dict(variables)
            storages = [
                builder.emit(relax.op.memory.alloc_storage(relax.ShapeExpr([size]), 0, "global", "uint8"))
                for size in program.slots
            ]
            for call in program.calls:
                if call.stage not in stages:
                    continue
                _place(call.buffers, known, storages, program, builder)
                builder.emit(
                    relax.Call(
                        relax.ExternFunc(symbol(program, call.name)),
                        [known[b] for b in call.buffers],
                        ty_args=[relax.TupleType([])],
                    )
                )
            builder.emit_func_output(relax.prim_value(0))
    if arena is None:
        return builder.finalize()
    with builder.function("arena", [], pure=False):
        slots = next(program.slots for program, _ in functions.values())  # all have the same
        storages = [
            builder.emit(relax.op.memory.alloc_storage(relax.ShapeExpr([size]), 0, "global", "uint8")) for size in slots
        ]
        views = [
            builder.emit(relax.op.memory.alloc_tensor(storage, 0, relax.ShapeExpr([size]), "uint8"))
            for storage, size in zip(storages, slots)
        ]
        builder.emit(relax.Call(relax.ExternFunc(arena), views, ty_args=[relax.TupleType([])]))
        builder.emit_func_output(relax.prim_value(0))
    return builder.finalize()


def _place(buffers: Iterable[Buffer], known: dict[Buffer, Any], storages: list, program: Program, builder: Any) -> None:
    """Emits the view of each temporary buffer into the arena, when it is first used."""
    from tvm import relax

    for buffer in buffers:
        if buffer not in known:
            slot, offset = program.places[buffer]
            known[buffer] = builder.emit(
                relax.op.memory.alloc_tensor(storages[slot], offset, relax.ShapeExpr([buffer.elems]), buffer.dtype)
            )


def said_of(
    functions: Mapping[str, tuple[Program, tuple[Stage, ...]]],
    symbol: Callable[[Program, str], str],
    arena: str | None = None,
) -> list[Any]:
    """All that decides what `emit` gives, ready for JSON: the same is the same module."""
    found: list[Any] = [_TEXT, arena]
    for name, (program, stages) in functions.items():
        held = program.held()
        numbers = {buffer: number for number, buffer in enumerate(held)}

        def place(buffer: Buffer, numbers: Mapping[Buffer, int] = numbers, program: Program = program) -> Any:
            return numbers[buffer] if buffer.held else [*program.places[buffer], buffer.elems, buffer.dtype]

        calls = [
            [symbol(program, call.name), *map(place, call.buffers)] for call in program.calls if call.stage in stages
        ]
        found.append([name, [buffer.dtype for buffer in held], program.slots, calls])
    return found


def kernel_name(prefix: str, program: Program, call_name: str) -> str:
    """The global name under which a call finds its kernel."""
    return f"{prefix}.{program.name}.{call_name}"

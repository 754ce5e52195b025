"""Parameter updates on a CPU, for any number of parameters."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.operators.optimizers.sgd import CopyValues, Sgd, SgdUnits
from mest_compile.schedules.cpu.rows import UNROLL, Text

CHUNK_ELEMS = 4096  # of each array, 48 KiB in all: what a thread takes at a time, still in L2 when a unit's values are copied


def _start(handles: dict[str, tuple[str, str]], symbol: str) -> Text:
    """A kernel whose arguments are name -> (size, dtype), sizes in terms of `symbol`."""
    text = Text(*(f"{name}_handle: T.handle" for name in handles))
    text(f"{symbol} = T.int32()")
    text(*(f'{name} = T.match_buffer({name}_handle, ({size},), "{dtype}")' for name, (size, dtype) in handles.items()))
    text("lr: T.let = hyper[0]", "share: T.let = hyper[1]", "decay: T.let = hyper[2]", "nesterov: T.let = hyper[3]")
    return text


def _update(text: Text, at: str) -> None:
    gradient = f"(gradients[{at}] + decay * values[{at}])"
    text(f"momentum[{at}] = share * momentum[{at}] + {gradient}",
         f"values[{at}] = values[{at}] - lr * T.Select(nesterov > T.float32(0), {gradient} + share * momentum[{at}], momentum[{at}])")


def _update_chunk(text: Text, vector: int, elems: int) -> None:
    """Elements `chunk * elems` up to the next chunk's; elems is a multiple of vector."""
    unroll = UNROLL if elems % (UNROLL * vector) == 0 else 1
    with text.nest(f"for t in T.serial({elems // (unroll * vector)})", f"for j in T.unroll({unroll})", f"for i in T.vectorized({vector})"):
        _update(text, f"chunk * {elems} + t * {unroll * vector} + j * {vector} + i")


@schedule("optimizer.sgd", device="cpu")
def sgd(problem: Sgd, target: Target) -> str:
    text = _start({name: ("n", "float32") for name in ("values", "gradients", "momentum")} | {"hyper": ("4", "float32")}, "n")
    with text.nest(f"if n >= {CHUNK_ELEMS}", f"for chunk in T.parallel(n // {CHUNK_ELEMS})"):
        _update_chunk(text, target.vector, CHUNK_ELEMS)
    with text.nest(f"for e in T.serial(n % {CHUNK_ELEMS})"):
        text(f"at: T.let = n // {CHUNK_ELEMS} * {CHUNK_ELEMS} + e")
        _update(text, "at")
    return str(text)


@schedule("optimizer.sgd_units", device="cpu")
def sgd_units(problem: SgdUnits, target: Target) -> str:
    """Updates a chunk of units, then copies their values from the cache."""
    size = problem.source_block * problem.row_block
    units = -(-CHUNK_ELEMS // (size * target.vector)) * target.vector  # whole vectors, whatever the unit's size
    elems = (f"units * {size}", "float32")
    text = _start({"values": elems, "gradients": elems, "momentum": elems, "hyper": ("4", "float32"),
                   "permutation": ("units", "int32"), "transposed": elems}, "units")

    def copy(unit: str) -> None:
        with text.nest(f"for j in T.unroll({problem.row_block})", f"for k in T.unroll({problem.source_block})"):
            text(f"transposed[permutation[{unit}] * {size} + j * {problem.source_block} + k] = "
                 f"values[{unit} * {size} + k * {problem.row_block} + j]")

    with text.nest(f"if units >= {units}", f"for chunk in T.parallel(units // {units})"):
        _update_chunk(text, target.vector, units * size)
        with text.nest(f"for u in T.serial({units})"):
            copy(f"(chunk * {units} + u)")
    with text.nest(f"for u in T.serial(units % {units})"):
        text(f"unit: T.let = units // {units} * {units} + u")
        with text.nest(f"for e in T.serial({size})"):
            text(f"at: T.let = unit * {size} + e")
            _update(text, "at")
        copy("unit")
    return str(text)


@schedule("optimizer.copy", device="cpu")
def copy_values(problem: CopyValues, target: Target) -> str:
    text = Text("values_handle: T.handle", "places_handle: T.handle", "copies_handle: T.handle")
    text("n = T.int32()", "m = T.int32()", 'values = T.match_buffer(values_handle, (n,), "float32")',
         'places = T.match_buffer(places_handle, (m,), "int32")', 'copies = T.match_buffer(copies_handle, (m,), "float32")')
    with text.nest("for i in T.serial(m)"):
        text("copies[i] = values[places[i]]")
    return str(text)

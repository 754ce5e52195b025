"""Parameter updates on OpenCL, for any number of parameters."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.operators.optimizers.sgd import CopyValues, Sgd, SgdUnits
from mest_compile.schedules.opencl.sums import ENOUGH_GROUPS
from mest_compile.schedules.opencl.text import Text


def _start(sizes: dict[str, tuple[str, str]], symbol: str) -> Text:
    text = Text(*(f"{name}_handle: T.handle" for name in sizes))
    text.symbolic(symbol, sizes)
    return text


def _update(text: Text) -> None:
    """Parameter n."""
    text("lr: T.let = hyper[0]", "share: T.let = hyper[1]", "decay: T.let = hyper[2]", "nesterov: T.let = hyper[3]")
    text.private("gradient", 1)
    text.private("moved", 1)
    text("gradient[0] = gradients[n] + decay * values[n]", "moved[0] = share * momentum[n] + gradient[0]", "momentum[n] = moved[0]",
         "values[n] = values[n] - lr * T.Select(nesterov > T.float32(0), gradient[0] + share * moved[0], moved[0])")


@schedule("optimizer.sgd", device="opencl")
def sgd(problem: Sgd, target: Target) -> str:
    text = _start({name: ("n_values", "float32") for name in ("values", "gradients", "momentum")} | {"hyper": ("4", "float32")}, "n_values")
    with text.each_of("n_values", ENOUGH_GROUPS, target.limits.threads):
        _update(text)
    return str(text)


@schedule("optimizer.sgd_units", device="opencl")
def sgd_units(problem: SgdUnits, target: Target) -> str:
    """A thread for each weight, which also puts the new value where the input gradient reads it."""
    size = problem.source_block * problem.row_block
    elems = (f"units * {size}", "float32")
    text = _start({"values": elems, "gradients": elems, "momentum": elems, "hyper": ("4", "float32"),
                   "permutation": ("units", "int32"), "transposed": elems}, "units")
    with text.each_of(f"(units * {size})", ENOUGH_GROUPS, target.limits.threads):
        _update(text)
        text(f"k: T.let = n % {size} // {problem.row_block}", f"j: T.let = n % {problem.row_block}",
             f"transposed[permutation[n // {size}] * {size} + j * {problem.source_block} + k] = values[n]")
    return str(text)


@schedule("optimizer.copy", device="opencl")
def copy_values(problem: CopyValues, target: Target) -> str:
    text = Text("values_handle: T.handle", "places_handle: T.handle", "copies_handle: T.handle")
    text.symbolic("n_values", {"values": ("n_values", "float32")})
    text.symbolic("n_copies", {"places": ("n_copies", "int32"), "copies": ("n_copies", "float32")})
    with text.each_of("n_copies", ENOUGH_GROUPS, target.limits.threads):
        text("copies[n] = values[places[n]]")
    return str(text)

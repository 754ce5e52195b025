"""A layer's values in another order, on OpenCL, for any number of them."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.operators.layers.turning import CopyValues, TurnUnits
from mest_compile.schedules.opencl.sums import ENOUGH_GROUPS
from mest_compile.schedules.opencl.text import DeviceText


@schedule("values.turn", device="opencl")
def turn_units(problem: TurnUnits, target: Target) -> str:
    """A thread for each weight."""
    size = problem.source_block * problem.row_block
    text = DeviceText(*(f"{name}_handle: T.handle" for name in ("values", "permutation", "turned")))
    text.symbolic("units", {"values": (f"units * {size}", "float32"), "permutation": ("units", "int32")})
    text.symbolic("n_turned", {"turned": ("n_turned", "float32")})
    with text.each_of(f"(units * {size})", ENOUGH_GROUPS, target.limits.threads):
        text(
            f"k: T.let = n % {size} // {problem.row_block}",
            f"j: T.let = n % {problem.row_block}",
            f"turned[permutation[n // {size}] * {size} + j * {problem.source_block} + k] = values[n]",
        )
    return str(text)


@schedule("values.copy", device="opencl")
def copy_values(problem: CopyValues, target: Target) -> str:
    text = DeviceText(*(f"{name}_handle: T.handle" for name in ("values", "places", "copies")))
    text.symbolic("n_values", {"values": ("n_values", "float32")})
    text.symbolic("n_places", {"places": ("n_places", "int32")})
    text.symbolic("n_copies", {"copies": ("n_copies", "float32")})
    with text.each_of("n_places", ENOUGH_GROUPS, target.limits.threads):
        text("copies[n] = values[places[n]]")
    return str(text)

"""Parameter updates on OpenCL, for any number of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mest_compile.hardware.target import Target
from mest_compile.ir.infix import written
from mest_compile.kernels.source import schedule
from mest_compile.operators.optimizers.optimizer import OPTIMIZERS, CopyValues, Update, UpdateUnits
from mest_compile.schedules.opencl.sums import ENOUGH_GROUPS
from mest_compile.schedules.opencl.text import DeviceText, number


def _start(
    rule: str, elems: str, symbol: str, others: Mapping[str, tuple[str, str]] = MappingProxyType({})
) -> DeviceText:
    """A kernel of `elems` values in terms of `symbol`. others: its arguments after `hyper`, name -> (size, dtype)."""
    kind = OPTIMIZERS.find(rule)
    sizes = dict.fromkeys(("values", "gradients", *kind.state), (elems, "float32"))
    sizes |= {"hyper": (str(len(kind.scalars)), "float32"), **others}
    text = DeviceText(*(f"{name}_handle: T.handle" for name in sizes))
    text.symbolic(symbol, sizes)
    return text


def _update(text: DeviceText, rule: str) -> None:
    """Parameter n. What the formula names itself is private."""
    kind = OPTIMIZERS.find(rule)
    text(*(f"{name}: T.let = hyper[{place}]" for place, name in enumerate(kind.scalars)))
    arrays = {name: f"{name}[n]" for name in ("values", "gradients", *kind.state)}
    own = {name: f"{name}[0]" for name in kind.formula if name not in arrays}
    for name in own:
        text.private(name, 1)
    names = {**arrays, **own, **{name: name for name in kind.scalars}}
    text(*(f"{names[name]} = {written(expression, names, number)}" for name, expression in kind.formula.items()))


@schedule("optimizer.update", device="opencl")
def update(problem: Update, target: Target) -> str:
    text = _start(problem.rule, "n_values", "n_values")
    with text.each_of("n_values", ENOUGH_GROUPS, target.limits.threads):
        _update(text, problem.rule)
    return str(text)


@schedule("optimizer.update_units", device="opencl")
def update_units(problem: UpdateUnits, target: Target) -> str:
    """A thread for each weight, which also puts the new value where the input gradient reads it."""
    size = problem.source_block * problem.row_block
    elems = f"units * {size}"
    text = _start(problem.rule, elems, "units", {"permutation": ("units", "int32"), "transposed": (elems, "float32")})
    with text.each_of(f"(units * {size})", ENOUGH_GROUPS, target.limits.threads):
        _update(text, problem.rule)
        text(
            f"k: T.let = n % {size} // {problem.row_block}",
            f"j: T.let = n % {problem.row_block}",
            f"transposed[permutation[n // {size}] * {size} + j * {problem.source_block} + k] = values[n]",
        )
    return str(text)


@schedule("optimizer.copy", device="opencl")
def copy_values(problem: CopyValues, target: Target) -> str:
    text = DeviceText("values_handle: T.handle", "places_handle: T.handle", "copies_handle: T.handle")
    text.symbolic("n_values", {"values": ("n_values", "float32")})
    text.symbolic("n_copies", {"places": ("n_copies", "int32"), "copies": ("n_copies", "float32")})
    with text.each_of("n_copies", ENOUGH_GROUPS, target.limits.threads):
        text("copies[n] = values[places[n]]")
    return str(text)

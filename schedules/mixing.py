"""Numbers drawn by whole numbers alone, on every kind of device: `operators.dropout.mixed` as statements."""

from __future__ import annotations

from collections.abc import Callable

from mest_compile.operators.dropout import DIGITS, FACTORS, SHIFTS


def drawn(place: str, key: str, whole: Callable[[int], str], product: Callable[[str, int], str]) -> list[str]:
    """Sets `bits`, DIGITS of them, of a place, all uint32.

    whole    a constant of the kernel's width
    product  of a value and a number, without what is above 32 bits
    """
    statements = [f"start: T.let = T.bitwise_xor({place}, {key})"]
    name = "start"
    for number, (shift, factor) in enumerate(zip(SHIFTS, (*FACTORS, None), strict=True)):
        shifted = f"T.bitwise_xor({name}, T.shift_right({name}, {whole(shift)}))"
        name = f"mixed_{number}"
        statements.append(f"{name}: T.let = {product(shifted, factor) if factor else shifted}")
    return [*statements, f"bits: T.let = T.shift_right({name}, {whole(32 - DIGITS)})"]

"""Where an element of a rearranged image comes from: an expression that both kinds of device take."""

from __future__ import annotations

from collections.abc import Mapping

from mest_compile.ir.arrangement import Axis


def place(numbers: Mapping[str, str], parts: Mapping[str, Axis], units: Mapping[str, int]) -> str:
    """Expression: how far from its first pixel an image's element is.

    numbers  {dimension of the image that is walked: number in it}; others are left out
    parts    {dimension of the image that is walked: parts of the other's}
    units    {dimension of the other: how far its neighbours are apart}
    """
    terms = []
    for dim, number in numbers.items():
        apart = 1
        for count, part in enumerate(reversed(parts[dim]), 1):
            digit = number if apart == 1 else f"{number} // {apart}"
            digit = digit if count == len(parts[dim]) else f"{digit} % {part.size}"
            terms.append(f"{digit} * {part.stride * units[part.dim]}")
            apart *= part.size
    return " + ".join(terms) or "0"

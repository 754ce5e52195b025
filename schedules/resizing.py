"""Where resized images take their pixels, as statements: the same on every kind of device."""

from __future__ import annotations

from collections.abc import Callable

from mest_compile.operators.resize import Resize


def taps(problem: Resize, axis: int, pixel: str, name: str, number: Callable[[float], str]) -> list[str]:
    """Sets, for a result's pixel of an axis, `<name>_first`; of linear ones also `<name>_second` and `<name>_share`.

    number  a float32 as the kind of device writes it
    """
    size, (before, scale, after) = problem.sizes(axis)[0], problem.place(axis)
    start = f'(T.cast({pixel}, "float32") + {number(before)})' if before else f'T.cast({pixel}, "float32")'
    lies = f"{start} * {number(scale)}" + (f" + {number(after)}" if after else "")
    if not problem.linear:
        nearest = f'T.max(T.min(T.cast(T.floor({lies}), "int32"), {size - 1}), 0)'
        return [f"{name}_first: T.let = {nearest}"]
    return [
        f"{name}_lies: T.let = T.max({lies}, T.float32(0))",
        f'{name}_first: T.let = T.min(T.cast(T.floor({name}_lies), "int32"), {size - 1})',
        f"{name}_second: T.let = T.min({name}_first + 1, {size - 1})",
        f'{name}_share: T.let = T.min({name}_lies - T.cast({name}_first, "float32"), T.float32(1))',
    ]


def reaching(problem: Resize, axis: int, pixel: str, number: Callable[[float], str]) -> tuple[str, str]:
    """(first, last) of a range with all of the result's pixels that take something of a pixel of the source."""
    (size, count), (before, scale, after) = problem.sizes(axis), problem.place(axis)
    if scale == 0 or size == 1:
        return "0", str(count - 1)

    def place(shift: int) -> str:
        """Of the result's pixel that lies `shift` pixels from this one."""
        return f'T.cast(T.floor(T.cast({pixel} + {shift}, "float32") * {number(1 / scale)}), "int32")'

    spare = int(abs(after) / scale + before) + 2  # pixels more than by scale alone, and those that rounding may move
    first, last = f"T.max({place(-1)} - {spare}, 0)", f"T.min({place(1)} + {spare}, {count - 1})"
    return first, f"T.Select({pixel} == {size - 1}, {count - 1}, {last})"

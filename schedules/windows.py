"""What kernels of every kind of device say of the windows of pools, as text."""

from __future__ import annotations

from collections.abc import Callable

from mest_compile.operators.pool import Pool


def corner_and_end(problem: Pool, axis: int, number: str) -> tuple[str, str]:
    """(first pixel, the one behind the last) of window `number` of an axis, within the image; 0 is y."""
    size, count = problem.sizes[axis], problem.counts[axis]
    if problem.kernel is None:
        return f"{number} * {size} // {count}", f"(({number} + 1) * {size} + {count - 1}) // {count}"
    kernel, stride, padding = problem.kernel[axis], problem.stride[axis], problem.padding[axis]
    first, end = f"{number} * {stride}", f"{number} * {stride} + {kernel - padding}"
    return f"T.max({first} - {padding}, 0)" if padding else first, f"T.min({end}, {size})"


def most(problem: Pool, axis: int) -> int:
    """Pixels that a window has at most."""
    return problem.sizes[axis] if problem.kernel is None else problem.kernel[axis]


def holding(problem: Pool, axis: int, pixel: str) -> tuple[str, str]:
    """(first, last) of the windows that hold a pixel; the last may come before the first."""
    size, count = problem.sizes[axis], problem.counts[axis]
    if problem.kernel is None:
        return f"{pixel} * {count} // {size}", f"(({pixel} + 1) * {count} - 1) // {size}"
    kernel, stride, padding = problem.kernel[axis], problem.stride[axis], problem.padding[axis]
    first = f"T.max({pixel} + {padding + stride - kernel}, 0) // {stride}"
    return first, f"T.min(({pixel} + {padding}) // {stride}, {count - 1})"


def share(problem: Pool, pixels: tuple[str, str], sizes: tuple[str, str], number: Callable[[float], str]) -> str:
    """What each value of a mean counts. pixels: of the window; sizes: names of its own within the image."""
    counted = []
    for axis in (0, 1):
        if problem.kernel is None:
            counted.append(sizes[axis])
        elif problem.fits(axis) or (problem.count_include_pad and problem.overhang(axis) <= problem.end[axis]):
            counted.append(str(problem.kernel[axis]))
        elif problem.count_include_pad:
            left = problem.sizes[axis] + problem.end[axis] + problem.padding[axis]
            counted.append(f"T.min({problem.kernel[axis]}, {left} - {pixels[axis]} * {problem.stride[axis]})")
        else:
            counted.append(sizes[axis])
    if all(map(str.isdigit, counted)):
        return number(1 / (int(counted[0]) * int(counted[1])))
    return f'(T.float32(1) / T.cast({counted[0]} * {counted[1]}, "float32"))'

"""Which result pixels of a weight gradient pass over all units before the next ones, on a CPU."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.operators.layers.gather import GatherGrad
from mest_compile.schedules.cpu.tiles import largest_divisor

UNROLLED_COLUMNS = 8
ROW = 48  # pixels: 16 to 96 channels of 48x48 take 2.1 ms and not 3.5 with 4 x 8 (Zen 4)
SMALL_PIXELS = 64


def across_of(problem: GatherGrad) -> int:
    """Vectors of a row of result pixels."""
    return -(-problem.delta.width // problem.delta.abreast)


def pick_strip(problem: GatherGrad, shared: bool, target: Target) -> tuple[int, int]:
    """(rows, columns of vectors) of result pixels that pass over all units before the next strip.

    Where rows of a unit share what they read, all of a small image, else 4 x 8: more have to be fetched at once than
    the second-level cache holds with what is prefetched. Where they do not, what a unit reads should be in the
    first-level cache: 2 x 8, unless the images come from memory, which wants long strips.

    shared  whether a unit has several rows or channels
    """
    delta, source, across = problem.delta, problem.source, across_of(problem)
    if not any(source.halo):  # a pixel shares nothing with its neighbours, and long stretches of memory come faster
        return 1, largest_divisor(across, ROW)
    wide = largest_divisor(across, UNROLLED_COLUMNS)
    section_bytes = min(problem.section_channels, source.channels) * source.channel_elems * source.item_bytes
    if shared and delta.height * across <= SMALL_PIXELS:
        most = delta.height
    else:
        most = 4 if shared or section_bytes > target.l2_bytes else 2
        if delta.abreast > 1:  # rows are short: as many vectors
            most *= UNROLLED_COLUMNS // wide
    return largest_divisor(delta.height, most), wide


def is_at_once(problem: GatherGrad, strip: tuple[int, int]) -> bool:
    """Whether all pixels pass over each unit but once, so that nothing is kept between. (With a pixel a vector kernels
    are as records know them.)"""
    delta, (high, wide) = problem.delta, strip
    return delta.abreast > 1 and (delta.slices * delta.height, across_of(problem)) == (high, wide)

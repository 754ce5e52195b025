"""Which result pixels of a weight gradient pass over all units before the next ones, on a CPU."""

from __future__ import annotations

from math import prod

from mest_compile.hardware.target import Target
from mest_compile.operators.layers.gather import GatherGrad
from mest_compile.schedules.cpu.tiles import largest_divisor

UNROLLED_COLUMNS = 8
ROW = 48  # pixels: 16 to 96 channels of 48x48 take 2.1 ms and not 3.5 with 4 x 8 (Zen 4)
SMALL_PIXELS = 64
NEAR = 0.5  # share of the second-level cache that what all groups read may have beside what streams past it


def across_of(problem: GatherGrad) -> int:
    """Vectors of a row of result pixels."""
    return -(-problem.delta.width // problem.delta.abreast)


def pick_strip(problem: GatherGrad, shared: bool, target: Target) -> tuple[int, int]:
    """(rows, columns of vectors) of result pixels that pass over all units before the next strip.

    Where rows of a unit share what they read, all of a small image, else 4 x 8: more have to be fetched at once than
    the second-level cache holds with what is prefetched. Where they do not, what a unit reads should be in the
    first-level cache: 2 x 8, unless the images come from memory, which wants long strips. Without a halo whole rows,
    of small images several (all 36 pixels of 96 to 576 channels of 6x6: 1/1.5 of the time of one row; Zen 3).

    shared  whether a unit has several rows or channels
    """
    delta, source, across = problem.delta, problem.source, across_of(problem)
    if not any(source.halo):  # a pixel shares nothing with its neighbours, and long stretches of memory come faster
        wide = largest_divisor(across, ROW)
        row_bytes = prod(problem.source_step) * wide * source.floats * source.item_bytes
        near = int(NEAR * target.l2_bytes) // (min(problem.section_channels, source.channels) * row_bytes)
        return largest_divisor(delta.height, max(min(SMALL_PIXELS // wide, near), 1)), wide
    wide = largest_divisor(across, UNROLLED_COLUMNS)
    section_bytes = min(problem.section_channels, source.channels) * source.channel_elems * source.item_bytes
    if shared and delta.height * across <= SMALL_PIXELS:
        most = delta.height
    else:
        most = 4 if shared or section_bytes > target.l2_bytes else 2
        if delta.abreast > 1:  # rows are short: as many vectors
            most *= UNROLLED_COLUMNS // wide
    return largest_divisor(delta.height, most), wide


def is_at_once(problem: GatherGrad, strip: tuple[int, int], target: Target) -> bool:
    """Whether all pixels of all examples pass over each unit but once, so that its sums stay in registers: where they
    are one strip, or an image without a halo is, and what a section reads of all examples stays in the second-level
    cache, from where all groups have it (512 to 2048 channels of 4x4, 90% sparse: 1/1.4 of the time, and 7 MB less;
    Zen 3). What is stored in less than float32 keeps its sums."""
    delta, source = problem.delta, problem.source
    if strip != (delta.height, across_of(problem)):
        return False
    if delta.abreast > 1:  # with a pixel a vector and halos kernels are as records know them
        return delta.slices == 1 and source.dtype == "float32"
    read = min(problem.section_channels, source.channels) * delta.slices * prod(strip) * problem.source_step[1]
    near = read * source.vector * source.item_bytes <= NEAR * target.l2_bytes
    return near and source.dtype == "float32" and not any(source.halo)

"""What one core of this machine computes at most, measured: products and sums of registers alone."""

from __future__ import annotations

from time import process_time

import numpy as np

from mest_compile.hardware.target import BFLOAT16_LANES, Target, find_target
from mest_compile.hardware.tvmruntime import tensor
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import KernelSource
from mest_compile.kernels.text import Text
from mest_compile.schedules.cpu.pairs import dot

CHAINS = 12  # of sums, each of which waits for the one before: 2 instructions a cycle that take 4 want 8
TURNS, TIMES = 4_000_000, 7


def peak(activations: str) -> float:
    """Operations a second, 1e9/s, with activations of that type: of two-byte ones where instructions multiply pairs of
    them, else those of float32."""
    target = find_target("local").storing(activations)
    kernel = Builder.compile_here(KernelSource("peak", _text(target), target))
    lanes = _lanes(target)
    made = [
        tensor(2 * lanes, np.dtype("uint16")),
        *(tensor(size, np.dtype("float32")) for size in (lanes, CHAINS * lanes)),
    ]
    for array, _ in made:
        array[...] = 0
    seconds = []
    for _ in range(TIMES):
        begun = process_time()
        kernel(*(inside for _, inside in made))
        seconds.append(process_time() - begun)
    return CHAINS * TURNS * lanes * (4 if target.pairs else 2) / min(seconds) / 1e9


def _lanes(target: Target) -> int:
    """Sums of a register."""
    return BFLOAT16_LANES // 2 if target.pairs else target.vector


def _text(target: Target) -> str:
    lanes = _lanes(target)
    text = Text(
        f"words: T.Buffer(({2 * lanes},), 'uint16')",
        f"ones: T.Buffer(({lanes},), 'float32')",
        f"out: T.Buffer(({CHAINS * lanes},), 'float32')",
    )
    text.local("sums", CHAINS * lanes)
    places = [f"T.ramp({chain * lanes}, 1, {lanes})" for chain in range(CHAINS)]
    text(*(f"sums[{at}] = out[{at}]" for at in places))
    some, words = f"T.ramp(0, 1, {lanes})", f"words[T.ramp(0, 1, {2 * lanes})]"
    with text.nest(f"for turn in T.serial({TURNS})"):
        for at in places:
            if target.pairs:
                text(dot(lanes, f"sums[{at}]", words, f"T.reinterpret('uint32x{lanes}', ones[{some}])"))
            else:
                text(f"sums[{at}] = sums[{at}] * ones[{some}] + ones[{some}]")
    text(*(f"out[{at}] = sums[{at}]" for at in places))
    return str(text)

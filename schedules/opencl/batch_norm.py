"""Batch normalisation on OpenCL, without float64: sums go through trees, squares are of distances from a value close to
the mean."""

from __future__ import annotations

import numpy as np

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.activation import activation_of
from mest_compile.operators.batch_norm import (
    FAR,
    BatchNormBackward,
    BatchNormForward,
    BatchNormFrozen,
    BatchNormMoments,
    BatchNormRunning,
)
from mest_compile.schedules.opencl.sums import ChannelSums, add_exactly, fold, lane_of, tree
from mest_compile.schedules.opencl.text import (
    DeviceText,
    at,
    finite,
    full,
    image,
    infinity,
    number,
    only_examples,
    plane_vectors,
    rectified,
    scalars,
    spelled,
    vector_type,
    vectors,
    whole_groups,
    zeros,
)


@schedule("batch_norm.moments", device="opencl")
def batch_norm_moments(problem: BatchNormMoments, target: Target) -> str:
    return _moments_of_sums(problem, target) if problem.chunks else _moments_of_values(problem, target)


def _store_moments(text: DeviceText, problem: BatchNormMoments, c: str, mean: str, squares: str) -> None:
    """From the mean and the sum of squared distances from it."""
    channels, count = problem.z.channels, problem.count
    text(
        f"moments[{c}] = {mean}",
        f"moments[{channels} + {c}] = T.float32(1) / T.sqrt({squares} * {number(1 / count)} + {number(problem.eps)})",
        f"moments[{2 * channels} + {c}] = {squares} * {number(1 / (count - 1))}",
    )


def _moments_of_values(problem: BatchNormMoments, target: Target) -> str:
    """Two passes over a chunk: its mean, then distances from it; everything relative to the channel's first value, so
    that no digits are lost where the mean is large. Then a channel's chunks are joined (Chan, Golub and LeVeque, 1979).
    """
    layout, vector = problem.z, problem.z.vector
    cut = ChannelSums(layout, target)
    text = DeviceText(
        image("z", layout), scalars("moments", 3 * layout.channels), *flags(layout.channels, alive=problem.alive)
    )
    text.scratch("chunk_facts", layout.channels * cut.count * 4)
    living = "alive[c] != 0" if problem.alive else ""
    first = f"z[c * {plane_vectors(layout)} + {layout.halo[0] * layout.columns + layout.halo[1]}]"

    def distance(origin: str) -> str:
        return only_examples(
            layout, f"place // {layout.height * layout.width}", f"({at('z', layout)} - {full(origin, vector)})"
        )

    with text.groups(cut.size, layout.channels * cut.count):
        text.private("sums", 2, vector_type(vector))
        text.private("value", 1)
        text.private("middle", 1)
        text.shared(2, cut.size, vector_type(vector))
        text(
            f"c: T.let = block // {cut.count}",
            f"start: T.let = block % {cut.count} * {cut.share}",
            f"end: T.let = T.min(start + {cut.share}, {cut.vectors})",
        )
        behind = f"T.max(0, end - T.max(start, {(layout.slices - 1) * layout.height * layout.width}))"
        count = f'T.cast((end - start) * {vector} - {behind} * {layout.lanes - layout.batch}, "float32")'
        text(f"sums[0] = {zeros(vector)}")
        with text.nest(*([f"if {living}"] if living else [])):
            text(f"sums[0] = {first}")
        text(f"value[0] = {lane_of('sums[0]', 0, vector)}", f"value[0] = {finite('value[0]')}")
        cut.start(text, 2)
        cut.walk(text, lambda: [f"sums[0] = sums[0] + {distance('value[0]')}"], living)
        cut.share_out(text, 1)
        text(
            "sums[0] = shared_0[0]",
            f"middle[0] = value[0] + {fold('sums[0]', vector)} / {count}",
            f"middle[0] = {finite('middle[0]', 'value[0]')}",
        )
        text.barrier()
        cut.start(text, 2)
        cut.walk(
            text,
            lambda: [
                f"sums[0] = sums[0] + {distance('middle[0]')}",
                f"sums[1] = sums[1] + {distance('middle[0]')} * {distance('middle[0]')}",
            ],
            living,
        )
        cut.share_out(text, 2)
        with text.nest("if lane == 0"):
            text("sums[0] = shared_0[0]", "sums[1] = shared_1[0]")
            rest, squares = (fold(f"sums[{s}]", vector) for s in range(2))
            text(
                "chunk_facts[block * 4] = value[0]",
                f"chunk_facts[block * 4 + 1] = {count}",
                f"chunk_facts[block * 4 + 2] = (middle[0] - value[0]) + {rest} / {count}",
                f"chunk_facts[block * 4 + 3] = {rectified(f'({squares} - {rest} * {rest} / {count})', 1)}",
            )
    with text.each(layout.channels, target.limits.threads):
        text.private("mean", 1)
        text.private("squares", 1)
        text("mean[0] = T.float32(0)", "squares[0] = T.float32(0)")
        fact = f"chunk_facts[(n * {cut.count} + k) * 4 + "
        with text.nest(f"for k in T.serial({cut.count})"):
            text(f"mean[0] = mean[0] + {fact}2] * ({fact}1] * {number(1 / problem.count)})")
        with text.nest(f"for k in T.serial({cut.count})"):
            text(f"squares[0] = squares[0] + {fact}3] + {fact}1] * ({fact}2] - mean[0]) * ({fact}2] - mean[0])")
        _store_moments(text, problem, "n", f"chunk_facts[n * {cut.count * 4}] + mean[0]", "squares[0]")
    return str(text)


def _moments_of_sums(problem: BatchNormMoments, target: Target) -> str:
    """Joins the sums that a convolution left in its epilogue: a lane of a row has a mean and a sum of squared distances
    of its own. Where the channel's mean is far from 0, distances of z from it decide.
    """
    layout, vector, chunks = problem.z, problem.z.vector, problem.chunks
    width, channels = problem.count // (chunks * vector), layout.channels
    text = DeviceText(
        vectors("statistics", chunks * 2 * channels * vector, vector),
        image("z", layout),
        scalars("moments", 3 * channels),
        *flags(channels, alive=problem.alive),
    )
    living = ["alive[block] != 0"] if problem.alive else []
    size = whole_groups(chunks, target.limits.threads)
    share = full(number(1 / width), vector)

    def mean_of(chunk: str) -> str:
        return f"(statistics[({chunk}) * {2 * channels} + block] * {share})"

    with text.groups(size, channels):
        for name in "value", "mean", "squares", "rest", "origin":
            text.private(name, 1)
        text.private("sums", 2, vector_type(vector))
        text.shared(2, size, vector_type(vector))
        text(f"sums[0] = {zeros(vector)}")
        with text.nest(*(f"if {condition}" for condition in living)):
            text(f"sums[0] = {mean_of('0')}")
        text(f"value[0] = {lane_of('sums[0]', 0, vector)}", f"value[0] = {finite('value[0]')}")

        def total(items: int, terms: list[str], *conditions: str) -> list[str]:
            """Sums of `terms` over all items k and lanes."""
            text(*(f"sums[{s}] = {zeros(vector)}" for s in range(len(terms))))
            with text.nest(
                *(f"if {condition}" for condition in [*living, *conditions]),
                f"for turn in T.serial({-(-items // size)})",
            ):
                text(f"k: T.let = turn * {size} + lane")
                with text.nest(f"if k < {items}"):
                    text(*(f"sums[{s}] = sums[{s}] + {term}" for s, term in enumerate(terms)))
            text(*(f"shared_{s}[lane] = sums[{s}]" for s in range(len(terms))))
            tree(text, len(terms), size)
            text(*(f"sums[{s}] = shared_{s}[0]" for s in range(len(terms))))
            text.barrier()
            return [fold(f"sums[{s}]", vector) for s in range(len(terms))]

        away = f"({mean_of('k')} - {full('value[0]', vector)})"
        (found,) = total(chunks, [away])
        text(f"mean[0] = {found} * {number(1 / (chunks * vector))}")
        row_sum, row_squares = (f"statistics[(k * 2 + {s}) * {channels} + block]" for s in range(2))
        apart = f"({away} - {full('mean[0]', vector)})"
        within = rectified(f"({row_squares} - {row_sum} * {mean_of('k')})", vector)
        (found,) = total(chunks, [f"({within} + {apart} * {apart} * {full(number(width), vector)})"])
        whole = "(value[0] + mean[0])"
        text(
            f"squares[0] = {found}",
            f"origin[0] = {finite(whole)}",
            f"rest[0] = {whole} - origin[0]",
            f"far: T.let = T.Select({whole} * {whole} * {number(problem.count / FAR)} <= "
            f"{finite('squares[0]', 'T.float32(-1)')}, 0, 1)",
        )
        pixels = layout.height * layout.width
        place = (
            f"(k // {pixels} * {channels} + block) * {plane_vectors(layout)} + (k % {pixels} // {layout.width} + "
            f"{layout.halo[0]})"
            f" * {layout.columns} + k % {layout.width} + {layout.halo[1]}"
        )
        distance = f"(z[{place}] - {full('origin[0]', vector)})"
        rest, squares = total(layout.slices * pixels, [distance, f"{distance} * {distance}"], "far == 1")
        with text.nest("if far == 1"):
            text(
                f"rest[0] = {rest} * {number(1 / problem.count)}",
                f"squares[0] = {rectified(f'({squares} - rest[0] * rest[0] * {number(problem.count)})', 1)}",
            )
        with text.nest("if lane == 0"):
            _store_moments(text, problem, "block", "origin[0] + rest[0]", "squares[0]")
    return str(text)


@schedule("batch_norm.running", device="opencl")
def batch_norm_running(problem: BatchNormRunning, target: Target) -> str:
    channels = problem.channels
    text = DeviceText(
        scalars("moments", 3 * channels), scalars("running_mean", channels), scalars("running_var", channels)
    )
    with text.each(channels, target.limits.threads):
        for name, row in ("running_mean", 0), ("running_var", 2):
            text(
                f"{name}[n] = {name}[n] * {number(1 - problem.momentum)} + moments[{row * channels} + n] * "
                f"{number(problem.momentum)}"
            )
    return str(text)


@schedule("batch_norm.frozen", device="opencl")
def batch_norm_frozen(problem: BatchNormFrozen, target: Target) -> str:
    channels = problem.channels
    text = DeviceText(
        scalars("running_mean", channels), scalars("running_var", channels), scalars("moments", 3 * channels)
    )
    with text.each(channels, target.limits.threads):
        text(
            "moments[n] = running_mean[n]",
            f"moments[{channels} + n] = T.float32(1) / T.sqrt(running_var[n] + {number(problem.eps)})",
            f"moments[{2 * channels} + n] = running_var[n]",
        )
    return str(text)


def _facts(channels: int) -> list[str]:
    return [scalars("moments", 3 * channels), scalars("affine", 2 * channels)]


def flags(channels: int, alive: bool = False, read: bool = False) -> list[str]:
    """Arguments: which channels hold values, which ones somebody reads."""
    return [scalars(name, channels, "int32") for name, there in (("alive", alive), ("read", read)) if there]


def _held(flag: str, value: str, name: str, vector: int, there: bool) -> tuple[list[str], str]:
    """(statements, expression): `value`, or 0 and nothing is loaded where the channel's flag is 0."""
    if not there:
        return [], value
    return [
        f'{name} = T.alloc_buffer((1,), "{vector_type(vector)}", scope="local")',
        f"{name}[0] = {zeros(vector)}",
        f"if {flag}[c] != 0:",
        f"    {name}[0] = {value}",
    ], f"{name}[0]"


def _set_facts(channels: int) -> tuple[str, ...]:
    return (
        "mean: T.let = moments[c]",
        f"inverse: T.let = moments[{channels} + c]",
        f"scale: T.let = affine[{channels} + c] * moments[{channels} + c]",
        "shift: T.let = affine[c]",
    )


def _centred(z: str, vector: int) -> str:
    return f"({z} - {full('mean', vector)})"


def _normalised(z: str, vector: int) -> str:
    """Before residual and activation; forward and backward use this one form, so that they agree on where a ReLU is
    positive."""
    return f"({_centred(z, vector)} * {full('scale', vector)} + {full('shift', vector)})"


@schedule("batch_norm.forward", device="opencl")
def batch_norm_forward(problem: BatchNormForward, target: Target) -> str:
    z, y, vector = problem.z, problem.y, problem.z.vector
    residual = [image("residual", problem.residual)] if problem.residual else []
    text = DeviceText(
        image("z", z), *_facts(z.channels), *residual, image("y", y), *flags(z.channels, problem.alive, problem.read)
    )
    load, here = _held("alive", at("z", z), "z_here", vector, problem.alive)
    row = activation_of(problem.activation) if problem.activation else None
    value = _normalised(here, vector) + (f" + {at('residual', problem.residual)}" if problem.residual else "")
    with text.each_framed(y, target.limits.threads) as real, text.nest(*(["if read[c] != 0"] if problem.read else [])):
        with text.nest(f"if {real}"):
            text(*_set_facts(z.channels), *load)
            text(
                f"value: T.let = {value}",
                f"{at('y', y)} = {spelled(row.formula, vector, x='value') if row else 'value'}",
            )
        with text.nest("else"):
            text(f"{at('y', y)} = {zeros(vector)}")
    return str(text)


def _store_spread(text: DeviceText, layout: Image) -> None:
    """Fills `spread` with what the CPU's kernel takes: of `whole` and what that leaves out, the mean in two parts."""
    channels, exact = layout.channels, 1 / (layout.batch * layout.height * layout.width)
    share, share_rest = number(exact), number(exact - float(np.float32(exact)))
    text.private("mean", 1)
    text.private("near", 1)
    text.private("rest", 1)
    text(
        f"mean[0] = whole[0] * {share}",
        f'rest[0] = T.call_pure_extern("float32", "fma", whole[0], {share}, T.float32(0) - mean[0])',
        f"rest[0] = rest[0] + whole[0] * {share_rest} + (joined[2] - (whole[0] - joined[0])) * {share}",
        "near[0] = mean[0] + joined[3]",
        f"near[0] = T.Select(T.abs(near[0]) < {infinity(1)}, near[0] - joined[3], mean[0])",
        "rest[0] = scale * (mean[0] - near[0] + rest[0])",
        "spread[n] = near[0]",
        f"spread[{channels} + n] = {finite('rest[0]')}",
        f"spread[{2 * channels} + n] = scale * (sums_out[{channels} + n] * {share} * moments[{channels} + n])",
    )


@schedule("batch_norm.backward", device="opencl")
def batch_norm_backward(problem: BatchNormBackward, target: Target) -> str:
    """The sums chunk by chunk, joined channel by channel, then the gradient pixel by pixel."""
    dy, z, channels, vector = problem.dy, problem.z, problem.dy.channels, problem.dy.vector
    dz, result = (problem.dy, "dy") if problem.in_place else (problem.dz, "dz")
    cut = ChannelSums(dy, target)
    text = DeviceText(
        image("dy", dy),
        image("z", z),
        *_facts(channels),
        *([image("y", problem.y)] if problem.y else []),
        scalars("sums_out", 2 * channels),
        *([image("dz", problem.dz)] if problem.dz else []),
        *flags(channels, problem.alive, problem.read),
    )
    load_z, z_here = _held("alive", at("z", z), "z_here", vector, problem.alive)
    load_dy, dy_here = _held("read", at("dy", dy), "dy_here", vector, problem.read)
    row = activation_of(problem.activation) if problem.activation else None
    gradient = dy_here
    if row and not problem.y:
        gradient = spelled(row.gradient, vector, x=_normalised(z_here, vector), dy=dy_here)

    def add() -> list[str]:
        there = at("dy", dy)
        mask = (
            [f"{there} = {spelled(row.gradient, vector, x=at('y', problem.y), dy=there)}"] if row and problem.y else []
        )
        return [
            *mask,
            *load_z,
            *load_dy,
            f"sums[1] = sums[1] + {gradient} * {_centred(z_here, vector)}",
            *add_exactly("sums[0]", "sums[2]", gradient),
        ]

    if dz:
        text.scratch("spread", 3 * channels)
    cut.collect_exactly(text, add, before=_set_facts(channels), condition="read[c] != 0" if problem.read else "")
    with text.each(channels, target.limits.threads):
        cut.join_exactly(text, "n")
        text.private("whole", 1)
        text(
            f"joined[2] = {finite('joined[2]')}",
            "whole[0] = joined[0] + joined[2]",
            "sums_out[n] = whole[0]",
            f"sums_out[{channels} + n] = joined[1] * moments[{channels} + n]",
        )
        if dz:
            text(f"scale: T.let = affine[{channels} + n] * moments[{channels} + n]")
            _store_spread(text, dy)
    if dz:
        near, rest, slope = (full(f"spread[{row * channels} + c]", vector) for row in range(3))
        value = only_examples(
            dz,
            f"plane // {channels}",
            f"({full('scale', vector)} * ({gradient} - {near}) - ({_centred(z_here, vector)} * {slope} + {rest}))",
        )
        written = ["if alive[c] != 0"] if problem.alive else []
        if problem.accumulate or problem.in_place:
            with text.each_pixel(dz, target.limits.threads), text.nest(*written):
                text(
                    *_set_facts(channels),
                    *load_z,
                    *load_dy,
                    f"{at(result, dz)} = " + (f"{at(result, dz)} + " if problem.accumulate else "") + value,
                )
        else:
            with text.each_framed(dz, target.limits.threads) as real, text.nest(*written):
                with text.nest(f"if {real}"):
                    text(*_set_facts(channels), *load_z, *load_dy, f"{at(result, dz)} = {value}")
                with text.nest("else"):
                    text(f"{at(result, dz)} = {zeros(vector)}")
    return str(text)

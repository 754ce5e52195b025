"""Batch normalisation on a CPU: every kernel is bound by memory, so each reads and writes its arrays once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.activation import activation_of
from mest_compile.operators.batch_norm import (
    FAR,
    BatchNormBackward,
    BatchNormForward,
    BatchNormFrozen,
    BatchNormMoments,
    BatchNormRunning,
)
from mest_compile.records.knob import Knob
from mest_compile.schedules.cpu.norms import NormGradient, facts, finite, normalised, set_facts
from mest_compile.schedules.cpu.rows import (
    UNROLL,
    Body,
    Chunks,
    array,
    buffer,
    channel_sums,
    each_row,
    fenced,
    fetch,
    frame_row,
    loop,
    narrowed,
    number,
    spelled,
    walk_row,
    widened,
)


@schedule("batch_norm.moments", device="cpu")
def batch_norm_moments(problem: BatchNormMoments, target: Target) -> str:
    return _moments_of_sums(problem) if problem.chunks else _moments_of_values(problem)


def _flags(problem: BatchNormMoments | BatchNormForward | BatchNormBackward, *names: str) -> list[str]:
    """Arguments that tell the channels of a neighbour's interest, those that the problem has."""
    return [buffer(name, problem.z.channels, "int32") for name in names if getattr(problem, name)]


def _store_moments(text: Text, problem: BatchNormMoments, mean: str, squares: str) -> None:
    """From float64 expressions: the mean, and the sum of squared distances from it."""
    channels, count = problem.z.channels, problem.count
    if problem.alive:
        mean, squares = (f"T.Select(alive[c] != 0, {value}, T.float64(0))" for value in (mean, squares))
    text(
        f'moments[c] = T.cast({mean}, "float32")',
        f"moments[{channels} + c] = T.cast(T.float64(1) / T.sqrt({squares} * {number(1 / count, 'float64')} + "
        f'{number(problem.eps, "float64")}), "float32")',
        f'moments[{2 * channels} + c] = T.cast({squares} * {number(1 / (count - 1), "float64")}, "float32")',
    )


def _add_distances(text: Text, chunks: Chunks) -> None:
    """Fills `chunk_sums` (channels * chunks, 2): the sum of distances of z from `near`, and of their squares."""
    image, width = chunks.image, UNROLL * chunks.image.floats

    def body(at: str, slot: str, live: str | None) -> list[str]:
        distance = f"({widened(image, f'z[z_row + {at}]')} - near[0])"
        if live:
            distance = f"T.Select({live}, {distance}, T.float32(0))"
        square = f"partial[{width} + {slot}]"
        return [f"partial[{slot}] = partial[{slot}] + {distance}", f"{square} = {square} + {distance} * {distance}"]

    channel_sums(text, chunks, {"z": image}, 2, body)


def _moments_of_values(problem: BatchNormMoments) -> str:
    """Sums of distances from a nearby value, in one pass; chunks are joined in float64.

    The nearby value is the mean of the chunk's first row. That is at most sqrt(rows) standard deviations from the
    chunk's mean, so the subtraction of squares loses little whatever the data.
    """
    image, vector = problem.z, problem.z.floats
    chunks = Chunks(image)
    text = Text(array("z", image), buffer("moments", 3 * image.channels), *_flags(problem, "alive"))
    text(f'chunk_sums = T.alloc_buffer(({image.channels * chunks.count * 2},), "float64")')

    def sample(at: str, slot: str, live: str | None) -> list[str]:
        value = widened(image, f"z[sample_row + {at}]")
        return [f"sample[{slot}] = sample[{slot}] + " + (f"T.Select({live}, {value}, T.float32(0))" if live else value)]

    with chunks.each(text):
        text.local("near", 1)
        text.local("sample", UNROLL * vector)
        with text.nest(f"for i in T.vectorized({UNROLL * vector})"):
            text("sample[i] = T.float32(0)")
        with text.nest("for r in T.serial(1)"):
            chunks.set_row(text, "first", {"sample": image})
            walk_row(text, image, sample)
        text("near[0] = T.float32(0)")
        with text.nest(f"for i in T.serial({UNROLL * vector})"):
            text("near[0] = near[0] + sample[i]")
        text(f'near[0] = near[0] / T.cast({chunks.values("first", "1")}, "float32")', f"near[0] = {finite('near[0]')}")
        _add_distances(text, chunks)
        text(
            f'values: T.let = T.cast({chunks.values("first", "rows")}, "float64")',
            "chunk_sums[n * 2 + 1] = chunk_sums[n * 2 + 1] - chunk_sums[n * 2] * chunk_sums[n * 2] / values",
            'chunk_sums[n * 2] = T.cast(near[0], "float64") + chunk_sums[n * 2] / values',
        )
    with text.nest(f"for c in T.serial({image.channels})"):
        text.local("mean", 1, "float64")
        text.local("squares", 1, "float64")
        text("mean[0] = T.float64(0)", "squares[0] = T.float64(0)")
        first = f"k * {chunks.rows}"
        share = f'T.cast({chunks.values(first, f"T.min({chunks.rows}, {chunks.all_rows} - {first})")}, "float64")'
        at = f"(c * {chunks.count} + k) * 2"
        with text.nest(f"for k in T.serial({chunks.count})"):
            text(f"mean[0] = mean[0] + chunk_sums[{at}] * {share} * {number(1 / problem.count, 'float64')}")
        with text.nest(f"for k in T.serial({chunks.count})"):
            text(
                f"squares[0] = squares[0] + T.max(T.float64(0), chunk_sums[{at} + 1]) + "
                f"{share} * (chunk_sums[{at}] - mean[0]) * (chunk_sums[{at}] - mean[0])"
            )
        _store_moments(text, problem, "mean[0]", "squares[0]")
    return str(text)


def _moments_of_sums(problem: BatchNormMoments) -> str:
    """Joins the sums that a convolution left in its epilogue. A channel whose mean is far from 0 is looked at once
    more."""
    channels, vector, count = problem.z.channels, problem.z.floats, number(problem.count, "float64")
    elems = problem.chunks * 2 * channels * vector
    text = Text(
        buffer("statistics", elems), array("z", problem.z), buffer("moments", 3 * channels), *_flags(problem, "alive")
    )
    with text.nest(f"for c in {loop(channels, elems)}"):
        text.local("total", 2 * vector, "float64")
        text.local("sums", 2, "float64")
        with text.nest("for s in T.unroll(2)"), text.nest(f"for i in T.vectorized({vector})"):
            text(f"total[s * {vector} + i] = T.float64(0)")
        with text.nest(
            f"for k in T.serial({problem.chunks})", "for s in T.unroll(2)", f"for i in T.vectorized({vector})"
        ):
            text(
                f"total[s * {vector} + i] = total[s * {vector} + i] + "
                f'T.cast(statistics[((k * 2 + s) * {channels} + c) * {vector} + i], "float64")'
            )
        with text.nest("for s in T.unroll(2)"):
            text("sums[s] = T.float64(0)")
            with text.nest(f"for i in T.serial({vector})"):
                text(f"sums[s] = sums[s] + total[s * {vector} + i]")
        text(
            f"sums[0] = sums[0] * {number(1 / problem.count, 'float64')}",
            f"sums[1] = sums[1] - sums[0] * sums[0] * {count}",
            f"far: T.let = T.Select(sums[0] * sums[0] * {number(problem.count / FAR, 'float64')} <= sums[1], "
            'sums[1], T.float64("inf"))',
        )
        with text.nest('if far == T.float64("inf")'), _if(text, "alive" if problem.alive else None):
            text.local("near", 1)
            text.local("chunk_sums", 2, "float64")
            text(
                'near[0] = T.cast(sums[0], "float32")',
                f"near[0] = {finite('near[0]')}",
                "n: T.let = 0",
                "first: T.let = 0",
                f"rows: T.let = {problem.z.slices * problem.z.height}",
            )
            _add_distances(text, Chunks(problem.z))
            text(
                f'sums[0] = T.cast(near[0], "float64") + chunk_sums[0] / {count}',
                f"sums[1] = T.max(T.float64(0), chunk_sums[1] - chunk_sums[0] * chunk_sums[0] / {count})",
            )
        _store_moments(text, problem, "sums[0]", "sums[1]")
    return str(text)


@schedule("batch_norm.running", device="cpu")
def batch_norm_running(problem: BatchNormRunning, target: Target) -> str:
    channels = problem.channels
    text = Text(buffer("moments", 3 * channels), buffer("running_mean", channels), buffer("running_var", channels))
    with text.nest(f"for c in T.serial({channels})"):
        for name, row in ("running_mean", 0), ("running_var", 2):
            text(
                f"{name}[c] = {name}[c] * {number(1 - problem.momentum)} + moments[{row * channels} + c] * "
                f"{number(problem.momentum)}"
            )
    return str(text)


@schedule("batch_norm.frozen", device="cpu")
def batch_norm_frozen(problem: BatchNormFrozen, target: Target) -> str:
    channels = problem.channels
    text = Text(buffer("running_mean", channels), buffer("running_var", channels), buffer("moments", 3 * channels))
    with text.nest(f"for c in T.serial({channels})"):
        text(
            "moments[c] = running_mean[c]",
            f'moments[{channels} + c] = T.cast(T.float64(1) / T.sqrt(T.cast(running_var[c], "float64") + '
            f'{number(problem.eps, "float64")}), "float32")',
            f"moments[{2 * channels} + c] = running_var[c]",
        )
    return str(text)


@contextmanager
def _if(text: Text, flag: str | None, wanted: bool = True) -> Iterator[None]:
    """What follows is for channels that the flag names, or for the others; for all without a flag."""
    if flag is None:
        yield
        return
    with text.nest(f"if {flag}[c] {'!=' if wanted else '=='} 0"):
        yield


def _kinds(problem: BatchNormForward | BatchNormBackward) -> list[tuple[bool, str | None]]:
    """(whether z is there, flag): what to write a kernel's rows for."""
    return [(True, "alive"), (False, "alive")] if problem.alive else [(True, None)]


# Cores fetch what is read along a row by themselves, but lines that are to be written some ask for only when they are:
# on a Xeon with 2 MiB of second-level cache a pass takes a sixth less time.
AHEAD = Knob("ahead", 0, "bytes that what is read along a row, or written, is asked for ahead", (512, 1024, 2048))


@schedule("batch_norm.forward", device="cpu", knobs=(AHEAD,))
def batch_norm_forward(problem: BatchNormForward, target: Target, ahead: int) -> str:
    row = activation_of(problem.activation) if problem.activation else None
    images = {"z": problem.z, **({"residual": problem.residual} if problem.residual else {}), "y": problem.y}
    arguments = {name: array(name, image) for name, image in images.items()}
    text = Text(arguments.pop("z"), *facts(problem.z.channels), *arguments.values(), *_flags(problem, "alive", "read"))

    def rows(there: bool) -> None:
        def body(at: str, slot: str, live: str | None) -> list[str]:
            z = widened(problem.z, f"z[z_row + {at}]") if there else "T.float32(0)"
            value = normalised(z) + (
                f" + {widened(problem.residual, f'residual[residual_row + {at}]')}" if problem.residual else ""
            )
            return [f"y[y_row + {at}] = {narrowed(problem.y, spelled(row.formula, x=value) if row else value)}"]

        walk_row(
            text,
            problem.y,
            body,
            fetch(ahead, images if there else {name: images[name] for name in images if name != "z"}, "y"),
        )

    with each_row(text, images), _if(text, "read" if problem.read else None):
        set_facts(text, problem.z.channels)
        for there, flag in _kinds(problem):
            with _if(text, flag, there):
                rows(there)
        frame_row(text, "y", problem.y)
    return str(text)


@schedule("batch_norm.backward", device="cpu", knobs=(AHEAD,))
def batch_norm_backward(problem: BatchNormBackward, target: Target, ahead: int) -> str:
    """A channel's sums, then its gradient, while the channel is still in cache. What the sums read, and what the
    gradient is written to, is asked for ahead."""
    image, channels = problem.dy, problem.dy.channels
    row = activation_of(problem.activation) if problem.activation else None
    images = {"dy": image, "z": problem.z, **({"y": problem.y} if problem.y else {})}
    target_name, target_image = ("dy", image) if problem.in_place else ("dz", problem.dz)
    text = Text(
        array("dy", image),
        array("z", problem.z),
        *facts(channels),
        *([array("y", problem.y)] if problem.y else []),
        buffer("sums", 2 * channels),
        *([array("dz", problem.dz)] if problem.dz else []),
        *_flags(problem, "alive", "read"),
    )
    norm = NormGradient(text, image, problem.z, None if problem.y else row)

    def mask(at: str) -> list[str]:
        """dy becomes, in place, what it is before the activation."""
        if not problem.y or not row:
            return []
        kept = fenced(spelled(row.gradient, x=widened(problem.y, f"y[y_row + {at}]"), dy=norm.dy_at(at)))
        return [f"dy[dy_row + {at}] = {narrowed(image, kept)}"]

    def spread(at: str, slot: str, live: str | None) -> list[str]:
        assert target_image
        value = norm.spread(at)
        element = f"{target_name}[{target_name}_row + {at}]"
        if problem.accumulate:
            value = f"{widened(target_image, element)} + {value}"
        return [f"{element} = {narrowed(target_image, f'T.Select({live}, {value}, T.float32(0))' if live else value)}"]

    def clear(at: str, slot: str, live: str | None) -> list[str]:
        assert target_image
        return [f"{target_name}[{target_name}_row + {at}] = {narrowed(target_image, 'T.float32(0)')}"]

    def write(body: Body) -> None:
        result = {"dz": problem.dz} if problem.dz else {}
        with text.nest(f"for r in T.serial({norm.rows.all_rows})"):
            norm.rows.set_row(text, "r", {"dy": image, "z": problem.z, **result})
            walk_row(text, image, body, fetch(ahead, result, "dz"))
            if problem.dz and not problem.accumulate:
                frame_row(text, "dz", problem.dz)

    with text.nest(f"for c in {loop(channels, image.elems)}"):
        set_facts(text, channels)
        norm.begin()
        with _if(text, "read" if problem.read else None):
            for there, flag in _kinds(problem):
                with _if(text, flag, there):
                    norm.add_up(images, mask, fetch(ahead, images if there else {"dy": image}), there)
        norm.join()
        if target_image:
            norm.set_spread()
            with _if(text, "alive" if problem.alive else None):
                with _if(text, "read" if problem.read else None):
                    write(spread)
                if problem.read and not problem.accumulate:  # nothing was added up: the gradient is 0
                    with _if(text, "read", False):
                        write(clear)
    return str(text)

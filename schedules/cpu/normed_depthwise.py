"""Depthwise convolution between two normalisations on a CPU: a thread has a channel of all examples at a time, and what
lies between the kernels' steps is a plane of a slice in its caches."""

from __future__ import annotations

from dataclasses import replace

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.activation import Activation, activation_of
from mest_compile.operators.layers.depthwise import DepthwiseForward, Window
from mest_compile.operators.layers.normed_depthwise import NormedDepthwiseBackward, NormedDepthwiseForward
from mest_compile.schedules.cpu.depthwise import (
    Tile,
    add_taps,
    add_up,
    each_tile,
    reads_of,
    start_sums,
    start_taps,
    store_taps,
    tile_of,
    write_plane,
)
from mest_compile.schedules.cpu.norms import NormGradient, activated, facts, set_facts
from mest_compile.schedules.cpu.rows import array, buffer, fetch, frame_row, loop, narrowed, set_rows, walk_row, widened
from mest_compile.schedules.cpu.tiles import vectors

BEFORE, BEHIND = "_before", "_behind"  # what names of the two normalisations end with


def _row(name: str | None) -> Activation | None:
    return activation_of(name) if name else None


def _next_channel(name: str, image: Image) -> list[str]:
    return fetch(image.channel_elems * image.item_bytes, {name: image})


def _make_plane(text: Text, name: str, image: Image) -> None:
    """A plane whose halo is 0."""
    text.local(name, image.elems)
    if any(image.halo):
        with text.nest(f"for h in T.serial({image.height})"):
            text("plane: T.let = 0")
            frame_row(text, name, image)


def _take_rows(
    text: Text, source: Image, plane: str, padded: Image, window: Window, rows: int, row: Activation | None
) -> None:
    """Normalises the rows of `source` that result rows `h` to `h + rows` reach, and those before did not, into
    `taken`. plane: where the channel starts."""
    step, beyond = window.stride[0], (window.kernel[0] - 1) * window.dilation[0] - window.padding[0] + 1
    upto = f"T.max(0, T.min({source.height}, (h + %d) * {step} + {beyond}))"
    text(f"have: T.let = T.Select(h == 0, 0, {upto % -1})")
    with text.nest(f"for fresh in T.serial({upto % (rows - 1)} - have)"):
        text(
            f"source_row: T.let = {plane} + (have + fresh) * {source.row_elems}",
            f"taken_row: T.let = {padded.origin} + (have + fresh) * {padded.row_elems}",
        )

        def body(at: str, slot: str, live: str | None) -> list[str]:
            z = widened(source, f"source[source_row + {at}]")
            return [f"taken[taken_row + {at}] = {activated(z, row, BEFORE)}"]

        walk_row(text, source, body)


@schedule("normed_depthwise.forward", device="cpu")
def normed_depthwise_forward(problem: NormedDepthwiseForward, target: Target) -> str:
    source, result, padded = problem.source, problem.result, problem.padded
    inner = DepthwiseForward(padded, result, problem.window, statistics=problem.statistics)
    statistics = result.slices * result.height * 2 * result.channels * result.vector
    text = Text(
        buffer("values", result.channels * problem.window.taps),
        *facts(result.channels, BEFORE),
        array("source", source),
        array("result", result),
        *([buffer("statistics", statistics)] if problem.statistics else []),
    )

    def ready(rows: int) -> None:
        plane = f"number * {source.channel_elems} + {source.origin}"
        _take_rows(text, source, plane, padded, problem.window, rows, _row(problem.activation))
        text(f"source_plane: T.let = {padded.origin}")

    with text.nest(f"for number in {loop(result.slices * result.channels, result.elems)}"):
        text(f"c: T.let = number % {result.channels}")
        set_facts(text, result.channels, BEFORE)
        _make_plane(text, "taken", padded)
        text("plane: T.let = number", f"result_plane: T.let = number * {result.channel_elems} + {result.origin}")
        write_plane(text, inner, "taken", None, ready)
    return str(text)


@schedule("normed_depthwise.backward", device="cpu")
def normed_depthwise_backward(problem: NormedDepthwiseBackward, target: Target) -> str:
    """The sums of the normalisation behind; slice by slice its gradient and what the convolution took, row by row the
    weights' gradient of them, then that of what the convolution took and the sums of the normalisation before; dz."""
    source, z, dy, window = problem.source, problem.z, problem.dy, problem.window
    channels, vector = dy.channels, dy.vector
    padded, padded_delta = problem.padded, problem.padded_delta
    inner = replace(source, channels=1, halo=(0, 0, 0, 0), dtype="float32", gap=0)  # the gradient of a channel, before
    name, dz = ("dz", problem.dz) if problem.dz else ("source", source)
    text = Text(
        buffer("values", channels * window.taps),
        *facts(channels, BEFORE),
        array("source", source),
        *facts(channels, BEHIND),
        array("z", z),
        array("dy", dy),
        buffer("gradients", channels * window.taps),
        buffer(f"sums{BEFORE}", 2 * channels),
        buffer(f"sums{BEHIND}", 2 * channels),
        *([array("dz", problem.dz)] if problem.dz else []),
    )
    behind = NormGradient(text, dy, z, _row(problem.behind), ("dy", "z"), BEHIND)
    before = NormGradient(
        text, replace(inner, channels=channels), source, _row(problem.before), ("inner", "source"), BEFORE
    )

    def give_row() -> None:
        """Row `h` of what comes back through the normalisation behind. Of small images the next channel's is asked for,
        as the taps' sums leave memory idle: 12x12 and 6x6 take a tenth less time, 24x24 a tenth more (Zen 4)."""
        set_rows(text, {"dy": dy, "z": z})
        text(f"delta_row: T.let = {padded_delta.origin} + h * {padded_delta.row_elems}")

        def body(at: str, slot: str, live: str | None) -> list[str]:
            value = behind.spread(at)
            return [f"delta[delta_row + {at}] = " + (f"T.Select({live}, {value}, T.float32(0))" if live else value)]

        small = dy.slices * dy.channel_elems * dy.item_bytes <= target.l1_bytes
        asked = {"dy": dy, "z": z} if small else {}
        walk_row(text, dy, body, [line for name, image in asked.items() for line in _next_channel(name, image)])

    def one(tile: Tile) -> None:
        """A tile of the gradient of what the convolution took."""
        start = f"{padded_delta.origin} + h // {window.stride[0]} * {padded_delta.row_elems}"
        text(
            f"read: T.let = {start} + w // {window.stride[1]} * {vector}",
            f"write: T.let = s * {inner.slice_elems} + h * {inner.row_elems} + w * {vector}",
            f"taken_from: T.let = source_plane + h * {source.row_elems} + w * {vector}",
        )
        start_sums(text, tile, vector, lambda a, b: "T.float32(0)")
        add_up(text, "delta", padded_delta, "read", reads_of(window.reaching, window, tile), f"c * {window.taps}")
        places = [
            (
                f"inner[write + {a * inner.row_elems + b * vector} + i]",
                f"source[taken_from + {a * source.row_elems + b * vector} + i]",
                f"sums_{a}[{b * vector} + i]",
            )
            for a in range(tile[0])
            for b in range(tile[1])
        ]
        vectors(text, [], vector, *before.add_tile(places))

    def spread(at: str, slot: str, live: str | None) -> list[str]:
        value = before.spread(at, told=True)
        made = f"T.Select({live}, {value}, T.float32(0))" if live else value
        return [f"{name}[{name}_row + {at}] = {narrowed(dz, made)}"]

    with text.nest(f"for c in {loop(channels, source.elems)}"):
        set_facts(text, channels, BEFORE)
        set_facts(text, channels, BEHIND)
        behind.begin()
        behind.add_up({"dy": dy, "z": z})
        behind.join()
        behind.set_spread()
        _make_plane(text, "taken", padded)
        _make_plane(text, "delta", padded_delta)
        text.local("inner", inner.elems)
        start_taps(text, window, vector)
        before.begin()
        with text.nest(f"for s in T.serial({dy.slices})"):
            text(
                f"plane: T.let = s * {channels} + c",
                f"source_plane: T.let = plane * {source.channel_elems} + {source.origin}",
            )
            with text.nest(f"for h in T.serial({dy.height})"):
                give_row()
                _take_rows(text, source, "source_plane", padded, window, 1, _row(problem.before))
                text(f"source_row: T.let = {padded.origin} + h * {window.stride[0] * padded.row_elems}")
                add_taps(text, window, padded, padded_delta, target, ("taken", "delta"))
            before.begin_slice()
            each_tile(text, inner, tile_of(inner, window, window.stride), one)
            before.end_slice()
        store_taps(text, window, vector)
        before.join()
        before.set_spread()
        with text.nest(f"for r in T.serial({before.rows.all_rows})"):
            before.rows.set_row(text, "r", {"source": source, **({"dz": problem.dz} if problem.dz else {})})
            text(f"inner_row: T.let = r * {inner.row_elems}")
            walk_row(text, source, spread)
    return str(text)

"""Batch normalisation in evaluation mode within a training step, on a CPU."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.activation import activation_of
from mest_compile.operators.frozen_norm import CopyPart, FrozenNormBackward, FrozenNormScaling
from mest_compile.schedules.cpu.rows import (
    UNROLL,
    Chunks,
    array,
    buffer,
    fenced,
    fold,
    frame_row,
    loop,
    narrowed,
    number,
    spelled,
    walk_row,
    widened,
    zero,
)


@schedule("frozen_norm.scaling", device="cpu")
def scaling(problem: FrozenNormScaling, target: Target) -> str:
    channels = problem.channels
    text = Text(
        buffer("running_mean", channels),
        buffer("running_var", channels),
        buffer("affine", 2 * channels),
        buffer("scaling", 2 * channels),
    )
    with text.nest(f"for c in T.serial({channels})"):
        text(
            f'scale: T.let = T.cast(affine[{channels} + c], "float64") / '
            f'T.sqrt(T.cast(running_var[c], "float64") + {number(problem.eps, "float64")})',
            'scaling[c] = T.cast(T.cast(affine[c], "float64") - T.cast(running_mean[c], "float64") * scale, "float32")',
            f'scaling[{channels} + c] = T.cast(scale, "float32")',
        )
    return str(text)


@schedule("values.part", device="cpu")
def copy_part(problem: CopyPart, target: Target) -> str:
    text = Text(buffer("source", problem.source_elems), buffer("target", problem.target_elems))
    with text.nest(f"for i in T.serial({problem.elems})"):
        text(f"target[{problem.place} + i] = source[{problem.start} + i]")
    return str(text)


@schedule("frozen_norm.backward", device="cpu")
def backward(problem: FrozenNormBackward, target: Target) -> str:
    """One pass over a channel: its gradient does not wait for its sums. These are float32 vectors within a slice,
    float64 over slices."""
    dy, channels, vector = problem.dy, problem.dy.channels, problem.dy.floats
    row = activation_of(problem.activation) if problem.activation else None
    width, rows = UNROLL * vector, Chunks(dy)
    images = {"dy": dy, "z": problem.z, "y": problem.y, "dz": problem.dz}
    there = {name: image for name, image in images.items() if image is not None}
    arguments = {name: array(name, image) for name, image in there.items()}
    text = Text(
        arguments.pop("dy"),
        *([buffer("scaling", 2 * channels)] if problem.folded else []),
        *([] if problem.folded else [buffer("moments", 3 * channels), buffer("affine", 2 * channels)]),
        *(arguments[name] for name in ("z", "y") if name in arguments),
        *([buffer("sums", 2 * channels)] if problem.sums else []),
        *([arguments["dz"]] if problem.dz else []),
    )

    def element(name: str, at: str) -> str:
        return widened(there[name], f"{name}[{name}_row + {at}]")

    def body(at: str, slot: str, live: str | None) -> list[str]:
        value, lines = element("dy", at), []
        if row:
            told = element("y", at) if problem.y else f"(({element('z', at)} - mean) * scale + shift)"
            value = spelled(row.gradient, x=told, dy=value)
        if problem.sums:
            square = f"partial[{width} + {slot}]"
            lines += [
                f"partial[{slot}] = partial[{slot}] + {value}",
                f"{square} = {square} + {value} * ({element('z', at)} - mean)",
            ]
        goal, image = ("dy", dy) if problem.in_place else ("dz", problem.dz)
        if image is not None:
            before = f"{element(goal, at)} + " if problem.accumulate else ""
            made = f"{before}{value} * scale"
            lines.append(
                f"{goal}[{goal}_row + {at}] = {narrowed(image, fenced(made) if problem.in_place and row else made)}"
            )
        if problem.residual and row:
            lines.append(f"dy[dy_row + {at}] = {narrowed(dy, fenced(value))}")
        return lines

    with text.nest(f"for c in {loop(channels, dy.elems)}"):
        if problem.folded:
            text(f"scale: T.let = scaling[{channels} + c]")
        else:
            text(
                "mean: T.let = moments[c]",
                f"scale: T.let = affine[{channels} + c] * moments[{channels} + c]",
                "shift: T.let = affine[c]",
            )
        if problem.sums:
            text.local("partial", 2 * width)
            text.local("total", 2 * vector, "float64")
            text.local("joined", 2, "float64")
            zero(text, "total", 2 * vector, vector, "float64")
        with text.nest(f"for s in T.serial({dy.slices})"):
            if problem.sums:
                zero(text, "partial", 2 * width, vector)
            with text.nest(f"for r in T.serial({dy.height})"):
                rows.set_row(text, f"s * {dy.height} + r", there)
                walk_row(text, dy, body)
                if problem.dz and not problem.accumulate:
                    frame_row(text, "dz", problem.dz)
            if problem.sums:
                fold(text, 2, vector)
        if problem.sums:
            with text.nest("for s in T.unroll(2)"):
                text("joined[s] = T.float64(0)")
                with text.nest(f"for i in T.serial({vector})"):
                    text(f"joined[s] = joined[s] + total[s * {vector} + i]")
            text(
                'sums[c] = T.cast(joined[0], "float32")',
                f'sums[{channels} + c] = T.cast(joined[1] * T.cast(moments[{channels} + c], "float64"), "float32")',
            )
    return str(text)

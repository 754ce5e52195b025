"""Losses on a CPU: answer by answer; the outputs of a batch fit into the cache."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.losses.cross_entropy import SoftmaxCrossEntropy
from mest_compile.operators.losses.elementwise import Elementwise
from mest_compile.operators.losses.soft_targets import SoftTargets
from mest_compile.schedules import losses
from mest_compile.schedules.cpu.rows import array, buffer, loop, number, widened


def _clear_lanes(text: Text, name: str, image: Image) -> None:
    """Makes a gradient 0 in lanes without an example."""
    if image.batch < image.lanes:
        map_loops, place = [], ""
        if losses.pixels(image) > 1:
            map_loops = [f"for h in T.serial({image.height})", f"for w in T.serial({image.width})"]
            place = f" + h * {image.row_elems} + w * {image.vector}"
        with text.nest(
            f"for k in T.serial({image.channels})", *map_loops, f"for i in T.serial({image.lanes - image.batch})"
        ):
            last = (image.slices - 1) * image.slice_elems + image.origin + image.batch % image.vector
            text(f"{name}[k * {image.channel_elems} + {last}{place} + i] = T.float32(0)")


def _add_up(text: Text, answers: int, factor: str) -> None:
    """The loss: `losses` of all answers times a factor, float64."""
    text.local("joined", 1, "float64")
    text("joined[0] = T.float64(0)")
    with text.nest(f"for n in T.serial({answers})"):
        text('joined[0] = joined[0] + T.cast(losses[n], "float64")')
    text(f'loss[0] = T.cast(joined[0] * {factor}, "float32")')


def _read(name: str, image: Image, channel: str) -> str:
    return widened(image, losses.element(name, image, channel))


@schedule("loss.elementwise", device="cpu")
def elementwise(problem: Elementwise, target: Target) -> str:
    output, gradient = problem.output, problem.gradient
    answers, width = losses.answers(output), output.channels
    text = Text(
        array("output", output),
        buffer("targets", answers * width),
        *([buffer("weights", width)] if problem.weighted else []),
        buffer("loss", 1),
        buffer("gradient", gradient.elems),
    )
    text(f'losses = T.alloc_buffer(({answers},), "float32")')
    with text.nest(f"for n in {loop(answers, answers * width)}"):
        losses.elementwise(text, text.nest, text.local, number, problem, _read("output", output, "k"))
    _clear_lanes(text, "gradient", gradient)
    _add_up(text, answers, number(1 / (answers * width), "float64"))
    return str(text)


@schedule("loss.cross_entropy", device="cpu")
def cross_entropy(problem: SoftmaxCrossEntropy, target: Target) -> str:
    logits, dlogits = problem.logits, problem.dlogits
    answers, classes = losses.answers(logits), logits.channels
    text = Text(
        array("logits", logits),
        buffer("labels", answers, "int32"),
        *([buffer("weights", classes), buffer("scales", 2)] if problem.scaled else []),
        buffer("loss", 1),
        buffer("correct", answers, "int32"),
        buffer("dlogits", dlogits.elems),
    )
    text(f'losses = T.alloc_buffer(({answers},), "float32")')
    first, logit = (_read("logits", logits, channel) for channel in ("0", "k"))
    with text.nest(f"for n in {loop(answers, answers * classes)}"):
        losses.cross_entropy(text, text.nest, text.local, number, problem, first, logit)
    _clear_lanes(text, "dlogits", dlogits)
    _add_up(text, answers, 'T.cast(scales[1], "float64")' if problem.scaled else number(1 / answers, "float64"))
    return str(text)


@schedule("loss.soft_targets", device="cpu")
def soft_targets(problem: SoftTargets, target: Target) -> str:
    output, gradient = problem.output, problem.gradient
    answers, classes = losses.answers(output), output.channels
    text = Text(
        array("output", output),
        buffer("labels", answers, "int32"),
        buffer("wanted", answers * classes),
        buffer("loss", 1),
        buffer("correct", answers, "int32"),
        buffer("gradient", gradient.elems),
    )
    text(f'losses = T.alloc_buffer(({answers},), "float32")')
    first, logit = (_read("output", output, channel) for channel in ("0", "k"))
    with text.nest(f"for n in {loop(answers, answers * classes)}"):
        losses.soft_targets(text, text.nest, text.local, number, problem, first, logit)
    _clear_lanes(text, "gradient", gradient)
    _add_up(text, answers, number(1 / answers, "float64"))
    return str(text)

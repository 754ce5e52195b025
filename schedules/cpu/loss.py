"""Losses on a CPU: example by example; the outputs of a batch fit into the cache."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.infix import written
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.losses.cross_entropy import SoftmaxCrossEntropy
from mest_compile.operators.losses.loss import Elementwise
from mest_compile.schedules.cpu.rows import array, buffer, loop, number, widened


def _element(name: str, image: Image, channel: str) -> str:
    """That of a channel and of example n."""
    return (
        f"{name}[n // {image.vector} * {image.slice_elems} + {channel} * {image.channel_elems} + {image.origin}"
        f" + n % {image.vector}]"
    )


def _clear_lanes(text: Text, name: str, image: Image) -> None:
    """Makes a gradient 0 in lanes without an example."""
    if image.batch < image.lanes:
        with text.nest(f"for k in T.serial({image.channels})", f"for i in T.serial({image.lanes - image.batch})"):
            last = (image.slices - 1) * image.slice_elems + image.origin + image.batch % image.vector
            text(f"{name}[k * {image.channel_elems} + {last} + i] = T.float32(0)")


def _add_up(text: Text, batch: int, count: int) -> None:
    """The loss: `losses` of all examples over `count`."""
    text.local("joined", 1, "float64")
    text("joined[0] = T.float64(0)")
    with text.nest(f"for n in T.serial({batch})"):
        text('joined[0] = joined[0] + T.cast(losses[n], "float64")')
    text(f'loss[0] = T.cast(joined[0] * {number(1 / count, "float64")}, "float32")')


@schedule("loss.elementwise", device="cpu")
def elementwise(problem: Elementwise, target: Target) -> str:
    output, gradient = problem.output, problem.gradient
    batch, width = output.batch, output.channels
    count = batch * width
    text = Text(
        array("output", output), buffer("targets", count), buffer("loss", 1), buffer("gradient", gradient.elems)
    )
    text(f'losses = T.alloc_buffer(({batch},), "float32")')
    names = {"output": widened(output, _element("output", output, "k")), "target": f"targets[n * {width} + k]"}
    with text.nest(f"for n in {loop(batch, count)}"):
        text.local("total", 1)
        text("total[0] = T.float32(0)")
        with text.nest(f"for k in T.serial({width})"):
            text(
                f"total[0] = total[0] + ({written(problem.term, names, number)})",
                f"{_element('gradient', gradient, 'k')} = ({written(problem.slope, names, number)}) * "
                f"{number(1 / count)}",
            )
        text("losses[n] = total[0]")
    _clear_lanes(text, "gradient", gradient)
    _add_up(text, batch, count)
    return str(text)


@schedule("loss.cross_entropy", device="cpu")
def cross_entropy(problem: SoftmaxCrossEntropy, target: Target) -> str:
    logits, dlogits = problem.logits, problem.dlogits
    batch, classes = logits.batch, logits.channels
    text = Text(
        array("logits", logits),
        buffer("labels", batch, "int32"),
        buffer("loss", 1),
        buffer("correct", batch, "int32"),
        buffer("dlogits", dlogits.elems),
    )
    text(f'losses = T.alloc_buffer(({batch},), "float32")')
    first, logit = (widened(logits, _element("logits", logits, channel)) for channel in ("0", "k"))
    gradient = _element("dlogits", dlogits, "k")
    share = problem.smoothing / classes
    # Without smoothing only the label's logit counts: 0 times what another one is below the largest need not be 0.
    add = (
        "chosen[0] + {wanted} * ({logit} - best[0])"
        if share
        else "T.Select(k == labels[n], {logit} - best[0], chosen[0])"
    )
    # NaN is the largest, the first one of several.
    larger = f'T.Select({logit} <= T.float32("inf"), {logit} > best[0], best[0] <= T.float32("inf"))'
    wanted = f"T.Select(k == labels[n], {number(1 - problem.smoothing + share)}, {number(share)})"
    with text.nest(f"for n in {loop(batch, batch * classes)}"):
        text.local("best", 1)
        text.local("winner", 1, "int32")
        text.local("total", 1)
        text.local("chosen", 1)
        text(f"best[0] = {first}", "winner[0] = 0", "total[0] = T.float32(0)", "chosen[0] = T.float32(0)")
        with text.nest(f"for k in T.serial({classes})", f"if {larger}"):
            text(f"best[0] = {logit}", "winner[0] = k")
        with text.nest(f"for k in T.serial({classes})"):
            text(
                f"{gradient} = T.exp({logit} - best[0])",
                f"total[0] = total[0] + {gradient}",
                f"chosen[0] = {add.format(wanted=wanted, logit=logit)}",
            )
        text("losses[n] = T.log(total[0]) - chosen[0]", "correct[n] = T.Select(winner[0] == labels[n], 1, 0)")
        with text.nest(f"for k in T.serial({classes})"):
            text(f"{gradient} = ({gradient} / total[0] - {wanted}) * {number(1 / batch)}")
    _clear_lanes(text, "dlogits", dlogits)
    _add_up(text, batch, batch)
    return str(text)

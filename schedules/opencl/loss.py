"""Losses on OpenCL: a thread for each lane; then one work-group adds the losses up."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.infix import written
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.losses.cross_entropy import SoftmaxCrossEntropy
from mest_compile.operators.losses.loss import Elementwise
from mest_compile.schedules.opencl.sums import tree
from mest_compile.schedules.opencl.text import DeviceText, number, scalars, whole_groups


def _element(name: str, image: Image, channel: str) -> str:
    """That of a channel and of example n."""
    return (
        f"{name}[n // {image.vector} * {image.slice_elems} + {channel} * {image.channel_elems} + {image.origin}"
        f" + n % {image.vector}]"
    )


def _add_up(text: DeviceText, batch: int, count: int, target: Target) -> None:
    """The loss: `losses` of all examples over `count`."""
    size = whole_groups(batch, target.limits.threads)
    with text.groups(size, 1):
        text.shared(1, size, "float32")
        text("shared_0[lane] = T.float32(0)")
        with text.nest(f"for turn in T.serial({-(-batch // size)})", f"if turn * {size} + lane < {batch}"):
            text(f"shared_0[lane] = shared_0[lane] + losses[turn * {size} + lane]")
        tree(text, 1, size)
        with text.nest("if lane == 0"):
            text(f"loss[0] = shared_0[0] * {number(1 / count)}")


@schedule("loss.elementwise", device="opencl")
def elementwise(problem: Elementwise, target: Target) -> str:
    output, gradient = problem.output, problem.gradient
    batch, width = output.batch, output.channels
    count = batch * width
    text = DeviceText(
        scalars("output", output.elems),
        scalars("targets", count),
        scalars("loss", 1),
        scalars("gradient", gradient.elems),
    )
    text.scratch("losses", batch)
    slope = _element("gradient", gradient, "k")
    names = {"output": _element("output", output, "k"), "target": f"targets[n * {width} + k]"}
    with text.each(gradient.lanes, target.limits.threads):
        with text.nest(f"if n < {batch}"):
            text.private("total", 1)
            text("total[0] = T.float32(0)")
            with text.nest(f"for k in T.serial({width})"):
                text(
                    f"total[0] = total[0] + ({written(problem.term, names, number)})",
                    f"{slope} = ({written(problem.slope, names, number)}) * {number(1 / count)}",
                )
            text("losses[n] = total[0]")
        with text.nest("else", f"for k in T.serial({width})"):
            text(f"{slope} = T.float32(0)")
    _add_up(text, batch, count, target)
    return str(text)


@schedule("loss.cross_entropy", device="opencl")
def cross_entropy(problem: SoftmaxCrossEntropy, target: Target) -> str:
    logits, dlogits = problem.logits, problem.dlogits
    batch, classes = logits.batch, logits.channels
    text = DeviceText(
        scalars("logits", logits.elems),
        scalars("labels", batch, "int32"),
        scalars("loss", 1),
        scalars("correct", batch, "int32"),
        scalars("dlogits", dlogits.elems),
    )
    text.scratch("losses", batch)
    first, logit = (_element("logits", logits, channel) for channel in ("0", "k"))
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
    with text.each(dlogits.lanes, target.limits.threads):
        with text.nest(f"if n < {batch}"):
            for name, dtype in (("best", "float32"), ("winner", "int32"), ("total", "float32"), ("chosen", "float32")):
                text.private(name, 1, dtype)
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
        with text.nest("else", f"for k in T.serial({classes})"):
            text(f"{gradient} = T.float32(0)")
    _add_up(text, batch, batch, target)
    return str(text)

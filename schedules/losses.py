"""What losses compute for an answer, on every kind of device. An answer is an example, or of maps a pixel of one; `n`
counts them as labels (N, H, W) do, flat.
"""

from __future__ import annotations

from collections.abc import Callable

from mest_compile.ir.infix import written
from mest_compile.ir.layouts.batch import Image
from mest_compile.operators.losses.cross_entropy import SoftmaxCrossEntropy
from mest_compile.operators.losses.elementwise import Elementwise
from mest_compile.operators.losses.soft_targets import SoftTargets

Writer = Callable[..., None]  # of statements
Declare = Callable[[str, int, str], None]  # of an answer's own variables: name, elements, dtype
Number = Callable[[float], str]  # a float32

# NaN is the largest, the first one of several.
LARGER = 'T.Select({logit} <= T.float32("inf"), {logit} > best[0], best[0] <= T.float32("inf"))'


def pixels(image: Image) -> int:
    return image.height * image.width


def answers(image: Image) -> int:
    return image.batch * pixels(image)


def element(name: str, image: Image, channel: str) -> str:
    """That of a channel and of answer n."""
    if pixels(image) == 1:
        return (
            f"{name}[n // {image.vector} * {image.slice_elems} + {channel} * {image.channel_elems} + {image.origin}"
            f" + n % {image.vector}]"
        )
    return (
        f"{name}[n // {pixels(image)} // {image.vector} * {image.slice_elems} + {channel} * {image.channel_elems} + "
        f"{image.origin} + n % {pixels(image)} // {image.width} * {image.row_elems} + n % {image.width} * "
        f"{image.vector} + n // {pixels(image)} % {image.vector}]"
    )


def target(name: str, image: Image) -> str:
    """That of channel k and of answer n in an array (N, k, H, W)."""
    width, size = image.channels, pixels(image)
    return f"{name}[n * {width} + k]" if size == 1 else f"{name}[(n // {size} * {width} + k) * {size} + n % {size}]"


def elementwise(
    text: Writer, nest: Callable, declare: Declare, number: Number, problem: Elementwise, read: str
) -> None:
    """Sets losses[n] and its part of the gradient. read: the element k of the output."""
    output = problem.output
    names = {"output": read, "target": target("targets", output), "weight": "weights[k]"}
    slope, count = element("gradient", problem.gradient, "k"), answers(output) * output.channels
    declare("total", 1, "float32")
    text("total[0] = T.float32(0)")
    with nest(f"for k in T.serial({output.channels})"):
        text(
            f"total[0] = total[0] + ({written(problem.term, names, number)})",
            f"{slope} = ({written(problem.slope, names, number)}) * {number(1 / count)}",
        )
    text("losses[n] = total[0]")


def cross_entropy(
    text: Writer, nest: Callable, declare: Declare, number: Number, problem: SoftmaxCrossEntropy, first: str, logit: str
) -> None:
    """Sets losses[n], correct[n] and its part of the gradient. first, logit: element 0 and element k of the logits."""
    classes, gradient = problem.logits.channels, element("dlogits", problem.dlogits, "k")
    share = problem.smoothing / classes
    weigh = " * weights[k]" if problem.scaled else ""
    # Without smoothing only the label's logit counts: 0 times what another one is below the largest need not be 0.
    if share:
        add = f"chosen[0] + {{wanted}} * ({logit} - best[0])"
    else:
        add = f"T.Select(k == labels[n], {'weights[k] * (' if weigh else ''}{logit} - best[0]{')' if weigh else ''}, "
        add += "chosen[0])"
    wanted = f"T.Select(k == labels[n], {number(1 - problem.smoothing + share)}, {number(share)}){weigh}"
    variables = [("best", "float32"), ("winner", "int32"), ("total", "float32"), ("chosen", "float32")]
    for name, dtype in [*variables, *([("mass", "float32")] if problem.scaled else [])]:
        declare(name, 1, dtype)
    text(f"best[0] = {first}", "winner[0] = 0", "total[0] = T.float32(0)", "chosen[0] = T.float32(0)")
    if problem.scaled:
        text("mass[0] = T.float32(0)")
    with nest(f"for k in T.serial({classes})", f"if {LARGER.format(logit=logit)}"):
        text(f"best[0] = {logit}", "winner[0] = k")
    with nest(f"for k in T.serial({classes})"):
        text(
            f"{gradient} = T.exp({logit} - best[0])",
            f"total[0] = total[0] + {gradient}",
            f"chosen[0] = {add.format(wanted=wanted)}",
        )
        if problem.scaled:
            text(f"mass[0] = mass[0] + {wanted}")
    value = "T.log(total[0]) - chosen[0]"
    if problem.scaled:
        value = "T.Select(labels[n] >= 0, T.log(total[0]) * mass[0] - chosen[0], T.float32(0))"
    text(f"losses[n] = {value}", "correct[n] = T.Select(winner[0] == labels[n], 1, 0)")
    with nest(f"for k in T.serial({classes})"):
        if problem.scaled:
            slope = f"{gradient} / total[0] * mass[0] - {wanted}"
            text(f"{gradient} = T.Select(labels[n] >= 0, {slope}, T.float32(0)) * scales[0]")
        else:
            text(f"{gradient} = ({gradient} / total[0] - {wanted}) * {number(1 / answers(problem.logits))}")


def soft_targets(
    text: Writer, nest: Callable, declare: Declare, number: Number, problem: SoftTargets, first: str, logit: str
) -> None:
    """Sets losses[n], correct[n] and its part of the gradient. first, logit: element 0 and element k of the output."""
    classes, gradient = problem.output.channels, element("gradient", problem.gradient, "k")
    wanted = target("wanted", problem.output)
    sharp, mild = f"{logit} - best[0]", f"({logit} - best[0]) * {number(1 / problem.temperature)}"
    variables = ["best"]
    if problem.hard:
        variables += ["total", "chosen"]
    if problem.soft:
        variables += ["spread", "mass", "parts"]
    for name in variables:
        declare(name, 1, "float32")
    declare("winner", 1, "int32")
    text(f"best[0] = {first}", "winner[0] = 0", *(f"{name}[0] = T.float32(0)" for name in variables[1:]))
    with nest(f"for k in T.serial({classes})", f"if {LARGER.format(logit=logit)}"):
        text(f"best[0] = {logit}", "winner[0] = k")
    losses, slopes = [], []
    with nest(f"for k in T.serial({classes})"):
        if problem.hard:
            text(
                f"total[0] = total[0] + T.exp({sharp})",
                f"chosen[0] = T.Select(k == labels[n], {sharp}, chosen[0])",
            )
            losses.append(f"{number(problem.hard)} * (T.log(total[0]) - chosen[0])")
            slopes.append(
                f"{number(problem.hard)} * (T.exp({sharp}) / total[0] - "
                "T.Select(k == labels[n], T.float32(1), T.float32(0)))"
            )
        if problem.soft:
            # What is not wanted does not count, however small it is.
            text(
                f"spread[0] = spread[0] + T.exp({mild})",
                f"mass[0] = mass[0] + {wanted}",
                f"parts[0] = parts[0] + T.Select({wanted} == T.float32(0), T.float32(0), {mild} * {wanted})",
            )
            if problem.divergence:
                tiny = number(2.0**-126)
                entropy = f"{wanted} * T.log(T.max({tiny}, {wanted}))"
                text(f"parts[0] = parts[0] - T.Select({wanted} > T.float32(0), {entropy}, T.float32(0))")
            losses.append(f"{number(problem.soft)} * (T.log(spread[0]) * mass[0] - parts[0])")
            slopes.append(
                f"{number(problem.soft / problem.temperature)} * (T.exp({mild}) / spread[0] * mass[0] - {wanted})"
            )
    text(f"losses[n] = {' + '.join(losses)}", "correct[n] = T.Select(winner[0] == labels[n], 1, 0)")
    with nest(f"for k in T.serial({classes})"):
        text(f"{gradient} = ({' + '.join(slopes)}) * {number(1 / answers(problem.output))}")

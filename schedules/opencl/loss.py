"""Losses on OpenCL: a thread for each answer; then one work-group adds the losses up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.losses.cross_entropy import SoftmaxCrossEntropy
from mest_compile.operators.losses.elementwise import Elementwise
from mest_compile.operators.losses.soft_targets import SoftTargets
from mest_compile.schedules import losses
from mest_compile.schedules.opencl.sums import tree
from mest_compile.schedules.opencl.text import DeviceText, number, scalars, whole_groups


@contextmanager
def _each(text: DeviceText, name: str, image: Image, target: Target) -> Iterator[None]:
    """A thread for each answer `n`, of lanes without an example too, where the gradient becomes 0."""
    with text.each(image.lanes * losses.pixels(image), target.limits.threads):
        with text.nest(f"if n < {losses.answers(image)}"):
            yield
        with text.nest("else", f"for k in T.serial({image.channels})"):
            text(f"{losses.element(name, image, 'k')} = T.float32(0)")


def _add_up(text: DeviceText, answers: int, factor: str, target: Target) -> None:
    """The loss: `losses` of all answers times a factor."""
    size = whole_groups(answers, target.limits.threads)
    with text.groups(size, 1):
        text.shared(1, size, "float32")
        text("shared_0[lane] = T.float32(0)")
        with text.nest(f"for turn in T.serial({-(-answers // size)})", f"if turn * {size} + lane < {answers}"):
            text(f"shared_0[lane] = shared_0[lane] + losses[turn * {size} + lane]")
        tree(text, 1, size)
        with text.nest("if lane == 0"):
            text(f"loss[0] = shared_0[0] * {factor}")


@schedule("loss.elementwise", device="opencl")
def elementwise(problem: Elementwise, target: Target) -> str:
    output, gradient = problem.output, problem.gradient
    answers, width = losses.answers(output), output.channels
    text = DeviceText(
        scalars("output", output.elems),
        scalars("targets", answers * width),
        *([scalars("weights", width)] if problem.weighted else []),
        scalars("loss", 1),
        scalars("gradient", gradient.elems),
    )
    text.scratch("losses", answers)
    with _each(text, "gradient", gradient, target):
        losses.elementwise(text, text.nest, text.private, number, problem, losses.element("output", output, "k"))
    _add_up(text, answers, number(1 / (answers * width)), target)
    return str(text)


@schedule("loss.cross_entropy", device="opencl")
def cross_entropy(problem: SoftmaxCrossEntropy, target: Target) -> str:
    logits, dlogits = problem.logits, problem.dlogits
    answers, classes = losses.answers(logits), logits.channels
    text = DeviceText(
        scalars("logits", logits.elems),
        scalars("labels", answers, "int32"),
        *([scalars("weights", classes), scalars("scales", 2)] if problem.scaled else []),
        scalars("loss", 1),
        scalars("correct", answers, "int32"),
        scalars("dlogits", dlogits.elems),
    )
    text.scratch("losses", answers)
    first, logit = (losses.element("logits", logits, channel) for channel in ("0", "k"))
    with _each(text, "dlogits", dlogits, target):
        losses.cross_entropy(text, text.nest, text.private, number, problem, first, logit)
    _add_up(text, answers, "scales[1]" if problem.scaled else number(1 / answers), target)
    return str(text)


@schedule("loss.soft_targets", device="opencl")
def soft_targets(problem: SoftTargets, target: Target) -> str:
    output, gradient = problem.output, problem.gradient
    answers, classes = losses.answers(output), output.channels
    text = DeviceText(
        scalars("output", output.elems),
        scalars("labels", answers, "int32"),
        scalars("wanted", answers * classes),
        scalars("loss", 1),
        scalars("correct", answers, "int32"),
        scalars("gradient", gradient.elems),
    )
    text.scratch("losses", answers)
    first, logit = (losses.element("output", output, channel) for channel in ("0", "k"))
    with _each(text, "gradient", gradient, target):
        losses.soft_targets(text, text.nest, text.private, number, problem, first, logit)
    _add_up(text, answers, number(1 / answers), target)
    return str(text)

"""Softmax cross-entropy on OpenCL."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.operators.losses.cross_entropy import CrossEntropy
from mest_compile.schedules.opencl.sums import tree
from mest_compile.schedules.opencl.text import Text, number, scalars, whole_groups


@schedule("loss.cross_entropy", device="opencl")
def cross_entropy(problem: CrossEntropy, target: Target) -> str:
    """A thread for each lane; then one work-group adds the losses up."""
    logits, dlogits = problem.logits, problem.dlogits
    batch, classes = logits.batch, logits.channels
    text = Text(scalars("logits", logits.elems), scalars("labels", batch, "int32"), scalars("loss", 1), scalars("correct", batch, "int32"),
                scalars("dlogits", dlogits.elems))
    text.scratch("losses", batch)
    logit, gradient = (f"{name}[n // {layout.vector} * {layout.slice_elems} + {{}} * {layout.channel_elems} + {layout.origin}"
                       f" + n % {layout.vector}]" for name, layout in (("logits", logits), ("dlogits", dlogits)))
    first, logit, gradient = logit.format(0), logit.format("k"), gradient.format("k")
    share = problem.smoothing / classes
    # Without smoothing only the label's logit counts: 0 times what another one is below the largest need not be 0.
    add = "chosen[0] + {wanted} * ({logit} - best[0])" if share else "T.Select(k == labels[n], {logit} - best[0], chosen[0])"
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
                text(f"{gradient} = T.exp({logit} - best[0])", f"total[0] = total[0] + {gradient}",
                     f"chosen[0] = {add.format(wanted=wanted, logit=logit)}")
            text("losses[n] = T.log(total[0]) - chosen[0]", "correct[n] = T.Select(winner[0] == labels[n], 1, 0)")
            with text.nest(f"for k in T.serial({classes})"):
                text(f"{gradient} = ({gradient} / total[0] - {wanted}) * {number(1 / batch)}")
        with text.nest("else", f"for k in T.serial({classes})"):
            text(f"{gradient} = T.float32(0)")
    size = whole_groups(batch, target.limits.threads)
    with text.groups(size, 1):
        text.shared(1, size, "float32")
        text("shared_0[lane] = T.float32(0)")
        with text.nest(f"for turn in T.serial({-(-batch // size)})", f"if turn * {size} + lane < {batch}"):
            text(f"shared_0[lane] = shared_0[lane] + losses[turn * {size} + lane]")
        tree(text, 1, size)
        with text.nest("if lane == 0"):
            text(f"loss[0] = shared_0[0] * {number(1 / batch)}")
    return str(text)

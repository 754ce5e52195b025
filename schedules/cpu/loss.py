"""Softmax cross-entropy on a CPU."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.operators.losses.cross_entropy import CrossEntropy
from mest_compile.schedules.cpu.rows import Text, array, buffer, loop, number, widened


@schedule("loss.cross_entropy", device="cpu")
def cross_entropy(problem: CrossEntropy, target: Target) -> str:
    """Example by example; the logits of a batch fit into the cache."""
    logits, dlogits = problem.logits, problem.dlogits
    batch, classes = logits.batch, logits.channels
    text = Text(array("logits", logits), buffer("labels", batch, "int32"), buffer("loss", 1), buffer("correct", batch, "int32"),
                buffer("dlogits", dlogits.elems))
    text(f'losses = T.alloc_buffer(({batch},), "float32")')
    logit, gradient = (f"{name}[n // {image.vector} * {image.slice_elems} + {{}} * {image.channel_elems} + {image.origin}"
                       f" + n % {image.vector}]" for name, image in (("logits", logits), ("dlogits", dlogits)))
    first, logit, gradient = widened(logits, logit.format(0)), widened(logits, logit.format("k")), gradient.format("k")
    share = problem.smoothing / classes
    # Without smoothing only the label's logit counts: 0 times what another one is below the largest need not be 0.
    add = "chosen[0] + {wanted} * ({logit} - best[0])" if share else "T.Select(k == labels[n], {logit} - best[0], chosen[0])"
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
            text(f"{gradient} = T.exp({logit} - best[0])", f"total[0] = total[0] + {gradient}",
                 f"chosen[0] = {add.format(wanted=wanted, logit=logit)}")
        text("losses[n] = T.log(total[0]) - chosen[0]", "correct[n] = T.Select(winner[0] == labels[n], 1, 0)")
        with text.nest(f"for k in T.serial({classes})"):
            text(f"{gradient} = ({gradient} / total[0] - {wanted}) * {number(1 / batch)}")
    if batch < dlogits.lanes:
        with text.nest(f"for k in T.serial({classes})", f"for i in T.serial({dlogits.lanes - batch})"):
            last = (dlogits.slices - 1) * dlogits.slice_elems + dlogits.origin + batch % dlogits.vector
            text(f"dlogits[k * {dlogits.channel_elems} + {last} + i] = T.float32(0)")
    text.local("joined", 1, "float64")
    text("joined[0] = T.float64(0)")
    with text.nest(f"for n in T.serial({batch})"):
        text('joined[0] = joined[0] + T.cast(losses[n], "float64")')
    text(f'loss[0] = T.cast(joined[0] * {number(1 / batch, "float64")}, "float32")')
    return str(text)

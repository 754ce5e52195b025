"""What is added to an attention's scores, and the gradient of its table, on OpenCL."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.operators.attention_bias import AttentionBias, AttentionTable
from mest_compile.schedules.cpu.attention_bias import mask_at
from mest_compile.schedules.opencl.text import DeviceText, scalars


@schedule("attention.bias", device="opencl")
def attention_bias(problem: AttentionBias, target: Target) -> str:
    heads, groups, queries, keys = problem.sizes
    pairs = queries * keys
    text = DeviceText(
        scalars("table", problem.table),
        scalars("places", pairs, "int32"),
        *([scalars("mask", problem.mask[0] * problem.mask[1] * pairs)] if problem.mask else []),
        scalars("bias", heads * groups * pairs),
    )
    with text.each(heads * groups * pairs, target.limits.threads):
        text(f"head: T.let = n // {groups * pairs}", f"group: T.let = n // {pairs} % {groups}")
        text(f"t: T.let = n % {pairs}")
        more = f" + {mask_at(problem)}" if problem.mask else ""
        text(f"bias[n] = table[places[t] + head * {problem.apart}]{more}")
    return str(text)


@schedule("attention.table", device="opencl")
def attention_table(problem: AttentionTable, target: Target) -> str:
    """A thread for each element of the table."""
    pairs, heads, groups = problem.pairs, problem.heads, problem.groups
    text = DeviceText(
        scalars("dscores", problem.slices * heads * groups * pairs),
        scalars("order", heads * pairs, "int32"),
        scalars("firsts", problem.table + 1, "int32"),
        scalars("dtable", problem.table),
    )
    with text.each(problem.table, target.limits.threads):
        text.private("total", 1)
        text("total[0] = T.float32(0)")
        with text.nest("for t in T.serial(firsts[n + 1] - firsts[n])"):
            text("place: T.let = order[firsts[n] + t]")
            first = f"((s * {heads} + place // {pairs}) * {groups} + g) * {pairs} + place % {pairs}"
            with text.nest(f"for s in T.serial({problem.slices})", f"for g in T.serial({groups})"):
                text(f"total[0] = total[0] + dscores[{first}]")
        text("dtable[n] = total[0]")
    return str(text)

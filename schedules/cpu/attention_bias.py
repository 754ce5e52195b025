"""What is added to an attention's scores, and the gradient of its table, on a CPU."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.attention import Attention
from mest_compile.operators.attention_bias import AttentionBias, AttentionTable
from mest_compile.schedules.cpu.rows import buffer, loop


def bias_at(problem: Attention) -> str:
    """Where the biases of `head` (of all slices) and `group` begin."""
    assert problem.bias
    heads, groups = problem.bias
    head = f"head % {problem.heads}" if heads > 1 else "0"
    group = "group" if groups > 1 else "0"
    return f"(({head}) * {groups} + {group}) * {problem.tokens[0] * problem.tokens[1]}"


def mask_at(problem: AttentionBias) -> str:
    """The element of the mask that belongs to the pair `t` of `head` and `group`."""
    assert problem.mask
    heads, groups = problem.mask
    pairs = problem.sizes[2] * problem.sizes[3]
    first = f"({'head' if heads > 1 else '0'} * {groups} + {'group' if groups > 1 else '0'}) * {pairs}"
    return f"mask[{first} + t]"


@schedule("attention.bias", device="cpu")
def attention_bias(problem: AttentionBias, target: Target) -> str:
    heads, groups, queries, keys = problem.sizes
    pairs = queries * keys
    text = Text(
        buffer("table", problem.table),
        buffer("places", pairs, "int32"),
        *([buffer("mask", problem.mask[0] * problem.mask[1] * pairs)] if problem.mask else []),
        buffer("bias", heads * groups * pairs),
    )
    with text.nest(f"for n in {loop(heads * groups, heads * groups * pairs)}"):
        text(f"head: T.let = n // {groups}", f"group: T.let = n % {groups}")
        with text.nest(f"for t in T.serial({pairs})"):
            more = f" + {mask_at(problem)}" if problem.mask else ""
            text(f"bias[n * {pairs} + t] = table[places[t] + head * {problem.apart}]{more}")
    return str(text)


@schedule("attention.table", device="cpu")
def attention_table(problem: AttentionTable, target: Target) -> str:
    pairs, heads, groups = problem.pairs, problem.heads, problem.groups
    elems = problem.slices * heads * groups * pairs
    text = Text(
        buffer("dscores", elems),
        buffer("order", heads * pairs, "int32"),
        buffer("firsts", problem.table + 1, "int32"),
        buffer("dtable", problem.table),
    )
    with text.nest(f"for n in {loop(problem.table, elems)}"):
        text.local("total", 1, "float64")
        text("total[0] = T.float64(0)")
        with text.nest("for t in T.serial(firsts[n + 1] - firsts[n])"):
            text("place: T.let = order[firsts[n] + t]")
            first = f"((s * {heads} + place // {pairs}) * {groups} + g) * {pairs} + place % {pairs}"
            with text.nest(f"for s in T.serial({problem.slices})", f"for g in T.serial({groups})"):
                text(f'total[0] = total[0] + T.cast(dscores[{first}], "float64")')
        text('dtable[n] = T.cast(total[0], "float32")')
    return str(text)

"""Attention on OpenCL: a thread for each query, or key, of a head and a vector of examples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.operators.attention import Attention, AttentionBackward
from mest_compile.schedules.cpu.attention_bias import bias_at
from mest_compile.schedules.opencl.sums import fold
from mest_compile.schedules.opencl.text import (
    DeviceText,
    full,
    image,
    number,
    only_examples,
    plane_vectors,
    scalars,
    slots,
    vector_type,
    vectors,
    zeros,
)


@contextmanager
def _each_token(
    text: DeviceText, problem: Attention, images: dict[str, Image], keys: bool, size: int
) -> Iterator[None]:
    """A thread for each query, or key, of every head: sets `head` (of all slices), `group`, `mine_r` and `mine_w`,
    where the token is in it, and `<name>_head`, where a group's first pixel lies in the head's first channel."""
    rows, layout = problem.rows[keys], problem.k if keys else problem.q
    tokens, groups, heads = rows * layout.width, problem.groups, problem.heads
    with text.each(problem.q.slices * heads * groups * tokens, size):
        text(
            f"head: T.let = n // {groups * tokens}",
            f"group: T.let = n // {tokens} % {groups}",
            f"mine_r: T.let = n % {tokens} // {layout.width}",
            f"mine_w: T.let = n % {layout.width}",
        )
        if problem.bias:
            text(f"bias_head: T.let = {bias_at(problem)}")
        for name, one in images.items():
            channels = one.channels // heads * plane_vectors(one)
            first = one.halo[0] * one.columns + one.halo[1]
            text(f"{name}_head: T.let = head * {channels} + group * {one.height // groups * one.columns} + {first}")
        yield


def _at(name: str, layout: Image, row: str, column: str) -> str:
    return f"{name}[{name}_head + c * {plane_vectors(layout)} + ({row}) * {layout.columns} + {column}]"


def _dot(text: DeviceText, result: str, channels: int, left: str, right: str, vector: int) -> None:
    text(f"{result}[0] = {zeros(vector)}")
    with text.nest(f"for c in T.serial({channels})"):
        text(f"{result}[0] = {result}[0] + {left} * {right}")


def _score(text: DeviceText, problem: Attention, query: tuple[str, str], key: tuple[str, str]) -> None:
    """Sets `score`: the scaled product of a query and a key."""
    q, k, vector = problem.q, problem.k, problem.q.vector
    _dot(text, "score", problem.depth, _at("q", q, *query), _at("k", k, *key), vector)
    text(f"score[0] = score[0] * {full(number(problem.scale), vector)}")
    if problem.bias:
        element = f"bias[bias_head + {_pair(problem, query, key)}]"
        text(f"score[0] = score[0] + {full(element, vector)}")


def _pair(problem: Attention, query: tuple[str, str], key: tuple[str, str]) -> str:
    """Number of a query and a key among those of a group."""
    (row, column), (key_row, key_column) = query, key
    mine, theirs = f"{row} * {problem.q.width} + {column}", f"{key_row} * {problem.k.width} + {key_column}"
    return f"({mine}) * {problem.tokens[1]} + {theirs}"


MINE, THEIRS = ("mine_r", "mine_w"), ("r", "w")  # row and column of tokens
LEAST = 'T.float32("-inf")'


@contextmanager
def _each_other(text: DeviceText, problem: Attention, keys: bool) -> Iterator[None]:
    """A loop over the keys that a query sees, or the queries that see a key: sets `r` and `w`."""
    rows, layout = problem.rows[keys], problem.k if keys else problem.q
    query, key = (MINE, THEIRS) if keys else (THEIRS, MINE)
    numbers = (f"{row} * {one.width} + {column}" for (row, column), one in ((key, problem.k), (query, problem.q)))
    seen = [f"if {' <= '.join(numbers)}"] if problem.causal else []
    with text.nest(f"for r in T.serial({rows})", f"for w in T.serial({layout.width})", *seen):
        yield


@schedule("attention.forward", device="opencl")
def attention_forward(problem: Attention, target: Target) -> str:
    """Scores twice: for the largest, then for what each key weighs."""
    q, k, v, y, vector = problem.q, problem.k, problem.v, problem.y, problem.q.vector
    images, threads = {"q": q, "k": k, "v": v, "y": y}, target.limits.threads
    arguments = [image(name, one) for name, one in images.items()]
    if problem.bias:
        arguments.insert(3, scalars("bias", problem.bias_elems))
    text = DeviceText(*arguments, vectors("sums", problem.sums_elems, vector))
    with _each_token(text, problem, images, False, threads):
        for name, elems in ("score", 1), ("most", 1), ("total", 1), ("result", problem.width):
            text.private(name, elems, vector_type(vector))
        text(f"most[0] = {full(LEAST, vector)}", f"total[0] = {zeros(vector)}")
        with text.nest(f"for c in T.serial({problem.width})"):
            text(f"result[c] = {zeros(vector)}")
        with _each_other(text, problem, True):
            _score(text, problem, MINE, THEIRS)
            text("most[0] = T.Select(score[0] <= most[0], most[0], score[0])")  # NaN stays
        with _each_other(text, problem, True):
            _score(text, problem, MINE, THEIRS)
            text("score[0] = T.exp(score[0] - most[0])", "total[0] = total[0] + score[0]")
            with text.nest(f"for c in T.serial({problem.width})"):
                text(f"result[c] = result[c] + score[0] * {_at('v', v, *THEIRS)}")
        with text.nest(f"for c in T.serial({problem.width})"):
            text(f"{_at('y', y, *MINE)} = result[c] / total[0]")
        text("sums[n] = most[0] + T.log(total[0])")
    return str(text)


@schedule("attention.backward", device="opencl")
def attention_backward(problem: AttentionBackward, target: Target) -> str:
    """What queries get, a thread each; then what keys and values get."""
    forward, dy, threads = problem.forward, problem.dy, target.limits.threads
    q, k, v, y, vector = forward.q, forward.k, forward.v, forward.y, forward.q.vector
    given = {"dy": dy, "q": q, "k": k, "v": v, "y": y}
    results = {name: one for name, one in (("dq", problem.dq), ("dk", problem.dk), ("dv", problem.dv)) if one}
    more = dict(zip(("dq", "dk", "dv"), problem.accumulate, strict=True))
    arguments = [image(name, one) for name, one in given.items()]
    if forward.bias:
        arguments.insert(4, scalars("bias", forward.bias_elems))
    text = DeviceText(
        *arguments,
        vectors("sums", forward.sums_elems, vector),
        *(image(name, one) for name, one in results.items()),
        *([scalars("dscores_sums", problem.dscores_elems)] if problem.biased else []),
    )
    text.scratch("due", forward.sums_elems)

    def privates(**elems: int) -> None:
        for name, count in elems.items():
            text.private(name, count, vector_type(vector))

    def clear(name: str, channels: int) -> None:
        with text.nest(f"for c in T.serial({channels})"):
            text(f"{name}[c] = {zeros(vector)}")

    def add(name: str, channels: int, total: str) -> None:
        with text.nest(f"for c in T.serial({channels})"):
            here = _at(name, results[name], *MINE)
            text(f"{here} = {here} + {total}[c]" if more[name] else f"{here} = {total}[c]")

    def shares(query: tuple[str, str], key: tuple[str, str], number_of: str) -> None:
        """Sets `score` to a key's share, and `dshare` to what is due to their product."""
        _score(text, forward, query, key)
        _dot(text, "dshare", forward.width, _at("dy", dy, *query), _at("v", v, *key), vector)
        due = f"due[{slots(f'({number_of}) * {vector}', vector)}]"
        text(
            f"score[0] = T.exp(score[0] - sums[{number_of}])",
            f"dshare[0] = score[0] * (dshare[0] - {due})",
        )

    def scale() -> None:
        text(f"dshare[0] = dshare[0] * {full(number(forward.scale), vector)}")

    with _each_token(text, forward, given | results, False, threads):
        privates(score=1, dshare=1, total=forward.depth)
        _dot(text, "score", forward.width, _at("dy", dy, *MINE), _at("y", y, *MINE), vector)
        text(f"due[{slots(f'n * {vector}', vector)}] = score[0]")
        if "dq" in results or problem.biased:
            clear("total", forward.depth)
            with _each_other(text, forward, True):
                shares(MINE, THEIRS, "n")
                if problem.biased:
                    each, keys = forward.heads * forward.groups * forward.tokens[0], forward.tokens[1]
                    row, column = f"n * {keys}", f"{THEIRS[0]} * {k.width} + {THEIRS[1]}"
                    summed = only_examples(q, f"n // {each}", "dshare[0]")
                    text(f"dshare[0] = {summed}", f"dscores_sums[{row} + {column}] = {fold('dshare[0]', vector)}")
                scale()
                with text.nest(f"for c in T.serial({forward.depth})"):
                    text(f"total[c] = total[c] + dshare[0] * {_at('k', k, *THEIRS)}")
            if "dq" in results:
                add("dq", forward.depth, "total")
    if "dk" in results or "dv" in results:
        with _each_token(text, forward, given | results, True, threads):
            privates(score=1, dshare=1, total=forward.depth, result=forward.width)
            clear("total", forward.depth)
            clear("result", forward.width)
            with _each_other(text, forward, False):
                first = f"(head * {forward.groups} + group) * {forward.tokens[0]}"
                shares(THEIRS, MINE, f"{first} + r * {q.width} + w")
                scale()
                if "dk" in results:
                    with text.nest(f"for c in T.serial({forward.depth})"):
                        text(f"total[c] = total[c] + dshare[0] * {_at('q', q, *THEIRS)}")
                if "dv" in results:
                    with text.nest(f"for c in T.serial({forward.width})"):
                        text(f"result[c] = result[c] + score[0] * {_at('dy', dy, *THEIRS)}")
            if "dk" in results:
                add("dk", forward.depth, "total")
            if "dv" in results:
                add("dv", forward.width, "result")
    return str(text)

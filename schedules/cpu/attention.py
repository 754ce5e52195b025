"""Attention on a CPU: a tile of queries against all keys of its head, vectors of examples throughout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.attention import Attention, AttentionBackward
from mest_compile.schedules.cpu.attention_bias import bias_at
from mest_compile.schedules.cpu.rows import array, buffer, loop, narrowed, number, widened, zero

QUERIES, KEYS = 4, 2  # of a tile: eight sums and what they are made of fit sixteen registers


@contextmanager
def _each_head(text: Text, problem: Attention, images: dict[str, Image]) -> Iterator[None]:
    """A loop over the heads and groups of all slices: sets `<name>_head`, where the first pixel of a group lies in the
    first channel of a head, for every image, and `sums_head`."""
    heads, groups = problem.heads, problem.groups
    with text.nest(f"for n in {loop(problem.q.slices * heads * groups, problem.q.elems * problem.tokens[1])}"):
        text(
            f"head: T.let = n // {groups}",
            f"group: T.let = n % {groups}",
            f"sums_head: T.let = n * {problem.tokens[0] * problem.q.vector}",
        )
        if problem.bias:
            text(f"bias_head: T.let = {bias_at(problem)}")
        for name, image in images.items():
            rows = image.height // groups
            channels = image.channels // heads * image.channel_elems
            text(f"{name}_head: T.let = head * {channels} + group * {rows * image.row_elems} + {image.origin}")
        yield


def _tiles(text: Text, rows: int, width: int, size: int, prefix: str, body: Callable[..., None]) -> None:
    """body(row, first column, columns) for tiles of `size` tokens of a row, and for one of those that are left over."""
    main, rest = divmod(width, size)
    with text.nest(f"for {prefix}r in T.serial({rows})"):
        if main:
            with text.nest(f"for {prefix}t in T.serial({main})"):
                body(f"{prefix}r", f"{prefix}t * {size}", size)
        if rest:
            body(f"{prefix}r", str(main * size), rest)


def _at(name: str, image: Image, row: str, column: str, channel: str = "c") -> str:
    return (
        f"{name}[{name}_head + {channel} * {image.channel_elems} + ({row}) * {image.row_elems} + "
        f"({column}) * {image.vector} + i]"
    )


def _read(name: str, image: Image, row: str, column: str, channel: str = "c") -> str:
    return widened(image, _at(name, image, row, column, channel))


def _scores(text: Text, problem: Attention, row: str, column: str, many: int, keys: tuple[Any, ...]) -> None:
    """Sets `score` (keys, QUERIES): the scaled product of each query of the tile and each of the keys."""
    vector, (key_row, key_column, count) = problem.q.vector, keys
    zero(text, "score", KEYS * QUERIES * vector, vector)
    loops = f"for u in T.unroll({count})", f"for j in T.unroll({many})", f"for i in T.vectorized({vector})"
    slot = f"score[(u * {QUERIES} + j) * {vector} + i]"
    with text.nest(f"for c in T.serial({problem.depth})", *loops):
        q = _read("q", problem.q, row, f"{column} + j")
        text(f"{slot} = {slot} + {q} * {_read('k', problem.k, key_row, f'{key_column} + u')}")
    with text.nest(*loops):
        scaled = f"{slot} * {number(problem.scale)}"
        if problem.bias:
            query, key = (
                f"({row} * {problem.q.width} + {column} + j)",
                f"{key_row} * {problem.k.width} + {key_column} + u",
            )
            scaled += f" + bias[bias_head + {query} * {problem.tokens[1]} + {key}]"
        if problem.causal:
            seen = f"{key_row} * {problem.k.width} + {key_column} + u <= {row} * {problem.q.width} + {column} + j"
            scaled = f'T.Select({seen}, {scaled}, T.float32("-inf"))'
        text(f"{slot} = {scaled}")


def _place(problem: Attention, keys: tuple[Any, ...], vector: int) -> str:
    """Of a score among those of the tile: all keys, then QUERIES."""
    return f"((({keys[0]}) * {problem.k.width} + {keys[1]} + u) * {QUERIES} + j) * {vector} + i"


@schedule("attention.forward", device="cpu")
def attention_forward(problem: Attention, target: Target) -> str:
    q, k, v, y = problem.q, problem.k, problem.v, problem.y
    vector, (_, keys) = q.vector, problem.tokens
    images = {"q": q, "k": k, "v": v, "y": y}
    arguments = [array(name, image) for name, image in images.items()]
    if problem.bias:
        arguments.insert(3, buffer("bias", problem.bias_elems))
    text = Text(*arguments, buffer("sums", problem.sums_elems))
    lanes = f"for i in T.vectorized({vector})"

    def tile(row: str, column: str, many: int) -> None:
        each = f"for j in T.unroll({many})", lanes
        with text.nest(*each):
            text(f'most[j * {vector} + i] = T.float32("-inf")', f"total[j * {vector} + i] = T.float32(0)")

        def score(*key: Any) -> None:
            _scores(text, problem, row, column, many, key)
            with text.nest(f"for u in T.unroll({key[2]})", *each):
                found, most = f"score[(u * {QUERIES} + j) * {vector} + i]", f"most[j * {vector} + i]"
                text(f"scores[{_place(problem, key, vector)}] = {found}")
                text(f"{most} = T.Select({found} <= {most}, {most}, {found})")  # NaN stays

        _tiles(text, problem.rows[1], k.width, KEYS, "k", score)
        with text.nest(f"for t in T.serial({keys})", *each):
            place = f"scores[(t * {QUERIES} + j) * {vector} + i]"
            text(f"{place} = T.exp({place} - most[j * {vector} + i])")
            text(f"total[j * {vector} + i] = total[j * {vector} + i] + {place}")
        with text.nest(*each):
            first = f"sums_head + ({row} * {q.width} + {column} + j) * {vector}"
            text(f"sums[{first} + i] = most[j * {vector} + i] + T.log(total[j * {vector} + i])")
        with text.nest(f"for c in T.serial({problem.width})"):
            zero(text, "score", QUERIES * vector, vector)
            with text.nest(f"for kr, kw in T.grid({problem.rows[1]}, {k.width})", *each):
                share = f"scores[((kr * {k.width} + kw) * {QUERIES} + j) * {vector} + i]"
                value = _read("v", v, "kr", "kw")
                text(f"score[j * {vector} + i] = score[j * {vector} + i] + {share} * {value}")
            with text.nest(*each):
                result = f"score[j * {vector} + i] / total[j * {vector} + i]"
                text(f"{_at('y', y, row, f'{column} + j')} = {narrowed(y, result)}")

    with _each_head(text, problem, images):
        for name, elems in (
            ("scores", keys * QUERIES),
            ("score", KEYS * QUERIES),
            ("most", QUERIES),
            ("total", QUERIES),
        ):
            text.local(name, elems * vector)
        _tiles(text, problem.rows[0], q.width, QUERIES, "q", tile)
    return str(text)


@schedule("attention.backward", device="cpu")
def attention_backward(problem: AttentionBackward, target: Target) -> str:
    """Tile by tile of queries: their shares and what is due to their scores again, then what these give to q, k and
    v."""
    forward, dy = problem.forward, problem.dy
    q, k, v, y, dq, dk, dv = forward.q, forward.k, forward.v, forward.y, problem.dq, problem.dk, problem.dv
    vector, (_, keys) = q.vector, forward.tokens
    given = {"dy": dy, "q": q, "k": k, "v": v, "y": y}
    results = {name: image for name, image in (("dq", dq), ("dk", dk), ("dv", dv)) if image}
    arguments = [array(name, image) for name, image in given.items()]
    if forward.bias:
        arguments.insert(4, buffer("bias", forward.bias_elems))
    text = Text(
        *arguments,
        buffer("sums", forward.sums_elems),
        *(array(name, image) for name, image in results.items()),
        *([buffer("dscores_sums", problem.dscores_elems)] if problem.biased else []),
    )
    lanes = f"for i in T.vectorized({vector})"
    more = dict(zip(("dq", "dk", "dv"), problem.accumulate, strict=True))

    # What is summed over all queries is rounded once, where it is stored in two bytes.
    found = (("dk", dk, forward.depth), ("dv", dv, forward.width))
    aside = [(name, image, channels) for name, image, channels in found if image and image.dtype != "float32"]

    def over(channels: int) -> tuple[str, str]:
        return f"for c, kr, kw in T.grid({channels}, {forward.rows[1]}, {k.width})", lanes

    def summed(name: str, image: Image) -> str:
        place = f"sum_{name}[(c * {keys} + kr * {k.width} + kw) * {vector} + i]"
        return _at(name, image, "kr", "kw") if image.dtype == "float32" else place

    def tile(row: str, column: str, many: int) -> None:
        each = f"for j in T.unroll({many})", lanes
        zero(text, "due", QUERIES * vector, vector)
        with text.nest(f"for c in T.serial({forward.width})", *each):
            product = f"{_read('dy', dy, row, f'{column} + j')} * {_read('y', y, row, f'{column} + j')}"
            text(f"due[j * {vector} + i] = due[j * {vector} + i] + {product}")

        def score(*key: Any) -> None:
            _scores(text, forward, row, column, many, key)
            zero(text, "dshare", KEYS * QUERIES * vector, vector)
            unrolled = f"for u in T.unroll({key[2]})", *each
            slot = f"[(u * {QUERIES} + j) * {vector} + i]"
            with text.nest(f"for c in T.serial({forward.width})", *unrolled):
                value = _read("v", v, key[0], f"{key[1]} + u")
                text(f"dshare{slot} = dshare{slot} + {_read('dy', dy, row, f'{column} + j')} * {value}")
            with text.nest(*unrolled):
                first = f"sums_head + ({row} * {q.width} + {column} + j) * {vector}"
                place = f"[{_place(forward, key, vector)}]"
                text(
                    f"shares{place} = T.exp(score{slot} - sums[{first} + i])",
                    f"dshare{slot} = shares{place} * (dshare{slot} - due[j * {vector} + i])",
                    f"dscores{place} = dshare{slot} * {number(forward.scale)}",
                )
            if problem.biased:
                with text.nest(*unrolled[:2]):
                    query = f"({row} * {q.width} + {column} + j)"
                    here = f"dscores_sums[dscores_head + {query} * {keys} + {key[0]} * {k.width} + {key[1]} + u]"
                    text(f"{here} = T.float32(0)")
                    with text.nest(f"for i in T.serial({vector})"):
                        live = f"n // {forward.heads * forward.groups} * {vector} + i < {q.batch}"
                        term = (
                            f"dshare{slot}" if q.batch == q.lanes else f"T.Select({live}, dshare{slot}, T.float32(0))"
                        )
                        text(f"{here} = {here} + {term}")

        _tiles(text, forward.rows[1], k.width, KEYS, "k", score)
        all_keys = f"for kr, kw in T.grid({forward.rows[1]}, {k.width})"

        def place(name: str, query: str | int = "j") -> str:
            return f"{name}[((kr * {k.width} + kw) * {QUERIES} + {query}) * {vector} + i]"

        if dq:
            with text.nest(f"for c in T.serial({forward.depth})"):
                zero(text, "score", QUERIES * vector, vector)
                with text.nest(all_keys, *each):
                    product = f"{place('dscores')} * {_read('k', k, 'kr', 'kw')}"
                    text(f"score[j * {vector} + i] = score[j * {vector} + i] + {product}")
                with text.nest(*each):
                    here = _at("dq", dq, row, f"{column} + j")
                    total = f"score[j * {vector} + i]"
                    total = f"{widened(dq, here)} + {total}" if more["dq"] else total
                    text(f"{here} = {narrowed(dq, total)}")
        for name, image, source, held, channels in (
            ("dk", dk, "dscores", "q", forward.depth),
            ("dv", dv, "shares", "dy", forward.width),
        ):
            if image:
                with text.nest(*over(channels)):
                    here, held_image = summed(name, image), given[held]
                    terms = (
                        f"{place(source, j)} * {_read(held, held_image, row, f'{column} + {j}')}" for j in range(many)
                    )
                    text(f"{here} = {' + '.join((here, *terms))}")

    with _each_head(text, forward, given | results):
        if problem.biased:
            text(f"dscores_head: T.let = n * {forward.tokens[0] * keys}")
        for name, elems in (
            ("shares", keys * QUERIES),
            ("dscores", keys * QUERIES),
            ("score", KEYS * QUERIES),
            ("dshare", KEYS * QUERIES),
            ("due", QUERIES),
        ):
            text.local(name, elems * vector)
        for name, _, channels in aside:
            text.local(f"sum_{name}", channels * keys * vector)
        for name, image, channels in found:
            if image and not (more[name] and image.dtype == "float32"):
                with text.nest(*over(channels)):
                    text(f"{summed(name, image)} = T.float32(0)")
        _tiles(text, forward.rows[0], q.width, QUERIES, "q", tile)
        for name, image, channels in aside:
            with text.nest(*over(channels)):
                here = _at(name, image, "kr", "kw")
                total = f"{widened(image, here)} + {summed(name, image)}" if more[name] else summed(name, image)
                text(f"{here} = {narrowed(image, total)}")
    return str(text)

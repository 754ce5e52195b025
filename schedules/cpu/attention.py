"""Attention on a CPU: tiles of queries against all keys of their head, vectors of examples throughout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.batch import Image
from mest_compile.ir.layouts.layout import FLOAT_BYTES
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.attention import Attention, AttentionBackward
from mest_compile.schedules.cpu.attention_bias import bias_at
from mest_compile.schedules.cpu.rows import array, buffer, loop, narrowed, number, widened, zero
from mest_compile.schedules.cpu.tiles import largest_divisor

QUERIES, KEYS = 4, 2  # of a tile: eight sums and what they are made of fit sixteen registers
CHANNELS = 2  # that share what they take of a tile's scores, for the same number of sums
TILES = 7  # at most, that have keys and values from near caches one after another
PAIRS = 2  # of keys that a tile passes while they and it are in the first-level cache
PIECE = 32  # keys whose scores of all tiles stay there while channels pass


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


def _tiles_together(problem: Attention, target: Target, arrays: int) -> int:
    """How many whole tiles of a row of queries pass over all keys together: a divisor, as many as leave half of the
    second-level cache to keys and values beside their scores in so many arrays. With one at a time each tile has keys,
    values and their gradients from a far cache (256 tokens of 64 channels: 1.36 times as long; Zen 3)."""
    tile_bytes = arrays * problem.tokens[1] * QUERIES * problem.q.vector * FLOAT_BYTES
    most = min(target.l2_bytes // 2 // tile_bytes, TILES)
    return largest_divisor(max(problem.q.width // QUERIES, 1), max(most, 1))


def _query_tiles(text: Text, problem: Attention, tiles: int, body: Callable[..., None]) -> None:
    """body(row, first column of tile `tile`, columns, tiles) for `tiles` tiles of a row of queries at a time, and for
    the tile that is left over."""
    main, rest = divmod(problem.q.width, QUERIES)
    with text.nest(f"for qr in T.serial({problem.rows[0]})"):
        if main:
            with text.nest(f"for qt in T.serial({main // tiles})"):
                body("qr", f"(qt * {tiles} + tile) * {QUERIES}", QUERIES, tiles)
        if rest:
            body("qr", str(main * QUERIES), rest, 1)


def _key_pairs(text: Text, problem: Attention, tiles: int, body: Callable[..., None]) -> None:
    """body(row, first column, columns) for each tile of queries and each pair of keys, and for one that is left
    over."""
    main, rest = divmod(problem.k.width, KEYS)
    pairs = largest_divisor(max(main, 1), PAIRS)
    with text.nest(f"for kr in T.serial({problem.rows[1]})"):
        if main:
            with text.nest(f"for few, tile, pair in T.grid({main // pairs}, {tiles}, {pairs})"):
                body("kr", f"(few * {pairs} + pair) * {KEYS}", KEYS)
        if rest:
            with text.nest(f"for tile in T.serial({tiles})"):
                body("kr", str(main * KEYS), rest)


def _pieces(problem: Attention) -> tuple[int, int]:
    """Of the rows of keys: (pieces, rows of each)."""
    rows = largest_divisor(problem.rows[1], max(PIECE // problem.k.width, 1))
    return problem.rows[1] // rows, rows


def _combined(text: Text, problem: Attention, tiles: int, many: int, scores: str, held: tuple[str, Image, int]) -> None:
    """Sets `out` (tiles, channels, QUERIES): of a head's keys what `held` (name, image, channels) has, by their scores
    for each query."""
    name, image, channels = held
    vector, (_, keys), (pieces, rows) = problem.q.vector, problem.tokens, _pieces(problem)
    together = largest_divisor(channels, CHANNELS)
    channel = f"(c * {together} + d)"
    total = f"out[((tile * {channels} + {channel}) * {QUERIES} + j) * {vector} + i]"
    lanes = f"for i in T.vectorized({vector})"
    sums = f"for d in T.unroll({together})", f"for j in T.unroll({many})", lanes
    slot = f"score[(d * {QUERIES} + j) * {vector} + i]"
    with text.nest(f"for e in T.serial({tiles * channels * QUERIES})", lanes):
        text(f"out[e * {vector} + i] = T.float32(0)")
    with text.nest(f"for piece, tile, c in T.grid({pieces}, {tiles}, {channels // together})"):
        with text.nest(*sums):
            text(f"{slot} = {total}")
        with text.nest(f"for kr, kw in T.grid({rows}, {problem.k.width})", *sums):
            row = f"(piece * {rows} + kr)"
            share = f"{scores}[((tile * {keys} + {row} * {problem.k.width} + kw) * {QUERIES} + j) * {vector} + i]"
            text(f"{slot} = {slot} + {share} * {_read(name, image, row, 'kw', channel)}")
        with text.nest(*sums):
            text(f"{total} = {slot}")


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
    """Of a score among those of the tiles: all keys, then QUERIES."""
    key = f"tile * {problem.tokens[1]} + ({keys[0]}) * {problem.k.width} + {keys[1]} + u"
    return f"(({key}) * {QUERIES} + j) * {vector} + i"


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

    tiles = _tiles_together(problem, target, 1)

    def block(row: str, column: str, many: int, tiles: int) -> None:
        each = f"for j in T.unroll({many})", lanes
        most, total = (f"{name}[(tile * {QUERIES} + j) * {vector} + i]" for name in ("most", "total"))
        with text.nest(f"for tile in T.serial({tiles})", *each):
            text(f'{most} = T.float32("-inf")', f"{total} = T.float32(0)")

        def score(*key: Any) -> None:
            _scores(text, problem, row, column, many, key)
            with text.nest(f"for u in T.unroll({key[2]})", *each):
                found = f"score[(u * {QUERIES} + j) * {vector} + i]"
                text(f"scores[{_place(problem, key, vector)}] = {found}")
                text(f"{most} = T.Select({found} <= {most}, {most}, {found})")  # NaN stays

        _key_pairs(text, problem, tiles, score)
        with text.nest(f"for tile, t in T.grid({tiles}, {keys})", *each):
            place = f"scores[((tile * {keys} + t) * {QUERIES} + j) * {vector} + i]"
            text(f"{place} = T.exp({place} - {most})", f"{total} = {total} + {place}")
        with text.nest(f"for tile in T.serial({tiles})", *each):
            first = f"sums_head + ({row} * {q.width} + {column} + j) * {vector}"
            text(f"sums[{first} + i] = {most} + T.log({total})")
        _combined(text, problem, tiles, many, "scores", ("v", v, problem.width))
        with text.nest(f"for tile, c in T.grid({tiles}, {problem.width})", *each):
            result = f"out[((tile * {problem.width} + c) * {QUERIES} + j) * {vector} + i] / {total}"
            text(f"{_at('y', y, row, f'{column} + j')} = {narrowed(y, result)}")

    with _each_head(text, problem, images):
        for name, elems in (
            ("scores", tiles * keys * QUERIES),
            ("score", KEYS * QUERIES),
            ("most", tiles * QUERIES),
            ("total", tiles * QUERIES),
            ("out", tiles * problem.width * QUERIES),
        ):
            text.local(name, elems * vector)
        _query_tiles(text, problem, tiles, block)
    return str(text)


@schedule("attention.backward", device="cpu")
def attention_backward(problem: AttentionBackward, target: Target) -> str:
    """By tiles of queries: their shares and what is due to their scores again, then what these give to q, k and v."""
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

    def summed(name: str, image: Image, channel: str = "c", row: str = "kr") -> str:
        place = f"sum_{name}[({channel} * {keys} + {row} * {k.width} + kw) * {vector} + i]"
        return _at(name, image, row, "kw", channel) if image.dtype == "float32" else place

    tiles = _tiles_together(forward, target, 2)

    def block(row: str, column: str, many: int, tiles: int) -> None:
        each = f"for j in T.unroll({many})", lanes
        due = f"due[(tile * {QUERIES} + j) * {vector} + i]"
        with text.nest(f"for tile in T.serial({tiles})"):
            with text.nest(*each):
                text(f"{due} = T.float32(0)")
            with text.nest(f"for c in T.serial({forward.width})", *each):
                product = f"{_read('dy', dy, row, f'{column} + j')} * {_read('y', y, row, f'{column} + j')}"
                text(f"{due} = {due} + {product}")

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
                    f"dshare{slot} = shares{place} * (dshare{slot} - {due})",
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

        _key_pairs(text, forward, tiles, score)
        if dq:
            _combined(text, forward, tiles, many, "dscores", ("k", k, forward.depth))
            with text.nest(f"for tile, c in T.grid({tiles}, {forward.depth})", *each):
                here = _at("dq", dq, row, f"{column} + j")
                total = f"out[((tile * {forward.depth} + c) * {QUERIES} + j) * {vector} + i]"
                total = f"{widened(dq, here)} + {total}" if more["dq"] else total
                text(f"{here} = {narrowed(dq, total)}")
        (pieces, rows), query = _pieces(forward), f"held[(d * {QUERIES} + j) * {vector} + i]"
        for name, image, source, other, channels in (
            ("dk", dk, "dscores", "q", forward.depth),
            ("dv", dv, "shares", "dy", forward.width),
        ):
            if not image:
                continue
            together = largest_divisor(channels, CHANNELS)
            several, channel = f"for d in T.unroll({together})", f"(c * {together} + d)"
            key = f"(piece * {rows} + kr)"
            with text.nest(f"for piece, c, tile in T.grid({pieces}, {channels // together}, {tiles})"):
                with text.nest(several, *each):
                    text(f"{query} = {_read(other, given[other], row, f'{column} + j', channel)}")
                with text.nest(f"for kr, kw in T.grid({rows}, {k.width})", several, lanes):
                    share = f"{source}[((tile * {keys} + {key} * {k.width} + kw) * {QUERIES} + %j) * {vector} + i]"
                    terms = (f"{share} * {query.replace('+ j', '+ %j')}".replace("%j", str(j)) for j in range(many))
                    here = summed(name, image, channel, key)
                    text(f"{here} = {' + '.join((here, *terms))}")

    with _each_head(text, forward, given | results):
        if problem.biased:
            text(f"dscores_head: T.let = n * {forward.tokens[0] * keys}")
        for name, elems in (
            ("shares", tiles * keys * QUERIES),
            ("dscores", tiles * keys * QUERIES),
            ("score", KEYS * QUERIES),
            ("dshare", KEYS * QUERIES),
            ("held", CHANNELS * QUERIES),
            ("due", tiles * QUERIES),
            *([("out", tiles * forward.depth * QUERIES)] if dq else []),
        ):
            text.local(name, elems * vector)
        for name, _, channels in aside:
            text.local(f"sum_{name}", channels * keys * vector)
        for name, image, channels in found:
            if image and not (more[name] and image.dtype == "float32"):
                with text.nest(*over(channels)):
                    text(f"{summed(name, image)} = T.float32(0)")
        _query_tiles(text, forward, tiles, block)
        for name, image, channels in aside:
            with text.nest(*over(channels)):
                here = _at(name, image, "kr", "kw")
                total = f"{widened(image, here)} + {summed(name, image)}" if more[name] else summed(name, image)
                text(f"{here} = {narrowed(image, total)}")
    return str(text)

"""Where a program's temporary buffers lie in memory, such that no two that live at the same time overlap."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence

from mest_compile.ir.program import Buffer, Program

ALIGNED_BYTES = 64  # a line of a cache, the longest vector, and what TVM's own allocations begin at a multiple of


def plan_memory(program: Program, slots: Sequence[int] = (), whole: bool = False) -> None:
    """Gives every temporary buffer a place.

    slots  bytes that are there already and used first: the evaluation program runs in the training program's memory
    whole  a buffer begins where a slot does, as on devices whose memory has no addresses; else there is one slot
    Large buffers come first, or long-lived ones, whichever needs less. Source: "greedy by size" for offsets and for
    shared objects, of Pisarchyk and Lee, arXiv:2001.03288.
    """
    lives = program.lifetimes()
    if whole:
        _share(program, lives, slots)
        return
    by_size = sorted(lives, key=lambda buffer: (-buffer.size_bytes, lives[buffer][0]))
    by_span = sorted(by_size, key=lambda buffer: lives[buffer][0] - lives[buffer][1])
    size, offsets = min((_offsets(order, lives) for order in (by_size, by_span)), key=lambda found: found[0])
    program.slots = [max(size, *slots, 0)]
    program.places = {buffer: (0, offset) for buffer, offset in offsets.items()}


def _offsets(order: Iterable[Buffer], lives: dict[Buffer, tuple[int, int]]) -> tuple[int, dict[Buffer, int]]:
    """(bytes of all, bytes before each): one after another in the smallest gap between those that live meanwhile."""
    placed: list[tuple[int, int, int, int]] = []  # (start, end, first call, last call), ascending
    offsets = {}
    for buffer in order:
        size = -(-buffer.size_bytes // ALIGNED_BYTES) * ALIGNED_BYTES
        (first, last), gaps, end = lives[buffer], [], 0
        for start, stop, other_first, other_last in placed:
            if first <= other_last and other_first <= last:
                if start - end >= size:
                    gaps.append((start - end, end))
                end = max(end, stop)
        offsets[buffer] = min(gaps)[1] if gaps else end
        insort(placed, (offsets[buffer], offsets[buffer] + size, first, last))
    return max((stop for _, stop, _, _ in placed), default=0), offsets


def _share(program: Program, lives: dict[Buffer, tuple[int, int]], slots: Sequence[int]) -> None:
    """Each into the smallest slot that is free while it lives, or a new one: small ones fill the gaps in the lives of
    large ones."""
    sizes = list(slots)
    taken: list[list[tuple[int, int]]] = [[] for _ in sizes]
    for buffer in sorted(lives, key=lambda buffer: (-buffer.size_bytes, lives[buffer][0])):
        first, last = lives[buffer]
        free = [
            slot
            for slot, size in enumerate(sizes)
            if size >= buffer.size_bytes
            and all(last < other_first or other_last < first for other_first, other_last in taken[slot])
        ]
        slot = min(free, key=sizes.__getitem__, default=len(sizes))
        if slot == len(sizes):
            sizes.append(buffer.size_bytes)
            taken.append([])
        program.places[buffer] = slot, 0
        taken[slot].append((first, last))
    program.slots = sizes


def plan_memory_like(program: Program, like: Program, whole: bool = False) -> None:
    """Gives the temporary buffers of a program those places that the same ones, which are no smaller, have in a program
    of the same calls for more examples. Where calls differ it plans anew, in slots that are there as far as it can."""
    theirs, mine = (_numbered(one.buffers()) for one in (like, program))
    if all(key in theirs and buffer.size_bytes <= theirs[key].size_bytes for key, buffer in mine.items()):
        program.slots = list(like.slots)
        program.places = {buffer: like.places[theirs[key]] for key, buffer in mine.items()}
    else:
        plan_memory(program, like.slots, whole)


def _numbered(buffers: Iterable[Buffer]) -> dict[tuple[str, int], Buffer]:
    """(name, how many of that name came before) -> temporary buffer: a value that is computed again comes again."""
    counts: Counter[str] = Counter()
    found = {}
    for buffer in buffers:
        if not buffer.held:
            found[buffer.name, counts[buffer.name]] = buffer
            counts[buffer.name] += 1
    return found

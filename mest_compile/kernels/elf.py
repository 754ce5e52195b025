"""What a shared library says of itself: whose machine code it is, which libraries it needs, which symbols it lacks.

Layout: System V Application Binary Interface, chapters 4 and 5. Little-endian files only, which is what all targets
here are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mest_compile.base.errors import BuildError

MACHINES = {62: "x86_64", 183: "aarch64", 40: "arm", 243: "riscv64"}  # e_machine -> what `platform.machine()` calls it
_LOAD, _DYNAMIC = 1, 2  # segments
_NEEDED, _STRTAB, _SYMTAB, _SYMENT, _HASH, _SONAME, _GNU_HASH = (
    1,
    5,
    6,
    11,
    4,
    14,
    0x6FFFFEF5,
)  # entries of the dynamic section


@dataclass(frozen=True, slots=True)
class Library:
    """Facts about a shared library.

    machine    "aarch64", "x86_64", "arm", or the number of another
    bits       32 or 64
    needed     sonames of the libraries that it asks for
    undefined  symbols that others must have; weak ones are left out
    defined    symbols that it offers
    """

    machine: str
    bits: int
    needed: tuple[str, ...]
    undefined: tuple[str, ...]
    defined: tuple[str, ...]


def read_library(content: bytes, name: str = "library") -> Library:
    """Facts of a shared library's bytes. Raises BuildError when they are none."""
    try:
        return _read(content)
    except (struct.error, IndexError, KeyError, ValueError) as problem:
        raise BuildError(f"{name} is not a whole ELF shared library ({problem!r}); build it again") from problem


def _read(content: bytes) -> Library:
    if content[:4] != b"\x7fELF" or content[5] != 1:
        raise ValueError("wrong magic number or byte order")
    wide = content[4] == 2
    kind, machine = struct.unpack_from("<HH", content, 16)
    if kind != 3:
        raise ValueError(f"type {kind}, not a shared library")
    at, size, count = (
        (struct.unpack_from("<Q", content, 32)[0], *struct.unpack_from("<HH", content, 54))
        if wide
        else (struct.unpack_from("<I", content, 28)[0], *struct.unpack_from("<HH", content, 42))
    )
    segments = []
    for index in range(count):
        place = at + index * size
        if wide:
            segment, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", content, place)
        else:
            segment, offset, address, _, length = struct.unpack_from("<IIIII", content, place)
        segments.append((segment, offset, address, length))

    def offset_of(address: int) -> int:
        return next(
            offset + address - start
            for segment, offset, start, length in segments
            if segment == _LOAD and start <= address < start + length
        )

    ((_, start, _, length),) = [segment for segment in segments if segment[0] == _DYNAMIC]
    pair = struct.Struct("<qQ" if wide else "<iI")
    entries = [pair.unpack_from(content, start + place) for place in range(0, length, pair.size)]
    entries = entries[: [tag for tag, _ in entries].index(0)]
    found = dict(entries)
    strings, symbols = offset_of(found[_STRTAB]), offset_of(found[_SYMTAB])

    def text(place: int) -> str:
        return content[strings + place : content.index(b"\0", strings + place)].decode()

    undefined, defined = [], []
    for index in range(
        1, _symbols(content, wide, {tag: offset_of(found[tag]) for tag in (_HASH, _GNU_HASH) if tag in found})
    ):
        place = symbols + index * found[_SYMENT]
        if wide:
            word, info, _, section = struct.unpack_from("<IBBH", content, place)
        else:
            word, _, _, info, _, section = struct.unpack_from("<IIIBBH", content, place)
        if section:
            defined.append(text(word))
        elif info >> 4 == 1:  # global, not weak
            undefined.append(text(word))
    return Library(
        MACHINES.get(machine, str(machine)),
        64 if wide else 32,
        tuple(text(value) for tag, value in entries if tag == _NEEDED),
        tuple(undefined),
        tuple(defined),
    )


def _symbols(content: bytes, wide: bool, tables: dict[int, int]) -> int:
    """How many dynamic symbols there are, the empty first one among them: nothing but the hash tables tells. tables:
    tag -> place."""
    if _HASH in tables:
        return struct.unpack_from("<I", content, tables[_HASH] + 4)[0]  # as many as it has chains
    buckets, first, words, _ = struct.unpack_from("<IIII", content, tables[_GNU_HASH])
    place = tables[_GNU_HASH] + 16 + words * (8 if wide else 4)
    last = max(struct.unpack_from(f"<{buckets}I", content, place))  # the last chain's first symbol
    if last < first:
        return first  # none is defined
    chains = place + 4 * buckets
    while not struct.unpack_from("<I", content, chains + 4 * (last - first))[0] & 1:
        last += 1
    return last + 1

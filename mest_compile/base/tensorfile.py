"""Files of named arrays in the safetensors format, in plain numpy: a device that trains has no other library for them.

Format: 8 bytes with the size of a JSON header (little-endian), the header, the arrays one after another. The header
gives every array's type, shape and place; "__metadata__" holds texts. Source:
https://github.com/huggingface/safetensors, its README.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}
_CODES = {np.dtype(name): code for code, name in _NAMES.items()}
MOST_HEADER_BYTES = 100_000_000  # as the format has it


def pack(arrays: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> bytes:
    """The file's content."""
    return b"".join(pieces(arrays, texts))


def pieces(arrays: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> list[bytes | memoryview]:
    """The same in pieces, one behind another; those of arrays are the arrays' own memory."""
    header: dict[str, object] = {"__metadata__": dict(texts)}
    place, parts = 0, list[bytes | memoryview]()
    # Widest types first, so that every array lies at a multiple of its own width.
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data  # no copy: nets are large
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [place, place + content.nbytes],
        }
        parts.append(content)
        place += content.nbytes
    said = json.dumps(header).encode()
    said += b" " * (-len(said) % 8)
    return [struct.pack("<Q", len(said)), said, *parts]


def unpack(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, texts) of a file's content. Raises ValueError when it is cut short or not of that format."""
    if len(content) < 8:
        raise ValueError("it has no header")
    (size,) = struct.unpack_from("<Q", content)
    if size > min(MOST_HEADER_BYTES, len(content) - 8):
        raise ValueError("its header is cut short")
    header = json.loads(content[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    texts, data = header.pop("__metadata__", {}), memoryview(content)[8 + size :]
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("its texts are no table of texts")
    return {name: _array(name, facts, data) for name, facts in header.items()}, texts


def _array(name: str, facts: Any, data: memoryview) -> np.ndarray:
    """A copy of the array that the header's `facts` describe. Raises ValueError when they describe none."""
    try:
        dtype, shape, (start, end) = np.dtype(_NAMES[facts["dtype"]]), tuple(facts["shape"]), facts["data_offsets"]
    except (KeyError, TypeError) as problem:
        raise ValueError(f"{name} is not described ({problem!r})") from problem
    if not all(type(size) is int and size >= 0 for size in (*shape, start, end)):
        raise ValueError(f"{name} has sizes that are none")
    if not start <= end <= len(data) or end - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} is not all there")
    try:
        return np.frombuffer(data[start:end], dtype).reshape(shape).copy()
    except OverflowError as problem:  # of a shape such as (0, 2**64)
        raise ValueError(f"{name} has a size beyond all arrays") from problem

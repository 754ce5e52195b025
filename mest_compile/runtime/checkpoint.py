"""Checkpoints: one safetensors file with every array, a JSON document and a digest in its header, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.errors import StateError
from mest_compile.runtime import tensorfile

FORMAT = "mest-compile checkpoint 2"


def write(path: str | Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Writes to a temporary file beside `path`, then renames. Raises StateError when the folder cannot be written or is full."""
    path = Path(path)
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    said = json.dumps(facts)
    content = tensorfile.pack(whole, {"format": FORMAT, "facts": said, "digest": _digest(whole, said)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with scratch.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as problem:
        raise StateError(f"checkpoint {path} cannot be written: {problem.strerror}; an earlier one there is untouched") from problem


def _digest(arrays: Mapping[str, np.ndarray], facts: str) -> str:
    """Of all contents: a disk that loses the middle of a file leaves a file that can be parsed."""
    digest = hashlib.blake2b(facts.encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].data)
    return digest.hexdigest()


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, facts). Raises StateError for a file that is missing, cut short, changed or not ours."""
    path = Path(path)
    if not path.is_file():
        raise StateError(f"no checkpoint {path}; give the path of a file that step.save or a training run wrote")
    try:
        arrays, header = tensorfile.unpack(path.read_bytes())
        if header.get("format") != FORMAT:
            raise StateError(f"{path} is a safetensors file, but not a {FORMAT!r}; it says {header.get('format')!r}")
        if header["digest"] != _digest(arrays, header["facts"]):
            raise ValueError("its content is not what was written")
        return arrays, json.loads(header["facts"])
    except (OSError, ValueError, KeyError, RecursionError) as problem:
        raise StateError(f"checkpoint {path} is damaged or cut short ({problem}); take an older one") from problem

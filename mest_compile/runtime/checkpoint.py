"""Checkpoints: one safetensors file with every array, a JSON document and a digest in its header, written whole or not
at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base import tensorfile
from mest_compile.base.errors import StateError
from mest_compile.models.sources import CHECKPOINTS, checkpoint_in

FORMAT = "mest-compile checkpoint 3"


def write(path: str | Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Writes to a temporary file beside `path`, then renames. Raises StateError when the folder cannot be written or is
    full."""
    path = Path(path)
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    said = json.dumps(facts)
    content = tensorfile.pieces(whole, {"format": FORMAT, "facts": said, "digest": _digest(whole, said)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with scratch.open("wb") as file:
                file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as problem:
        raise StateError(
            f"checkpoint {path} cannot be written: {problem.strerror}; an earlier one there is untouched"
        ) from problem


def _digest(arrays: Mapping[str, np.ndarray], facts: str) -> str:
    """Of all contents, and of what they are read as: a disk that loses the middle of a file leaves a file that can be
    parsed."""
    described = [[name, str(arrays[name].dtype), arrays[name].shape] for name in sorted(arrays)]
    digest = hashlib.blake2b(json.dumps([facts, described]).encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(arrays[name].data)
    return digest.hexdigest()


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, facts) of a file, or of that in a run folder or an artifact. Raises StateError for a file that is
    missing, cut short, changed or not ours."""
    path = Path(path)
    try:
        path = (checkpoint_in(path) or path / CHECKPOINTS[0]) if path.is_dir() else path
        if not path.is_file():
            raise StateError(f"no checkpoint {path}; give a run folder, or a file that step.save or a training wrote")
        content = path.read_bytes()
    except OSError as problem:
        raise StateError(f"checkpoint {path} cannot be read ({problem.strerror}); take an older one") from problem
    return unpack(content, path)


def unpack(content: bytes, path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The same of a checkpoint's content; path: where it is from."""
    try:
        arrays, header = tensorfile.unpack(content)
        if header.get("format") != FORMAT:
            raise StateError(f"{path} is a safetensors file, but not a {FORMAT!r}; it says {header.get('format')!r}")
        if header["digest"] != _digest(arrays, header["facts"]):
            raise ValueError("its content is not what was written")
        return arrays, json.loads(header["facts"])
    except (ValueError, KeyError, RecursionError) as problem:
        raise StateError(f"checkpoint {path} is damaged or cut short ({problem}); take an older one") from problem

"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    write_whole(path, text.encode("utf-8", "replace"))  # a name that is not UTF-8 is shown with question marks


def write_whole(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """content: also in pieces, one behind another."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

"""Shared libraries into this process, each from a file of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mest_compile.hardware.tvmruntime import runtime


def load_library(content: bytes, folders: Iterable[Path] = ()) -> Any:
    """TVM's module of a library with exactly this content; with the last of what comes from it the library goes.

    The loader goes by path: what was loaded from one is loaded again, whatever the file holds by then, and who writes
    into the file writes into a running library. So the content gets a file that nobody else knows, and the file goes
    when it is loaded.

    folders  where to put it; where one is full, cannot be written or forbids execution, the next is tried, the
             temporary folder at last
    Raises OSError, RuntimeError, as the last place did.
    """
    refused: Exception | None = None
    for folder in (*folders, None):
        try:
            with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
                path = Path(scratch) / "library.so"
                path.write_bytes(content)
                return runtime().load_module(path, keep_module_alive=False)
        except (OSError, RuntimeError) as problem:
            refused = problem
    assert refused is not None
    raise refused

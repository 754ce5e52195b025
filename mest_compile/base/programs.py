"""Other programs that are run to their end: compilers, linkers, LLVM's tools. None of them is waited for without
end."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from mest_compile.base.errors import BuildError

LIMIT_SECONDS = 300.0  # of one call; the slowest, a C++ compiler, takes some ten


def run_program(command: Sequence[str | Path], text: str | None = None) -> subprocess.CompletedProcess[str]:
    """What a program gave; text: its input. Raises BuildError when it does not end."""
    try:
        return subprocess.run(
            [str(word) for word in command], input=text or "", capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise BuildError(
            f"{Path(command[0]).name} has not ended within {LIMIT_SECONDS:g} s, and was killed; look at what it "
            "waits for: "
            f"{' '.join(map(str, command))[:200]}"
        ) from None

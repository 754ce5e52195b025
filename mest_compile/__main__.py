"""`mest-compile`: the whole command line, or on a device that has nothing to draw it with, training from an artifact
alone."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Exits with 0 done, 1 failed, 2 misused, 130 interrupted."""
    try:
        _main()
    except KeyboardInterrupt:  # while the modules below were still being loaded
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


def _main() -> None:
    if importlib.util.find_spec("typer") and importlib.util.find_spec("rich"):
        from mest_compile.cli import main as whole

        whole()
    else:
        from mest_compile.ondevice import main as small

        sys.exit(small())


if __name__ == "__main__":
    main()

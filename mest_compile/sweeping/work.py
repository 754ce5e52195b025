"""A command of `mest-compile` that ends when the process that started it does, however that ends.

python -m mest_compile.sweeping.work PARENT train ...   # PARENT: the process's number
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time

LOOKS_SECONDS = 0.5


def end_with(parent: int) -> None:
    """Ends this process, as if it were killed, soon after its parent is another than `parent`: training is made to be
    killed at any moment, and what nobody waits for would be in the way of who starts the sweep again."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOKS_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with(int(sys.argv.pop(1)))
    runpy.run_module("mest_compile", run_name="__main__", alter_sys=True)

"""Ctrl-C that waits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C wait until the block is done; pressed twice it does not wait. For what is quick and cannot be done
    again."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is None or threading.current_thread() is not threading.main_thread():  # not Python's, or never interrupted
        yield
        return
    pressed: list[int] = []

    def wait(number: int, frame: Any) -> None:
        pressed.append(number)
        if len(pressed) == 2:
            signal.signal(signal.SIGINT, usual)
            signal.raise_signal(number)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if len(pressed) == 1:
            signal.raise_signal(signal.SIGINT)

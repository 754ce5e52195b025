"""What stands one user at a time: TVM's and torch's compilers want one thread of a process, TVM's threads the process
that started them."""

from __future__ import annotations

import os
import threading

from mest_compile.base.errors import UsageError

COMPILER = (
    threading.RLock()
)  # to be held by whoever imports a model, compiles a program or links; never while waiting for a device
_used = _forked = False


def this_process() -> None:
    """Called before anything of TVM is used. Raises UsageError in a process that was forked off one where that was done
    before: it has none of the threads, and would wait for them for ever.
    """
    global _used
    check_process()
    _used = True


def check_process() -> None:
    """Raises UsageError where `this_process` would."""
    if _forked:
        raise UsageError(
            "this process was forked off one that had compiled or opened a step, and lacks its threads: start it by "
            "multiprocessing.get_context('spawn'), or let only it, and not its parent, compile"
        )


def _after_fork() -> None:
    global _forked
    _forked = _used or _forked


if hasattr(os, "register_at_fork"):  # where processes can be forked
    os.register_at_fork(after_in_child=_after_fork)

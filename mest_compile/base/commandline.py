"""What every command line of ours does around its commands: faults as one line on stderr, results alone on stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper
from typing import TextIO

from mest_compile.base.errors import MestError, UsageError

LONGEST_LINE = 600  # what TVM says can be long; the beginning tells what happened
INTERRUPTED = 130

_results: list[TextIO] = []  # where results go while `results_alone` keeps stdout from everything else


def guarded(command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code. What the caller can mend is one line on stderr; other exceptions are
    faults of ours."""
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except MestError as error:
        return complain(error, error.exit_code)
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)
    except BrokenPipeError:  # who reads our output has heard enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain when it flushes at its end
        return 1
    except OSError as problem:
        return complain(f"{problem.filename}: {problem.strerror}" if problem.filename else problem, 1)
    except MemoryError:
        return complain("there is not enough memory; take a smaller batch or model", 1)


def complain(problem: object, exit_code: int) -> int:
    line = " ".join(str(problem).split())
    if line:  # empty when typer has just printed the help
        print("error:", line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + " ...", file=sys.stderr)
    return exit_code


def refuse_empty(arguments: Sequence[str]) -> None:
    """Raises UsageError when an argument is empty, as that of a shell's variable which is not set: an empty path would
    be this folder."""
    for before, argument in zip(["", *arguments], arguments):
        option = (
            before
            if not argument.strip()
            else argument[:-1]
            if argument.startswith("--") and argument.endswith("=")
            else None
        )
        if option is not None:
            raise UsageError(
                f"{option or 'an argument'} is given an empty text; leave it out, or look whether a variable is not set"
            )


@contextmanager
def results_alone() -> Iterator[None]:
    """Whatever is printed on stdout meanwhile goes to stderr, a library's own log lines too; only `print_result` still
    reaches stdout."""
    out = sys.stdout
    if not isinstance(out, TextIOWrapper) or out is not sys.__stdout__:  # somebody watches what this process prints
        _results.append(out)
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _results.pop()
        return
    out.flush()
    with os.fdopen(os.dup(1), "w", encoding=out.encoding, errors=out.errors) as results:
        _results.append(results)
        os.dup2(2, 1)
        try:
            yield
        finally:
            out.flush()
            os.dup2(results.fileno(), 1)
            _results.pop()


def print_result(text: str) -> None:
    print(text, file=_results[-1] if _results else sys.stdout, flush=True)

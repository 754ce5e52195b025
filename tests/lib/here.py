"""Workers of a sweep that run its commands in this process, which has torch and TVM already."""

from contextlib import redirect_stderr, redirect_stdout

import pytest

from mest_compile.cli import main


class Here:
    """One command at a time. stops: commands after whose first epoch the sweep is stopped, as by Ctrl-C; counted from
    1."""

    slots = 1

    def __init__(self, stops=()):
        self.commands, self.codes, self.stops = [], {}, stops

    def start(self, job, arguments, log):
        self.commands.append(arguments)
        stop = len(self.commands) in self.stops
        with log.open("a") as file, redirect_stdout(file), redirect_stderr(file), pytest.raises(SystemExit) as ended:
            main([*arguments, *(["--until", "1"] if stop else [])])
        if stop:
            raise KeyboardInterrupt
        self.codes[job] = ended.value.code

    def ended(self):
        found, self.codes = self.codes, {}
        return found

    def close(self):
        pass

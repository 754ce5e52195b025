"""Shared by all tests: the repository's folder, the command line run in this process, and a tracker for devices."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

# Tests run on few cores, often several processes at once: one thread each unless a test asks for more.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TVM_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TVM_BIND_THREADS", "0")


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def document(self):
        return json.loads(self.out)


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where processes that serve write their logs."""
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="module")
def port(folder):
    """The port of a tracker on 127.0.0.1."""
    from device import emulated

    with emulated.tracker(folder) as (_, port):
        yield port


@pytest.fixture
def mest_compile_command(capsys):
    """A function that runs `mest-compile ...` in this process."""
    from mest_compile.cli import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ran(stop.value.code, printed.out, printed.err)

    return run

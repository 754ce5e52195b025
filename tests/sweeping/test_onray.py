"""Commands of a sweep on Ray: each in a process of its own, and told when it is lost."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from mest_compile.base.errors import MestError, NotInstalled
from mest_compile.sweeping.onray import RayWorkers
from mest_compile.sweeping.workers import LOST

NEED = 100 * 2**20


def ended(workers):
    while not (found := workers.ended()):
        time.sleep(0.1)
    return found


def waiting(word):
    """Processes of Ray that wait for a command with that word in it."""
    listed = subprocess.run(["ps", "-eww", "-o", "ppid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "sweeping.work" in line and word in line]


@pytest.fixture
def short():
    """A folder for Ray's sockets, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield folder


def test_commands_run_and_what_is_lost_is_told(tmp_path, short, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'mest-compile[ray]'")
    monkeypatch.setenv("RAY_TMPDIR", short)
    workers = RayWorkers("local", 1, NEED)
    try:
        assert workers.slots >= 1
        workers.start(3, ["--version"], tmp_path / "log")
        assert ended(workers) == {3: 0} and (tmp_path / "log").read_text().startswith("mest-compile ")
        workers.start(4, ["train", "--epochs", "0"], tmp_path / "log")
        assert ended(workers) == {4: 2}
        workers.start(5, ["train", "--epochs", "1000000", "--out", str(tmp_path / "run")], tmp_path / "lost")
        while not (waits := waiting(str(tmp_path / "run"))):
            time.sleep(0.1)
        os.kill(waits[0], signal.SIGKILL)
        assert ended(workers) == {5: LOST}
    finally:
        workers.close()
    with pytest.raises(MestError, match="no Ray cluster"):
        RayWorkers("nowhere", 1, NEED)


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NotInstalled, match="mest-compile\\[ray\\]"):
        RayWorkers("auto", 1, NEED)

"""Starts the stand-in device that `make device` builds, and a tracker for it, all on 127.0.0.1.

By hand: python tests/device/emulated.py TRACKER-PORT KEY [--count-instructions]
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent.parent / ".device"
ROOT = "/usr/aarch64-linux-gnu"


def missing() -> str | None:
    """Why there is no stand-in device here; None: there is one."""
    return None if (FOLDER / "built").exists() else "the emulated device is not built; run: make device"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Started:
    """A process in a group of its own, with a log that says when it is ready."""

    def __init__(self, command: list[str], log: Path, ready: str, environment: dict[str, str] | None = None):
        self.log, self._ready = log, ready
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        self.wait(1)

    def wait(self, times: int) -> None:
        """Until it has been ready `times` times."""
        for _ in range(1200):
            if len(re.findall(self._ready, self.log.read_text())) >= times:
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"not ready within a minute: {self.log.read_text()}")

    def kill(self) -> None:
        """As when the power is cut: sessions and all."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def tracker(folder: Path, port: int | None = None) -> Iterator[tuple[Started, int]]:
    """(process, port) of a tracker."""
    port = port or free_port()
    started = Started(
        [sys.executable, "-c", "from mest_compile.cli import main; main()", "tracker", "--port", str(port)],
        folder / f"tracker{time.monotonic_ns()}.log",
        "tracker at",
    )
    try:
        yield started, port
    finally:
        started.kill()


@contextmanager
def device(
    folder: Path, tracker_port: int, key: str = "emulated", count_instructions: bool = False
) -> Iterator[Started]:
    """An emulated Cortex-A76 that serves under `key`. count_instructions: its clock is executed instructions, one a
    nanosecond."""
    environment = {"TVM_NUM_THREADS": "1", "QEMU_CPU": "cortex-a76"}
    command = ["qemu-aarch64", "-L", ROOT]
    if count_instructions:
        environment["DEVICE_ICOUNT"] = str(folder / f"{key}.count")
        command += ["-plugin", f"{FOLDER / 'icount.so'},out={environment['DEVICE_ICOUNT']}"]
    here = FOLDER / "device"
    command += [str(here / "rpcd"), str(free_port()), str(tracker_port), key, str(here / "libtvm_runtime_extra.so")]
    started = Started(command, folder / f"device{time.monotonic_ns()}.log", "ready ", environment)
    try:
        yield started
    finally:
        started.kill()


def main() -> int:
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(
        description="An emulated Cortex-A76 that serves at a tracker on 127.0.0.1, until interrupted."
    )
    parser.add_argument("port", type=int, help="of the tracker")
    parser.add_argument("key")
    parser.add_argument(
        "--count-instructions", action="store_true", help="let its clock count executed instructions, one a nanosecond"
    )
    given = parser.parse_args()
    if lacking := missing():
        print(f"error: {lacking}", file=sys.stderr)
        return 1
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.default_int_handler)
    with (
        tempfile.TemporaryDirectory() as folder,
        device(Path(folder), given.port, given.key, given.count_instructions) as started,
    ):
        print(f"{given.key} serves at the tracker 127.0.0.1:{given.port}", flush=True)
        try:
            return started.process.wait()
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())

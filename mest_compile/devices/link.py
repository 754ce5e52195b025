"""The link to a device: a small process between TVM's RPC client and the device's RPC server.

TVM's client waits for the answer to everything it sends. Nobody looks at the answers to uploads, releases and calls
that only write arrays; for those this process answers at once and takes the device's answer for itself. So batches are
on their way, or already in the device's receive buffer, while the device computes. The device does everything in the
order in which it was asked. When it reports a failure of something that was answered early, the next question that is
waited for gets that failure as its answer.

It also notices what the client would wait for without end: a device that is cut off, or silent for too long.
It is a process of its own because the client holds Python's lock while it releases arrays.
Protocol: TVM 0.27, src/runtime/rpc/minrpc/rpc_reference.h (version "0.8.0", which client and server compare when they
meet).
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque

CALL, EXCEPTION, COPY_TO, FREE_HANDLE, FREE_DATA, STREAM_SYNC = 3, 5, 7, 10, 14, 15
NONE, INT, TENSOR = 0, 1, 7  # type indices of values
RETURN = 4
VOID = struct.pack("<Qiii", 12, RETURN, 1, NONE)
NOTHING = struct.pack("<Qiiiqi", 24, RETURN, 2, INT, NONE, NONE)  # a function's result goes with its type in front
KEEPALIVE_SECONDS = 5
GREETING_SECONDS = 30  # at most, for what a device says before it is asked for anything
START_SECONDS = 30  # until there is a connection to the device
MOST_KEY_BYTES = 4096
LOST = 3  # exit code


def early_answer(packet: bytes) -> bytes | None:
    """What to answer before the device does; None: it has to be asked. packet: without its size in front."""
    (code,) = struct.unpack_from("<i", packet)
    if code in (COPY_TO, FREE_HANDLE, FREE_DATA, STREAM_SYNC):
        return VOID
    return NOTHING if code == CALL and _only_tensors(packet) else None


def _only_tensors(packet: bytes) -> bool:
    """Whether all arguments of a call are arrays: such calls are those of a step's functions, which return nothing."""
    (count,) = struct.unpack_from("<i", packet, 12)
    place = 16
    for _ in range(count):
        if struct.unpack_from("<i", packet, place)[0] != TENSOR:
            return False
        (dimensions,) = struct.unpack_from("<i", packet, place + 20)  # behind type, handle and device
        place += 36 + 8 * dimensions
    return count > 0


class Link:
    """Carries packets between `client` and `device` until one of them closes.

    silence_seconds  the longest wait for a whole answer
    early            whether calls with nothing but arrays are those of a step, which return nothing
    """

    def __init__(self, client: socket.socket, device: socket.socket, silence_seconds: float, early: bool):
        self._client, self._device, self._silence, self._early = client, device, silence_seconds, early
        self._asked: deque[tuple[bool, float]] = deque()  # (answered early, when) of what the device has not answered
        self._failure: bytes | None = None
        self._began: float | None = time.monotonic()  # None: the device has greeted

    def run(self) -> str | None:
        """Why the device was lost; None: the client has closed."""
        try:
            self._greet()
            self._began = None
            threading.Thread(target=self._upstream, daemon=True).start()
            while True:
                self._answer(self._packet(self._device))
        except EOFError:
            return "it closed the connection"
        except TimeoutError as problem:
            return str(problem)
        except OSError as problem:
            return problem.strerror or str(problem)
        except (
            struct.error,
            IndexError,
            ValueError,
            OverflowError,
            MemoryError,
        ):  # what says its own size, kind or turn wrong
            return "what it says is not TVM's RPC protocol"

    def _greet(self) -> None:
        """Client and server introduce themselves: a magic number and a key each."""
        magic, size = struct.unpack("<ii", head := self._read(self._client, 8))
        self._device.sendall(head + self._read(self._client, size))
        code = self._read(self._device, 4)
        self._client.sendall(code)
        if struct.unpack("<i", code)[0] == magic:
            self._client.sendall(head := self._read(self._device, 4))
            (size,) = struct.unpack("<i", head)
            if not 0 <= size <= MOST_KEY_BYTES:
                raise ValueError(size)
            self._client.sendall(self._read(self._device, size))

    def _upstream(self) -> None:
        try:
            while True:
                packet = self._packet(self._client)
                answer = early_answer(packet[8:]) if self._early else None
                self._asked.append((answer is not None, time.monotonic()))
                if answer is not None:
                    self._client.sendall(answer)
                self._device.sendall(packet)
        except (EOFError, OSError):
            pass
        finally:  # the client has closed, or the device, which the other thread has noticed
            time.sleep(0.1)
            self._hang_up()

    def _hang_up(self) -> None:
        for end in (self._device, self._client):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _answer(self, packet: bytes) -> None:
        early, _ = self._asked.popleft()
        if early:
            if struct.unpack_from("<i", packet, 8)[0] == EXCEPTION and self._failure is None:
                self._failure = packet
        else:
            packet, self._failure = self._failure or packet, None
            self._client.sendall(packet)

    def _packet(self, end: socket.socket) -> bytes:
        head = self._read(end, 8)
        return head + self._read(end, struct.unpack("<Q", head)[0])

    def _check_patience(self) -> None:
        """Raises TimeoutError when the device is late, whether it is silent or drips."""
        now, greeting = time.monotonic(), min(self._silence, GREETING_SECONDS)
        if self._began is not None and now - self._began > greeting:
            raise TimeoutError(f"it has not greeted for {greeting:g} s")
        if self._asked and now - self._asked[0][1] > self._silence:
            raise TimeoutError(f"it has not answered for {self._silence:g} s")

    def _read(self, end: socket.socket, size: int) -> bytes:
        content, place = bytearray(size), 0
        while place < size:
            if end is self._device:
                self._check_patience()
            if not select.select([end], [], [], 1.0)[0]:
                continue
            if hasattr(
                socket, "TCP_QUICKACK"
            ):  # servers that write an answer in pieces wait for this between them, else 40 ms
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            if not (got := end.recv_into(memoryview(content)[place:])):
                raise EOFError
            place += got
        return bytes(content)


def keep_alive(end: socket.socket) -> None:
    """Notices within some 20 seconds that the other side is cut off."""
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_SECONDS),
        ("TCP_KEEPINTVL", KEEPALIVE_SECONDS),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 4000 * KEEPALIVE_SECONDS),
    ):
        if hasattr(socket, option):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def start(host: str, port: int, silence_seconds: float, early: bool = True) -> tuple[subprocess.Popen, int]:
    """(the link's process, the local port where TVM's client finds the device). Raises OSError when it cannot be
    reached."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, host, str(port), str(silence_seconds), str(int(early))],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    there = bool(select.select([process.stdout], [], [], START_SECONDS)[0])
    line = process.stdout.readline() if there else ""
    if not line:
        process.kill()
        said = process.communicate()[1].strip() or f"no connection to {host}:{port} within {START_SECONDS} s"
        raise ConnectionError(said)
    return process, int(line)


def main(host: str, port: str, silence_seconds: str, early: str) -> int:
    try:
        device = socket.create_connection((host, int(port)), timeout=10)
    except OSError as problem:
        print(problem.strerror or problem, file=sys.stderr)
        return 1
    device.settimeout(None)
    keep_alive(device)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        print(listener.getsockname()[1], flush=True)
        client, _ = listener.accept()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.settimeout(None)
    lost = Link(client, device, float(silence_seconds), early == "1").run()
    if lost:
        print(lost, file=sys.stderr)
    return LOST


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

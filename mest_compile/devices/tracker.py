"""What is asked of TVM's RPC tracker, in its protocol: a device of a key, and what it has on its list.

Every conversation has one deadline, from the connection to the last byte of the answer, and an answer that is none is a
ConnectionError.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from mest_compile.base.errors import UsageError

MAGIC, REQUEST, SUMMARY, SUCCESS = 0x2F271, 4, 6, 0
ANSWER_SECONDS = 10.0  # for what needs no device
MOST_BYTES = 2**24  # of an answer: some hundred thousand devices


@dataclass(frozen=True, slots=True)
class Address:
    """Where a process listens. str(...) is what `parse` takes."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Of "host:port" or "[::1]:port". Raises UsageError."""
        host, _, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
        bracketed = host.startswith("[") and host.endswith("]")
        host = host[1:-1] if bracketed else host
        numbered = port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536
        if not is_word(host) or (":" in host and not bracketed) or not numbered:
            raise UsageError(f"tracker is {text!r}; wanted host:port, such as 127.0.0.1:9190 or [::1]:9190")
        return cls(host, int(port))


def is_word(text: Any) -> bool:
    """Whether it is a text of one character or more, all of them printable and none a blank."""
    return isinstance(text, str) and bool(text) and text.isprintable() and not any(map(str.isspace, text))


def check_key(key: Any) -> str:
    """The key of a device, as it was given. Raises UsageError for what TVM's tracker and server would take apart."""
    if not is_word(key) or ":" in key:
        raise UsageError(
            f'key is {key!r}; wanted the name under which a device serves, without blanks and colons, such as "phone"'
        )
    return key


def request(tracker: Address, key: str, seconds: float) -> tuple[Address, str]:
    """(where a free device listens, key of the session). Raises TimeoutError (none was free in time), OSError (no
    tracker answers)."""
    code, value = _ask(tracker, [REQUEST, key, "", 1], seconds)
    if code != SUCCESS:
        raise ConnectionError(f"tracker {tracker} answers {value!r}" if value is not None else _nonsense(tracker, code))
    match value:
        case [str(host), int(port), str(session)] if is_word(host) and 0 < port < 65536 and is_word(session):
            return Address(host, port), session
    raise ConnectionError(_nonsense(tracker, value))


def summary(tracker: Address) -> dict[str, Any]:
    """What a tracker knows: "server_info" (key and addr of every device), "queue_info" (free and pending of every key).

    Raises OSError (no tracker answers).
    """
    try:
        code, value = _ask(tracker, [SUMMARY], ANSWER_SECONDS)
    except TimeoutError:
        raise TimeoutError(f"no whole answer within {ANSWER_SECONDS:g} s") from None
    match value:
        case {"server_info": list(devices), "queue_info": dict(queues)} if code == SUCCESS:
            if all(map(_is_device, devices)) and all(map(_is_queue, queues.values())):
                return {"server_info": devices, "queue_info": queues}
    raise ConnectionError(_nonsense(tracker, value if code == SUCCESS else code))


def _is_device(entry: Any) -> bool:
    match entry:
        case {"key": str(), "addr": [str() | None, int()]}:
            return True
    return False


def _is_queue(entry: Any) -> bool:
    match entry:
        case {"free": int(), "pending": int()}:
            return True
    return False


def _nonsense(tracker: Address, answer: Any) -> str:
    return f"what listens at {tracker} answers {repr(answer)[:60]}, which is nothing that a TVM RPC tracker says"


def _ask(tracker: Address, question: list[Any], seconds: float) -> tuple[Any, Any]:
    """The tracker's (code, value) within `seconds`; value None where it said no more than a code."""
    end = time.monotonic() + seconds
    try:
        connection = socket.create_connection((tracker.host, tracker.port), timeout=min(seconds, ANSWER_SECONDS))
    except TimeoutError:
        raise ConnectionError(f"tracker {tracker} takes no connection") from None
    with connection:
        said = json.dumps(question).encode()
        connection.sendall(struct.pack("<i", MAGIC))
        if struct.unpack("<i", _read(connection, 4, end))[0] != MAGIC:
            raise ConnectionError(f"{tracker} is no TVM RPC tracker")
        connection.sendall(struct.pack("<i", len(said)) + said)
        (size,) = struct.unpack("<i", _read(connection, 4, end))
        if not 0 < size <= MOST_BYTES:
            raise ConnectionError(_nonsense(tracker, f"{size} bytes"))
        content = _read(connection, size, end)
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        raise ConnectionError(_nonsense(tracker, content)) from None
    match answer:
        case [code, value]:
            return code, value
    return answer, None


def _read(connection: socket.socket, size: int, end: float) -> bytes:
    """`size` bytes before `end`, however they drip. Raises ConnectionError, TimeoutError."""
    content = bytearray()
    while len(content) < size:
        if (left := end - time.monotonic()) <= 0:
            raise TimeoutError
        connection.settimeout(left)
        if not (got := connection.recv(min(size - len(content), 65536))):
            raise ConnectionError("the tracker closed the connection")
        content += got
    return bytes(content)

"""Waiting for a tracker and a device: every wait has an end and says what it was for, and nonsense is one line. Needs
neither of them."""

import json
import random
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress

import pytest

import mest_compile as mest
from mest_compile.base.errors import DeviceError, UsageError
from mest_compile.devices import link, tracker
from mest_compile.devices.link import Link
from mest_compile.devices.tracker import Address, check_key

GREETING = struct.pack("<i", 0xFF271)
MAGIC = struct.pack("<i", tracker.MAGIC)


def sized(text):
    return struct.pack("<i", len(text)) + text


@contextmanager
def listening(answer, host="127.0.0.1"):
    """The Address of a server whose connections are handled by `answer`, one after another."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:

        def run():
            while True:
                try:
                    end, _ = server.accept()
                except OSError:
                    return
                with end, suppress(OSError):
                    answer(end)

        threading.Thread(target=run, daemon=True).start()
        yield Address(host, server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)


def tracking(answer):
    """Greets as a tracker, hears a question and says `answer`."""

    def run(end):
        assert end.recv(4) == MAGIC
        end.sendall(MAGIC)
        question = json.loads(end.recv(struct.unpack("<i", end.recv(4))[0]))
        end.sendall(answer(question) if callable(answer) else answer)

    return run


def dripping(end):
    """One byte after another, each of them in time, all of them not."""
    for _ in range(400):
        end.sendall(b" ")
        time.sleep(0.05)


# A device that takes the connection.


@pytest.mark.parametrize("half", [b"", GREETING[:2], GREETING + b"\0", GREETING + struct.pack("<i", 4000)])
def test_a_device_that_does_not_greet_is_given_up(half):
    def device(end):
        end.sendall(half)
        while True:  # drips what its greeting is long enough for
            time.sleep(0.2)
            end.sendall(b"k" if len(half) == 8 else b"")

    with listening(device) as there:
        found = sized(json.dumps([0, [there.host, there.port, "k:1"]]).encode())
        with listening(tracking(found)) as at:
            began = time.monotonic()
            with pytest.raises(DeviceError, match="none to be had within 1 s .*it has not greeted for 1 s"):
                mest.rpc(str(at), "k", wait_seconds=1, silence_seconds=1).open()
            assert time.monotonic() - began < 15


def connected():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return socket.create_connection(server.getsockname()), server.accept()[0]


@contextmanager
def linked(silence_seconds=0.5):
    """(what TVM's client, what the device holds of a link that has greeted, function that waits for the link's last
    word)."""
    (client, ours), (device, theirs) = connected(), connected()
    said = []
    thread = threading.Thread(target=lambda: said.append(Link(ours, theirs, silence_seconds, False).run()), daemon=True)
    thread.start()
    client.sendall(GREETING + sized(b"client:k"))

    def last_word():
        thread.join(10)
        return said[0] if said else "still waiting"

    with ours, theirs, client, device:
        yield client, device, last_word


@pytest.mark.parametrize("answer", [struct.pack("<Q", 2**62), struct.pack("<Qi", 4, 4), struct.pack("<Q", 0)])
def test_what_a_device_may_not_say_ends_the_link(answer):
    with linked() as (_, device, last_word):
        device.sendall(GREETING + sized(b"server:k") + answer)  # nothing was asked
        assert last_word() == "what it says is not TVM's RPC protocol"


def test_a_device_that_closes_the_connection_is_said_so():
    with linked() as (_, device, last_word):
        device.sendall(GREETING + sized(b"server:k"))
        device.shutdown(socket.SHUT_RDWR)
        assert last_word() == "it closed the connection"


@pytest.mark.parametrize("size", [-1, link.MOST_KEY_BYTES + 1])
def test_a_greeting_of_an_impossible_size_ends_the_link(size):
    with linked() as (_, device, last_word):
        device.sendall(GREETING + struct.pack("<i", size))
        assert last_word() == "what it says is not TVM's RPC protocol"


def test_an_answer_that_drips_is_late():
    with linked() as (client, device, last_word):
        device.sendall(GREETING + sized(b"server:k"))
        client.sendall(struct.pack("<Qi", 4, 1))
        with suppress(OSError):
            for byte in struct.pack("<Q", 1000) + bytes(100):
                device.sendall(bytes([byte]))
                time.sleep(0.02)
        assert last_word() == "it has not answered for 0.5 s"


def test_a_host_that_takes_no_connection_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(link, "START_SECONDS", 0.01)  # the link's process has not started by then
    with pytest.raises(ConnectionError, match=r"no connection to 127.0.0.1:9 within 0.01 s"):
        link.start("127.0.0.1", 9, 1.0)


# A tracker.

LISTED = {
    "server_info": [{"key": "server:a", "addr": ["127.0.0.1", 9090]}, {"key": "server:b", "addr": [None, 1]}],
    "queue_info": {"a": {"free": 1, "pending": 0}},
}


def test_a_right_answer_is_taken_over_ipv4_and_ipv6():
    hosts = ["127.0.0.1", "::1"] if socket.has_ipv6 else ["127.0.0.1"]
    for host in hosts:
        try:
            with listening(tracking(sized(json.dumps([0, LISTED]).encode())), host) as at:
                assert tracker.summary(at) == LISTED
                assert mest.rpc(str(at), "a").listed() == 1
        except OSError:
            assert host == "::1"  # a machine without it
    assert str(Address("::1", 9190)) == "[::1]:9190" == str(mest.rpc("[::1]:9190", "a").tracker)


def spoilt_answers():
    """(answer, whether it may be harmless) of answers that a tracker does not give: some thought of, many drawn."""
    yield from (
        (answer, False)
        for answer in (
            b"\0",
            b"\0\0\0\0",
            struct.pack("<i", -5),
            struct.pack("<i", 2**31 - 1),
            *map(
                sized,
                (
                    b"hello",
                    b"null",
                    b"0",
                    b"[]",
                    b"[0]",
                    b"[0, {}]",
                    b'[-1, "not now"]',
                    b"[0, null]",
                    b"\xff\xfe",
                    b"[" * 100_000,
                    b'[0, {"server_info": 3, "queue_info": {}}]',
                    b'[0, {"server_info": [{"key": "a"}], "queue_info": {}}]',
                    b'[0, {"server_info": [{"key": 1, "addr": ["a", 1]}], "queue_info": {}}]',
                    b'[0, {"server_info": [], "queue_info": []}]',
                    b'[0, {"server_info": [], "queue_info": {"a": {"free": "many", "pending": 0}}}]',
                ),
            ),
        )
    )
    rng, whole = random.Random(0), json.dumps([0, LISTED]).encode()
    for _ in range(80):
        spoilt = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(spoilt))
            spoilt[place : place + rng.randint(0, 3)] = rng.choice(
                [b"", b"[", b"}", b'"', b"null", b"-", bytes([rng.randrange(256)])]
            )
        yield sized(bytes(spoilt)), True


def test_a_tracker_that_answers_nonsense_is_one_line():
    with listening(lambda end: tracking(answers[0])(end)) as at:
        for answer, harmless in spoilt_answers():
            answers = [answer]
            for ask in (lambda: tracker.summary(at), lambda: tracker.request(at, "k", 2.0)):
                try:
                    found = ask()
                    assert harmless and all(
                        isinstance(entry["key"], str) and len(entry["addr"]) == 2 for entry in found["server_info"]
                    )
                    assert all(
                        isinstance(entry["free"] + entry["pending"], int) for entry in found["queue_info"].values()
                    )
                except OSError as problem:
                    assert len(str(problem)) < 200 and "\n" not in str(problem), answer


@pytest.mark.parametrize(
    "where", ["null", "[1, 2, 3]", '["127.0.0.1", 0, "k:1"]', '["a b", 9090, "k:1"]', '["127.0.0.1", 9090, ""]']
)
def test_a_device_that_is_none_is_refused(where):
    with (
        listening(tracking(sized(f"[0, {where}]".encode()))) as at,
        pytest.raises(ConnectionError, match="which is nothing that"),
    ):
        tracker.request(at, "k", 2.0)


def test_a_tracker_that_drips_has_one_deadline(monkeypatch):
    monkeypatch.setattr(tracker, "ANSWER_SECONDS", 0.3)
    # Four bytes come in time.
    with listening(dripping) as at, pytest.raises(ConnectionError, match="is no TVM RPC tracker"):
        tracker.summary(at)

    def slow(end):
        tracking(struct.pack("<i", 1000))(end)
        dripping(end)

    for answer in (slow, lambda end: time.sleep(4)):
        with listening(answer) as at:
            began = time.monotonic()
            with pytest.raises(TimeoutError, match="no whole answer within 0.3 s"):
                tracker.summary(at)
            assert time.monotonic() - began < 3


@pytest.mark.parametrize("key", ["", " ", "a b", "a\tb", "a:b", "a\n", "a\x00", "a\u00a0b", None, 5])
def test_a_key_that_the_tracker_would_take_apart_is_refused_where_it_is_given(key, mest_compile_command):
    with pytest.raises(UsageError, match="key is .*without blanks and colons"):
        mest.rpc("127.0.0.1:9190", key)
    if isinstance(key, str):
        for command in (
            ["serve", "--tracker", "127.0.0.1:9190", "--key", key],
            ["train", "--model", "mlp", "--data", "digits", "--tracker", "127.0.0.1:9190", "--key", key],
        ):
            ran = mest_compile_command(*command)
            assert (
                ran.code == 2
                and ("without blanks and colons" if key.strip() else "--key is given an empty text") in ran.err
            )
    assert check_key("pi-4_b.home") == "pi-4_b.home"


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1", "::1:9190", "a b:9190", ":9190", "[]:9190", "a:²", "a:0", "a:99999", "a:" + "9" * 5000, "a:-1", None],
)
def test_an_address_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match=r"wanted host:port, such as 127.0.0.1:9190 or \[::1\]:9190"):
        mest.rpc(text, "k")


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "3", None])
def test_a_wait_without_an_end_is_refused(seconds):
    for name in ("wait_seconds", "silence_seconds"):
        with pytest.raises(UsageError, match=f"{name} is .*more than 0"):
            mest.rpc("127.0.0.1:9190", "k", **{name: seconds})

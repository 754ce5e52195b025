"""`mest-compile tracker` and `serve`: the list of devices on one machine, and the devices that put themselves on it.

Both are TVM's own, in this process, so that one signal ends them and their sockets.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mest_compile.base.errors import DeviceError, UsageError
from mest_compile.cli.options import given_options
from mest_compile.cli.output import Json, print_json, print_table, stderr_console
from mest_compile.devices.tracker import Address, summary

if TYPE_CHECKING:
    from mest_compile.devices.session import Device

LOCAL = "127.0.0.1"
PAUSE_SECONDS = 0.2  # before serving again
WARNING = "TVM's RPC has no passwords and runs whatever it is sent: let nobody but yourself reach this port"


def find_device(tracker: str | None, key: str | None) -> Device | None:
    """Where --tracker and --key say that a step runs; None: here. Raises UsageError."""
    if (tracker is None) != (key is None):
        raise UsageError("--tracker and --key go together: the list of devices, and the name of those that will do")
    if tracker is None or key is None:
        return None
    from mest_compile.devices.session import rpc

    return rpc(tracker, key)


def bare(host: str) -> str:
    """An address to listen on, an IPv6 one without its brackets."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def tracker(
    context: typer.Context,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for devices that are not this machine.")
    ] = LOCAL,
    port: Annotated[int, typer.Option(help="TCP port to listen on.", min=1, max=65535)] = 9190,
    query: Annotated[
        str | None, typer.Option(help="host:port of a tracker: list its devices instead of being one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Keep a list of devices that serve, until interrupted."""
    if query is not None:
        if others := sorted(given_options(context) & {"host", "port"}):
            raise UsageError(f"--query asks another tracker and listens nowhere; leave out --{others[0]}")
        _show(query, as_json)
        return
    from tvm.rpc.tracker import PopenTrackerServerState

    host = bare(host)
    _wait(lambda: PopenTrackerServerState(host, port, port + 1, silent=True), "tracker", host, port, as_json)


def serve(
    tracker: Annotated[str, typer.Option(help="host:port of the tracker.")],
    key: Annotated[str, typer.Option(help="Name of this kind of device; several may share it.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 when the driving machine is another one.")
    ] = LOCAL,
    port: Annotated[int, typer.Option(help="TCP port to listen on.", min=1, max=65535)] = 9090,
    address: Annotated[
        str | None,
        typer.Option(help="Address under which the driving machine reaches this one, if the tracker sees another."),
    ] = None,
    opencl: Annotated[
        bool,
        typer.Option(
            "--opencl", help="Serve this machine's OpenCL device too; compiles a small library the first time."
        ),
    ] = False,
    library: Annotated[
        list[Path] | None,
        typer.Option(
            help="Library to load first, such as the libtvm_runtime_opencl.so of a TVM that was built with OpenCL."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run steps and kernels that a tracker's clients send to this machine, until interrupted."""
    from mest_compile.devices.session import rpc

    there = rpc(tracker, key).tracker
    host = bare(host)
    libraries = list(library or ())
    for path in libraries:
        if not path.is_file():
            raise UsageError(f"no library {path} to load")
    if opencl:
        from mest_compile.backends.opencl.serving import opencl_runtime

        libraries.append(opencl_runtime())
    paths = ":".join(str(path.resolve()) for path in libraries)
    from tvm.rpc.server import PopenRPCServerState

    try:
        summary(there)
    except OSError as problem:
        stderr_console().print(
            f"tracker {tracker} does not answer ({problem.strerror or problem}); asking until it does",
            highlight=False,
            soft_wrap=True,
        )
    folder = os.getcwd()

    def start() -> Any:
        os.chdir(folder)  # a session that ends badly leaves TVM's server in the session's own
        return PopenRPCServerState(
            host,
            port,
            port + 1,
            tracker_addr=(there.host, there.port),
            key=key,
            load_library=paths,
            custom_addr=address,
            silent=True,
        )

    _wait(start, f"{key} serves", host, port, as_json, again=True)


def _wait(start: Callable[[], Any], what: str, host: str, port: int, as_json: bool, again: bool = False) -> None:
    """Until interrupted. again: TVM's server ends with a session that crashed, or when its tracker is away for a
    minute; ours does not."""

    def say(problem: threading.ExceptHookArgs) -> None:
        stderr_console().print(f"{problem.exc_value}; going on", highlight=False, soft_wrap=True)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    threading.excepthook = say
    signal.signal(signal.SIGTERM, interrupt)
    state = _started(start, host, port)
    if host != LOCAL:
        stderr_console().print(f"{WARNING} ({Address(host, port)})", highlight=False, soft_wrap=True)
    if as_json:
        print_json({"host": host, "port": port})
    else:
        print(f"{what} at {Address(host, port)}")
    sys.stdout.flush()
    try:
        state.thread.join()
        while again:
            state.sock.close()
            time.sleep(PAUSE_SECONDS)
            state = _started(start, host, port)
            state.thread.join()
    except KeyboardInterrupt:
        for session in multiprocessing.active_children():
            session.kill()
        print("error: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # TVM's threads would keep the process, and its port, alive


def _started(start: Callable[[], Any], host: str, port: int) -> Any:
    try:
        return start()
    except (OSError, ValueError) as problem:
        said = getattr(problem, "strerror", None) or problem
        raise DeviceError(f"cannot listen on {Address(host, port)} ({said}); choose another --port") from problem


def _show(where: str, as_json: bool) -> None:
    try:
        found = summary(Address.parse(where))
    except OSError as problem:
        said = problem.strerror or problem
        raise DeviceError(f"tracker {where} does not answer: {said}; start one with mest-compile tracker") from problem
    names = sorted({entry["key"].removeprefix("server:") for entry in found["server_info"]} | set(found["queue_info"]))
    devices = [
        {
            "key": name,
            "devices": [
                ":".join(map(str, entry["addr"])) for entry in found["server_info"] if entry["key"] == f"server:{name}"
            ],
            "free": found["queue_info"].get(name, {}).get("free", 0),
            "waiting": found["queue_info"].get(name, {}).get("pending", 0),
        }
        for name in names
    ]
    if as_json:
        print_json(devices)
    else:
        print_table(
            ["key", "devices", "free", "waiting"],
            [[entry["key"], ", ".join(entry["devices"]), entry["free"], entry["waiting"]] for entry in devices],
        )

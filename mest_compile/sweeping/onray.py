"""A sweep's commands on a Ray cluster. Ray only places them: what a cell has come to is in its folder, which every node
sees under the same path, and a command whose node is lost begins again from there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mest_compile.base import plugins
from mest_compile.base.errors import MestError, NotInstalled
from mest_compile.sweeping.workers import LOST, command_line, environment


def run_command(arguments: Sequence[str], log: str, folder: str, threads: int, plug_ins: str) -> int:
    """On a node: a command of `mest-compile` in a process of its own; its exit code, or LOST. The process ends with the
    one of Ray that waits for it."""
    with open(log, "ab") as file:
        code = subprocess.run(
            command_line(arguments),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**environment(threads), plugins.GIVEN: plug_ins},
        ).returncode
    return LOST if code < 0 else code


class RayWorkers:
    """address  of the cluster; "auto": the one that this machine is of
    threads, need_bytes  of a command, which Ray reserves. Raises NotInstalled, MestError where nobody answers.
    """

    def __init__(self, address: str, threads: int, need_bytes: int):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as problem:
            raise NotInstalled("--ray needs Ray; pip install 'mest-compile[ray]', here and on its nodes") from problem
        try:
            ray.init(address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as problem:
            raise MestError(f"no Ray cluster at {address}: {' '.join(str(problem).split())}") from problem
        self._ray, self._threads = ray, threads
        self._remote = ray.remote(num_cpus=threads, memory=need_bytes, max_retries=0)(run_command)
        self._jobs: dict[Any, int] = {}

    @property
    def slots(self) -> int:
        """As many as the nodes that there are now have cores for, and one that waits for a node."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 0)) // self._threads)

    def start(self, job: int, arguments: Sequence[str], log: Path) -> None:
        plug_ins = os.environ.get(plugins.GIVEN, "")
        self._jobs[self._remote.remote(list(arguments), str(log), os.getcwd(), self._threads, plug_ins)] = job

    def ended(self) -> dict[int, int]:
        ready, _ = self._ray.wait(list(self._jobs), num_returns=len(self._jobs), timeout=0)
        return {self._jobs.pop(one): self._code(one) for one in ready}

    def _code(self, one: Any) -> int:
        try:
            return int(self._ray.get(one))
        except self._ray.exceptions.RayError:  # its process, or its node, is gone
            return LOST

    def close(self) -> None:
        for one in self._jobs:
            self._ray.cancel(one, force=True)
        self._jobs.clear()
        self._ray.shutdown()

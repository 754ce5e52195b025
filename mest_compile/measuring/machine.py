"""This machine, and what else it does while something is measured on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from time import perf_counter
from typing import Any

from mest_compile.hardware import host


def machine() -> dict[str, Any]:
    """What a reader needs to know about this machine to judge a timing."""
    import psutil

    lines = host.told(host.CPUINFO).splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", facts.get("Features", "")).split()
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "vector_isa": [flag for flag in ("avx2", "fma", "avx512f", "amx_tile", "asimd", "sve") if flag in flags],
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
    }


class Others:
    """Watches from when it is made on. own: ids of the processes, beside this one, that measure."""

    def __init__(self, own: Iterable[int] = ()):
        import psutil

        self._cpu_times, self._own = psutil.cpu_times, [psutil.Process(pid) for pid in (os.getpid(), *own)]
        self._began = perf_counter(), self._seconds()

    def _seconds(self) -> float:
        """Of processor time that others have had: what is busy on this machine, less what is ours. A hypervisor that
        gives the processor to somebody else counts as well."""
        times = self._cpu_times()
        busy = sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
        return busy - sum(sum(process.cpu_times()[:2]) for process in self._own)

    def cores(self) -> float:
        """Cores that others have used since, on average."""
        began, seconds = self._began
        return max(0.0, self._seconds() - seconds) / max(perf_counter() - began, 1e-9)

"""What the operating system tells and offers: cores that this process may use, the processor and its caches, locks that
end with who holds them, memory that is not needed any more.

The only module that names what exists on Linux alone, so that another system costs a fallback here and nothing
elsewhere.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import signal
import sys
import weakref
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has none: nothing is locked there
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)
CPUINFO, BOARD = Path("/proc/cpuinfo"), Path("/proc/device-tree/model")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
_AT_HWCAP, _PARENT_DEATH_SIGNAL = 16, 1  # of getauxval, and PR_SET_PDEATHSIG of prctl
BUSY = 0.5  # cores that others use, from which on times are not to be compared
_taken: weakref.WeakSet[Lock] = weakref.WeakSet()


def cores() -> int:
    """Processor cores that this process may use, 1 or more: those that it may run on, and no more than its container's
    quota pays for.
    Of a quota of 2.5 cores 2: threads that wait for one another are all stopped when one has used it up.
    """
    asked = getattr(os, "sched_getaffinity", None)
    usable = len(asked(0)) if asked else os.cpu_count() or 1
    quota = cpu_quota()
    return usable if quota is None else max(1, min(usable, int(quota)))


def load_average() -> float:
    """Cores that were busy in the last minute, whoever used them; 0 where the system does not tell."""
    tell = getattr(os, "getloadavg", None)
    return float(tell()[0]) if tell else 0.0


def cpu_quota() -> float | None:
    """Cores' worth of time that the control groups of this process allow it; None: no limit, or none that can be
    read."""
    found = []
    for line in told(OWN_CGROUPS).splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds == "":  # version 2: one tree, "quota period" in a file
            found += [_ratio(*told(group / "cpu.max").split()) for group in _groups(CGROUPS, path)]
        elif "cpu" in kinds.split(","):  # version 1: a tree a kind, two files
            found += [
                _ratio(*(told(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")))
                for root in (CGROUPS / kinds, CGROUPS / "cpu")
                for group in _groups(root, path)
            ]
    return min((quota for quota in found if quota is not None), default=None)


def _groups(root: Path, path: str) -> list[Path]:
    """A group's folder and those above it, up to the root: each may have a limit. In a container the root stands for
    the group itself."""
    inner = root / path.strip("/")
    return [inner, *(parent for parent in inner.parents if parent.is_relative_to(root))]


def _ratio(*said: str) -> float | None:
    """quota / period, both in microseconds; None for "max", -1 and what is no such pair."""
    if len(said) != 2 or not all(word.isdecimal() for word in said) or 0 in map(int, said):
        return None
    return int(said[0]) / int(said[1])


def forbids_execution(folder: Path) -> bool:
    """Whether code in that folder's files cannot be loaded (mounted "noexec"); False where the system does not tell."""
    try:
        return bool(os.statvfs(folder).f_flag & os.ST_NOEXEC)
    except (OSError, AttributeError):
        return False


def told(path: Path) -> str:
    """What stands in a file of the system; "" where it has none."""
    try:
        return path.read_text(errors="replace")
    except (OSError, ValueError):
        return ""


def hardware_bits() -> int | None:
    """The C library's bits of what an ARM processor has (AT_HWCAP), which under emulation are the emulated one's; None
    where it has none."""
    tell = getattr(ctypes.CDLL(None), "getauxval", None) if os.name == "posix" else None
    if tell is None:
        return None
    tell.restype = ctypes.c_ulong
    return int(tell(ctypes.c_ulong(_AT_HWCAP)))


def end_with_parent() -> None:
    """This process is killed when its parent ends. Where the system cannot do that nothing is done."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def resident_bytes(peak: bool = False) -> int | None:
    """Memory of this process, or the most that it had since `forget_peak`; None where the system does not tell.
    getrusage's maximum is no use: it is inherited from the parent over exec."""
    field = "VmHWM:" if peak else "VmRSS:"
    found = [line.split()[1] for line in told(STATUS).splitlines() if line.startswith(field)]
    return int(found[0]) * 1024 if found else None


def forget_peak() -> None:
    """The most memory is what there is now. Raises OSError where the system has no such thing."""
    REFERENCES.write_text("5")


def ask_for_huge_pages(start: int, size: int) -> None:
    """Lets the system back memory from address `start` on, `size` bytes, with pages of 2 MiB where it may. Where it has
    no such advice nothing is done."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        begin = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        rest = start + size - begin
        if rest >= 2**21:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(rest), mmap.MADV_HUGEPAGE)


class Lock:
    """What `exclusive` took; `release`, the end of a `with`, of this object or of the process gives it up."""

    def __init__(self, file: Any):
        self._file = file
        _taken.add(self)

    def release(self) -> None:
        self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def exclusive(path: str | os.PathLike) -> Lock | None:
    """Takes the file at `path`, which is made when it is not there, for the caller alone, without waiting; None:
    somebody else has it, in this process or another. A process that is killed gives it up, a child that it forked does
    not hold it. The file is left behind.

    Where the file system has no locks nothing is locked, with a line in the log. Raises OSError when the file cannot be
    made.
    """
    file = open(path, "ab")  # noqa: SIM115  # the lock lives as long as it
    try:
        _flock(file, wait=False)
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return Lock(file)


def give_memory_back() -> None:
    """Gives the system what was freed: glibc keeps large blocks too, once one of their size was freed (70 of 83 MiB of
    an arena). Other libraries do so by themselves, or are not asked."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None:
        trim(0)


def wait_exclusive(file: Any) -> None:
    """Waits until an open file is the caller's alone, which it is until it is closed."""
    _flock(file, wait=True)


def _flock(file: Any, wait: bool) -> None:
    """Raises BlockingIOError when another one has the file."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as problem:  # a network's file system without locks
        log.warning("%s cannot be locked (%s); see to it that only one process uses it", file.name, problem.strerror)


def _let_go() -> None:
    """In a forked child: its copy of an open file would hold the lock on after the parent's death."""
    for lock in list(_taken):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)

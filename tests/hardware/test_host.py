"""What the operating system tells of cores, and the locks that end with who holds them."""

import os
import signal
import subprocess
import sys

import pytest

from mest_compile.hardware import host


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Lets this process be in the control groups of `own` with the files {path: text}; 8 cores are there."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(host, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(host, "OWN_CGROUPS", tmp_path / "own")

    def make(own, files):
        (tmp_path / "own").write_text(own)
        for path, text in files.items():
            file = tmp_path / "groups" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return make


@pytest.mark.parametrize(
    ("own", "files", "wanted"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),  # a container sees itself as the root
        (
            "0::/a/b\n",
            {"cpu.max": "max 100000\n", "a/cpu.max": "350000 100000\n", "a/b/cpu.max": "max 100000\n"},
            3,
        ),  # any group above
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),  # half a core is one
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),  # no more than there are
        ("5:cpu,cpuacct:/docker/x\n", {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        (
            "5:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("5:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("3:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "", "cpu.max": "nonsense"}, 8),
    ],
)
def test_a_containers_quota_counts_as_cores(system, own, files, wanted):
    system(own, files)
    assert host.cores() == wanted


def test_a_system_without_affinity_and_groups_tells_its_cores(system, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert host.cores() == 5


def test_a_lock_is_one_holders_until_it_is_released(tmp_path):
    held = host.exclusive(tmp_path / "lock")
    assert host.exclusive(tmp_path / "lock") is None
    held.release()
    for _ in range(2):
        with host.exclusive(tmp_path / "lock"):
            assert host.exclusive(tmp_path / "lock") is None


def test_a_killed_process_keeps_no_lock(tmp_path):
    code = (
        "from mest_compile.hardware import host; "
        f"lock = host.exclusive({str(tmp_path / 'lock')!r}); print(lock is not None, flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    assert host.exclusive(tmp_path / "lock") is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with host.exclusive(tmp_path / "lock"):
        pass
    holder.stdin.close()
    holder.stdout.close()


def test_a_forked_child_does_not_hold_its_parents_lock(tmp_path):
    held = host.exclusive(tmp_path / "lock")
    (told, tell), (begun, begin) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begin, b"x")
        os.read(told, 1)  # lives on until the parent has looked
        os._exit(0)
    os.read(begun, 1)
    held.release()
    again = host.exclusive(tmp_path / "lock")
    os.write(tell, b"x")
    os.waitpid(child, 0)
    for end in (told, tell, begun, begin):
        os.close(end)
    with again:
        pass


def test_a_file_system_without_locks_costs_the_lock_only(tmp_path, monkeypatch, caplog):
    def refuse(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(host.fcntl, "flock", refuse)
    with host.exclusive(tmp_path / "lock"):
        pass
    assert "No locks available" in caplog.text

"""What every module keeps to: it is small, and asks a kind of device instead of comparing its name."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 400
# Who may compare names of kinds of devices: nobody else than a kind's own files.
KINDS = ("mest_compile/backends/", "schedules/")


def modules(*folders: str) -> dict[str, str]:
    """{path: text}."""
    rivals = ROOT / "benchmarks" / "environments"  # of others, where benchmarks/environments.sh puts them
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if rivals not in path.parents]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def test_no_module_is_longer_than_one_reads():
    found = modules("mest_compile", "schedules", "benchmarks", "examples")
    assert len(found) > 200
    assert not {path: text.count("\n") for path, text in found.items() if text.count("\n") > MOST_LINES}


def test_one_module_knows_what_only_linux_has():
    """Of others it costs a fallback there. What is asked of devices and containers is theirs, whatever runs here."""
    only = re.compile(r"/proc/|/sys/|\.(prctl|madvise)\b|sched_getaffinity|malloc_trim|getauxval")
    allowed = {"mest_compile/hardware/host.py", "mest_compile/devices/probe.py"}
    assert allowed == {path for path, text in modules("mest_compile", "schedules").items() if only.search(text)}


def compared(code: str) -> list[str]:
    """Comparisons of something called "device", or of an attribute of that name, with a text."""

    def is_kind(node: ast.expr) -> bool:
        return (isinstance(node, ast.Attribute) and node.attr == "device") or (
            isinstance(node, ast.Name) and node.id == "device"
        )

    def is_text(node: ast.expr) -> bool:
        parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
        return any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts)

    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Compare)
        and any(map(is_kind, (node.left, *node.comparators)))
        and any(map(is_text, (node.left, *node.comparators)))
    ] + [
        ast.unparse(node.subject)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Match) and is_kind(node.subject)
    ]


def test_nobody_compares_kinds_of_devices_by_name():
    others = {path: text for path, text in modules("mest_compile", "benchmarks").items() if not path.startswith(KINDS)}
    assert len(others) > 180
    assert not {path: found for path, text in others.items() if (found := compared(text))}


@pytest.mark.parametrize(
    "line",
    [
        'if target.device == "cpu": pass',
        'run = "opencl" != facts.target.device',
        'x = device in ("cpu", "opencl")',
        'match target.device:\n    case "cpu": pass',
    ],
)
def test_a_comparison_is_noticed(line):
    assert compared(line) and not compared("device is None or target.device == other.device")

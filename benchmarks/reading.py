"""What reading a kernel's text costs, by TVM's own parser and by ours, beside compiling the kernel.

    python benchmarks/reading.py

writes benchmarks/results/reading.json, over the kernels of a step of the wide ResNet-32 and over the problems that the
tests try every kernel of every kind of device with. Both readers take turns on a kernel, which is then compiled. Times
are processor time, that of a linker included, so that what else the machine does matters little.
"""

from __future__ import annotations

import ast
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from run import RESULTS, WIDE

from mest_compile import __version__
from mest_compile.base.files import write_json
from mest_compile.hardware.backend import backend_of
from mest_compile.kernels.reader import parse
from mest_compile.kernels.source import KernelSource, kernel_source
from mest_compile.measuring.benchmark import machine

TURNS = 3
RESULT = RESULTS / "reading.json"
TESTS = Path(__file__).resolve().parents[1] / "tests"


def of_step() -> list[KernelSource]:
    import mest_compile as mest
    from mest_compile.models.catalog import build_model

    model = build_model(WIDE.model, WIDE.input_shape, WIDE.classes, WIDE.width, WIDE.seed)
    step = mest.compile(model, WIDE.input_shape, scheme="block:4x1", sparsity=WIDE.sparsity, threads=1)
    return list(step._compiled.sources.values())


def of_tests(device: str) -> list[KernelSource]:
    sys.path.extend(str(TESTS / folder) for folder in ("", "lib", "operators", "kernels"))
    from test_parsing import problems

    given, found = problems(device)
    return [kernel_source(*each, given.TARGET) for each in found]


def seconds(call: Callable[[], Any]) -> float:
    """Of processors, in this process and those that it waits for."""

    def spent() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    start = spent()
    call()
    return spent() - start


def measure(sources: Iterable[KernelSource], turns: int) -> dict[str, Any]:
    """Of the median kernel what reading and compiling take, and of all what share of compiling each reader is, or
    would be."""
    import tvm
    from tvm.script import tirx

    distinct, rows = {source.key: source for source in sources}, []
    for source in distinct.values():
        kind, symbol = backend_of(source.target), source.symbol

        def compiled(source: KernelSource = source, kind: Any = kind, symbol: str = symbol) -> bytes:
            return kind.dump(kind.compile(source.text, symbol, source.target, source.checked), source.target)

        ways: list[Callable[[], Any]] = [
            lambda text=source.text: tvm.script.from_source(text, extra_vars={"T": tirx}),
            lambda text=source.text, symbol=symbol: parse(text, symbol),
            lambda text=source.text: ast.parse(text),
        ]
        found = [statistics.median(each) for each in zip(*([seconds(way) for way in ways] for _ in range(turns)))]
        rows.append([*found, seconds(compiled)])
    theirs, ours, python, compiling = np.array(rows).T
    others = compiling.sum() - ours.sum()
    return {
        "kernels": len(rows),
        "tvm_ms": round(1e3 * float(np.median(theirs)), 2),
        "reader_ms": round(1e3 * float(np.median(ours)), 2),
        "python_ms": round(1e3 * float(np.median(python)), 2),
        "compile_ms": round(1e3 * float(np.median(compiling)), 2),
        "tvm_share": round(float(theirs.sum() / (others + theirs.sum())), 3),
        "reader_share": round(float(ours.sum() / compiling.sum()), 3),
        "ratio": round(float(np.median(theirs / ours)), 2),
    }


def row(name: str, found: dict[str, Any]) -> str:
    """Of the table in docs/architecture.md."""
    return (
        f"| {name} | {found['kernels']} | {found['tvm_ms']:.0f} | {found['reader_ms']:.1f} | {found['python_ms']:.1f} "
        f"| {found['compile_ms']:.0f} | {found['tvm_share']:.0%} | {found['reader_share']:.0%} |"
    )


def main() -> None:
    found: dict[str, dict[str, Any]] = {}
    for name, sources in (
        ("wide ResNet-32, `block:4x1`", of_step()),
        ("problems of the tests, CPU", of_tests("cpu")),
        ("problems of the tests, OpenCL", of_tests("opencl")),
    ):
        found[name] = measure(sources, TURNS)
        print(row(name, found[name]), flush=True)
    write_json(
        RESULT,
        {
            "command": "python benchmarks/reading.py",
            "machine": machine(),
            "turns": TURNS,
            "kernels": found,
            "versions": {
                "mest-compile": __version__,
                "python": sys.version.split()[0],
                **{name: metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi")},
            },
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


if __name__ == "__main__":
    main()

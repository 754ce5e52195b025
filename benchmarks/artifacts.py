"""Sizes of artifacts as `mest-compile build` reports them; `python benchmarks/artifacts.py` writes
results/artifacts.json and the table of docs/devices.md."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import documents

from mest_compile.base.files import write_atomically

HERE = Path(__file__).resolve().parent
RESULTS, DOCUMENT = HERE / "results" / "artifacts.json", HERE.parent / "docs" / "devices.md"
embed = partial(documents.embed, what="artifacts")
COMMAND = "mest-compile build --target cortex-a76 --sparsity 0.9"
CASES = (
    ("--model resnet20 --batch 64", "block"),
    *(("--model resnet32 --width 32 --batch 64", scheme) for scheme in ("unstructured", "block", "pattern")),
)


def measure() -> list[dict[str, Any]]:
    """One entry a case: its command and what it printed."""
    found = []
    for options, scheme in CASES:
        command = f"{COMMAND} {options} --scheme {scheme}"
        print(command, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    *command.replace("mest-compile", "mest_compile", 1).split(),
                    "--out",
                    f"{folder}/artifact",
                    "--json",
                ],
                capture_output=True,
                text=True,
                check=True,
            )
        printed = json.loads(done.stdout)
        found.append({"command": command, "bytes": printed["bytes"], "files": printed["files"]})
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown: a line a case."""
    lines = ["| model and scheme | library KiB | state KiB | whole KiB |", "|---|---:|---:|---:|"]
    for case in results["cases"]:
        words = case["command"].removeprefix(COMMAND).replace("--", "").split()
        sizes = [case["files"][name]["bytes"] / 1024 for name in ("step.so", "state.safetensors")]
        lines.append(f"| {' '.join(words)} | {sizes[0]:.0f} | {sizes[1]:.0f} | {case['bytes'] / 1024:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    results = {"command": "python benchmarks/artifacts.py", "tvm": metadata.version("apache-tvm"), "cases": measure()}
    write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")
    write_atomically(DOCUMENT, embed(DOCUMENT.read_text(), table(json.loads(RESULTS.read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

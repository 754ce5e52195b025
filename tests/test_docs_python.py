"""Python in the documentation runs and says what the text around it says."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_memory_page_meets_its_budget_by_computing_again(capsys):
    code = re.search(r"```python\n(.*?)```", (DOCS / "memory.md").read_text(), re.S)[1]
    exec(compile(code, "docs/memory.md", "exec"), {})
    total, recomputed = map(int, capsys.readouterr().out.split())
    assert total <= 1_700_000 and recomputed > 0


def test_the_memory_page_quotes_the_recorded_figures():
    entries = json.loads((ROOT / "benchmarks" / "results" / "full.json").read_text())["entries"]
    for budget, key in ("none", ""), ("135000000 bytes", " in 135000000 bytes"):
        found = entries[f"resnet32 width 32 64x3x32x32 block:4x1 0.9 threads 1{key} vs torch"]
        ours, rival = found["ours"], found["rival"]
        figures = [f"{side / 2**20:.0f}" for side in (ours["planned_bytes"], ours["training_peak_bytes"], rival["training_peak_bytes"])]
        assert f"| {budget} | {' | '.join(figures)} | {found['ratio']:.2f} |" in (DOCS / "memory.md").read_text()

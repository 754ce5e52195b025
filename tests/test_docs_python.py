"""Python in the documentation runs and says what the text around it says."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_memory_page_meets_its_budget_by_computing_again(capsys):
    code = re.search(r"```python\n(.*?)```", (DOCS / "memory.md").read_text(), re.S)[1]
    exec(compile(code, "docs/memory.md", "exec"), {})
    total, recomputed = map(int, capsys.readouterr().out.split())
    assert total <= 1_700_000 and recomputed > 0

"""What a type checker sees of the package, as `py.typed` promises."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import mest_compile as mest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import mest_compile as mest
step = mest.compile(None, (1, 1, 8, 8), scheme="block", sparsity=0.5)
reveal_type(step.sparsity())
reveal_type(mest.Recipe.from_dict)
step.no_such_method()
"""


def test_what_checkers_see_is_what_is_found_when_it_runs():
    block = next(node for node in ast.parse(Path(mest.__file__).read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == mest._HOME
    assert all(getattr(mest, name) is getattr(importlib.import_module(home), name) for name, home in seen.items())


def test_a_script_of_a_user_is_checked_against_real_signatures(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            str(ROOT / "pyproject.toml"),
            "--follow-imports",
            "silent",
            str(script),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    said = done.stdout
    assert 'type is "dict[str, float]"' in said or "builtins.dict[builtins.str, builtins.float]" in said, (
        said + done.stderr
    )
    assert (
        "-> mest_compile.training.recipe.Recipe" in said or "Recipe" in said.split("script.py:5")[1].split("\n")[0]
    ), said
    assert '"TrainStep" has no attribute "no_such_method"' in said, said

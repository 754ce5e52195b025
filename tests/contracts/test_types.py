"""What a type checker sees of the package, as `py.typed` promises."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import mest_compile as mest
from mest_compile.base.errors import DuplicateName
from mest_compile.operators.losses.loss import LOSSES

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
    assert seen == mest._HOME | {name: kind.__module__ for name, kind in mest._plug_ins().items()}
    assert set(mest.__all__) == set(dir(mest)) == {"__version__", *seen}
    assert all(getattr(mest, name) is getattr(importlib.import_module(home), name) for name, home in seen.items())


def test_importing_it_loads_no_plug_in_and_looking_for_one_neither_torch_nor_tvm():
    script = """
import sys
import mest_compile as mest
assert not [name for name in sys.modules if name.startswith("mest_compile.") or name == "numpy"]
assert not hasattr(mest, "no_such_function") and "numpy" not in sys.modules
assert not hasattr(mest, "NoSuchClass") and mest.SGD.name == "sgd" and mest.MSE.name == "mse" and mest.Block.name
print({"torch", "tvm"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_two_plug_ins_of_one_public_name_are_refused(monkeypatch):
    for taken in (mest.Block, mest.Recipe):  # a scheme's name, and one that is no plug-in's
        other = type(taken.__name__, (), {"__module__": "mest_compile.operators.losses.other"})
        monkeypatch.setitem(LOSSES.load(), "other", other)
        with pytest.raises(DuplicateName, match=rf"mest.{taken.__name__} is what both .*losses.other.* have; ren"):
            mest.SGD  # noqa: B018


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

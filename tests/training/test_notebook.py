"""A notebook shows progress as lines and what is made as tables, without widgets."""

import importlib.util

import pytest

ABSENT = [name for name in ("nbclient", "ipykernel") if importlib.util.find_spec(name) is None]
TRAIN = """
import numpy as np
import mest_compile as mest
from pathlib import Path
from mest_compile.base.screens import CompileLine
from mest_compile.kernels.cache import Builder

builder = Builder(folder=Path({folder!r}), progress=CompileLine())
rng = np.random.default_rng(0)
labels = rng.integers(0, 4, 64)
images = rng.standard_normal((64, 20), dtype=np.float32)
images[np.arange(64), labels] += 4
step = mest.compile("mlp", (16, 20), scheme="unstructured", sparsity=0.5, threads=1, builder=builder)
run = mest.Trainer(step, mest.Recipe(3, "static", lr=0.05)).fit((images, labels), (images, labels))
"""
TABLE = """
from mest_compile.measuring.table import Row, SpeedTable

facts = {"model": "mlp", "width": None, "input_shape": [16, 20], "threads": 1, "baseline": "torch", "repeats": 7,
         "machine": {"cpu": "one"}}
SpeedTable((Row("block", 0.9, 0.01, 0.02, 2.0, 1.9, 2.1, 0.95, 100),), facts)
"""


@pytest.mark.skipif(bool(ABSENT), reason=f"{', '.join(ABSENT)} not installed: make venv")
def test_a_notebook_shows_progress_and_tables(kept_kernels, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    cells = [TRAIN.format(folder=str(kept_kernels / "usual")), "step", "run", TABLE, "run.plot()"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell["outputs"] for cell in book.cells]
    lines = "".join(one["text"] for one in outputs[0] if one.get("name") == "stdout")
    table = [line.split() for line in lines.splitlines() if line.strip() and "compiling" not in line]
    assert table[0] == ["epoch", "loss", "train", "test", "images/s", "sparsity"]
    assert [line[0] for line in table[1:]] == ["1/3", "2/3", "3/3"]
    kinds = {kind for cell in outputs for one in cell for kind in one.get("data", {})}
    assert kinds == {"text/plain", "text/html", "image/png"}  # and no widgets
    shown = [cell[-1]["data"] for cell in outputs[1:]]
    assert "2 of 3 layers sparse" in shown[0]["text/plain"]
    assert "<table" in shown[1]["text/html"] and f"<td>{float(table[3][1]):.4f}"[:8] in shown[1]["text/html"]
    assert "<table" in shown[2]["text/html"] and "1.90 to 2.10" in shown[2]["text/html"]
    assert shown[3]["image/png"]

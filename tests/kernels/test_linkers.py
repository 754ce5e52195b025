"""A linker is all that compiling needs beside the Python packages, and ziglang's is one."""

import os
import shutil

import numpy as np
import torch.nn as nn
from test_building import SOURCE, imports

import mest_compile as mest
from mest_compile.kernels import linkers
from mest_compile.kernels.cache import Builder


def test_ziglang_links_where_nothing_else_does(tmp_path, monkeypatch):
    """A package of that name, started as ziglang's is, that has the system's linker do the work."""
    real = shutil.which("ld.lld") or shutil.which("ld")
    (tmp_path / "ziglang").mkdir()
    (tmp_path / "ziglang" / "__init__.py").write_text("")
    (tmp_path / "ziglang" / "__main__.py").write_text(
        f"import os, sys\nassert sys.argv[1] == 'ld.lld'\nos.execv({real!r}, [{real!r}, *sys.argv[2:]])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert [linker.name for linker in linkers.linkers(linkers.host_machine())] == ["zig ld.lld"]
    assert imports(Builder(tmp_path / "kernels").function(SOURCE))


def test_a_step_is_compiled_and_exported_without_a_c_compiler(tmp_path, monkeypatch):
    from tvm.support import cc

    def refuse(*arguments, **options):
        raise OSError("no C compiler")

    refuse.get_target_triple = refuse
    monkeypatch.setattr(cc, "create_shared", refuse)
    step = mest.compile(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (4, 4), scheme="dense", sparsity=0, threads=1
    )
    step.export(tmp_path / "made")
    assert np.isfinite(step(np.ones((4, 4), np.float32), np.zeros(4, np.int64)).loss)

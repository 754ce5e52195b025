"""Threads and processes that want one step, or the compiler, at the same time.

MEST_CALLS sets how many calls eight threads make together (default 400);
`MEST_CALLS=10000 pytest tests/runtime/test_turns.py` takes a minute.
"""

import copy
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

import mest_compile as mest
from mest_compile.base.registry import Registry

CALLS = int(os.environ.get("MEST_CALLS", "400"))
THREADS = 8
SHAPE = (4, 8)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def compiled(model):
    return mest.compile(model, SHAPE, scheme="unstructured", sparsity=0.5, dense_layers=["2"], threads=1)


@pytest.fixture(scope="module")
def step():
    return compiled(net())


def at_once(count, work):
    """Runs work(0), work(1) and so on, each in a thread, begun together; what they raised."""
    start, raised = threading.Barrier(count), []

    def run(number):
        start.wait()
        try:
            work(number)
        except Exception as problem:
            raised.append(problem)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_eight_threads_take_turns_and_each_gets_its_own_answer(step, tmp_path):
    batches = [
        (np.random.default_rng(i).standard_normal(SHAPE).astype(np.float32), np.arange(4) % (i % 4 + 1))
        for i in range(THREADS)
    ]
    asked = {
        "loss": lambda i: step(*batches[i], lr=0.0).loss,
        "clipped": lambda i: step(*batches[i], lr=0.0, clip_norm=0.1).loss,
        "predict": lambda i: step.predict(batches[i][0]),
        "gradients": lambda i: step.gradients(*batches[i])["0.weight"],
        "masks": lambda i: step.masks()["0.weight"],
        "state": lambda i: step.state_dict()["0.weight"],
        "save": lambda i: step.save(tmp_path / f"{i}") or 0,
        "profile": lambda i: step.profile(*batches[i], repeats=1).keys() and 0,
    }
    wanted = {what: [ask(i) for i in range(THREADS)] for what, ask in asked.items()}
    wrong = []

    def work(i):
        rng = np.random.default_rng(i)
        for what in rng.choice(list(asked), CALLS // THREADS, p=[0.2, 0.1, 0.3, 0.2, 0.08, 0.08, 0.02, 0.02]):
            if not np.array_equal(asked[what](i), wanted[what][i]):
                wrong.append((i, what))

    assert not at_once(THREADS, work) and not wrong


def test_a_state_that_one_thread_restores_is_whole_for_the_others(step, tmp_path):
    images, seen = np.ones(SHAPE, np.float32), set()
    step.save(tmp_path / "0")
    step.mutate(0.7, 0.5)
    step(images, np.arange(4), lr=0.1)
    step.save(tmp_path / "1")
    wanted = set()
    for name in "01":
        step.restore(tmp_path / name)
        wanted.add(step.predict(images).tobytes())

    def work(number):
        for turn in range(30):
            if number == 0:
                step.restore(tmp_path / f"{turn % 2}")
            else:
                seen.add(step.predict(images).tobytes())

    assert not at_once(3, work)
    assert len(wanted) == 2 and seen <= wanted


def test_a_registry_that_two_threads_ask_first_has_all_its_plug_ins(tmp_path, monkeypatch):
    package = tmp_path / "plugs_for_two"
    package.mkdir()
    (package / "__init__.py").write_text("registry = None")
    for name in "abc":
        (package / f"{name}.py").write_text(
            "import time, plugs_for_two\ntime.sleep(0.02)\n"
            f"def found(): pass\nplugs_for_two.registry.add({name!r}, found)"
        )
    monkeypatch.syspath_prepend(tmp_path)
    import plugs_for_two

    registry = plugs_for_two.registry = Registry("plug-in", "plugs_for_two")
    found = []
    assert not at_once(4, lambda number: found.append(registry.find("c")))
    assert len(set(found)) == 1 and registry.names() == ["a", "b", "c"]


def test_a_registry_whose_loading_was_interrupted_is_loaded_again(tmp_path, monkeypatch):
    package = tmp_path / "plugs_interrupted"
    package.mkdir()
    (package / "__init__.py").write_text("registry, interrupted = None, []")
    (package / "a.py").write_text(
        "import plugs_interrupted as p\ndef found(): pass\np.registry.add('a', found)\n"
        "if not p.interrupted:\n    p.interrupted.append(True)\n    raise KeyboardInterrupt"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import plugs_interrupted

    registry = plugs_interrupted.registry = Registry("plug-in", "plugs_interrupted")
    with pytest.raises(KeyboardInterrupt):
        registry.load()
    assert registry.names() == ["a"]
    with pytest.raises(mest.MestError, match="registered twice"):
        registry.add("a", pickle.dumps)


FIRST = """
import multiprocessing, sys, threading
sys.path.insert(0, {tests!r})
import numpy as np
from test_turns import SHAPE, at_once, compiled, net

nets, steps, folder = [net(), net()], {{}}, {folder!r}
print("compiled", at_once(2, lambda i: steps.__setitem__(i, compiled(nets[i]))))
print("at once", at_once(4, lambda i: steps[i % 2].export(f"{{folder}}/{{i}}") if i else compiled(nets[0])))
print("losses", len({{steps[i](np.ones(SHAPE, "f"), np.arange(4)).loss for i in (0, 1)}}))

def child():
    import mest_compile as mest
    image = np.ones(SHAPE, "f")
    export = f"{{folder}}/1"
    for use in (lambda: compiled(nets[0]), lambda: steps[0].predict(image), lambda: mest.open_artifact(export)):
        try:
            use()
        except mest.MestError as problem:
            print("told", problem, flush=True)

process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(60)
print("hangs", process.is_alive(), process.kill())
"""


def test_threads_compile_first_and_export_at_once_and_a_forked_process_is_told(tmp_path):
    code = FIRST.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    more = {"TVM_NUM_THREADS": "2"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=3000, env=os.environ | more
    )
    assert ran.stdout.splitlines()[:3] == ["compiled []", "at once []", "losses 1"], ran.stdout + ran.stderr
    assert ran.stdout.count("told this process was forked") == 3 and "hangs False" in ran.stdout, (
        ran.stdout + ran.stderr
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_process_forked_before_anything_was_compiled_may_compile():
    code = (
        "import os, mest_compile as mest, mest_compile.base.exclusive as e\nchild = os.fork()\n"
        "if not child:\n    e.this_process()\n    os._exit(3)\nprint(os.waitstatus_to_exitcode(os.waitpid(child, "
        "0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "3\n"


@pytest.mark.parametrize(
    "way",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda step: copy.deepcopy(mest.Trainer(step, mest.Recipe(2)))],
    ids=["copy", "deepcopy", "pickle", "trainer"],
)
def test_who_copies_a_step_is_told_what_to_use(way, step):
    with pytest.raises(mest.MestError, match=r"step\.save\(path\) and mest\.load\(path\)"):
        way(step)

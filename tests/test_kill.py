"""Training that is killed with SIGKILL at random moments, again and again, and ends as if nothing had happened.

MEST_KILLS sets the number of kills (default 2); `MEST_KILLS=50 pytest tests/test_kill.py` takes some minutes.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from mest_compile.runtime import checkpoint

KILLS = int(os.environ.get("MEST_KILLS", "2"))
CLOCKED = {"images_per_second", "train_seconds", "step_seconds", "evaluation_seconds", "kernel_seconds"}
MAIN = [sys.executable, "-c", "from mest_compile.cli import main; main()", "train"]
RECIPE = """
epochs = 8
method = "em_s"
lr = 0.05
mutate_every = 1

[sieve]
drop = 0.1
after_epoch = 2
every = 2

[run]
model = "mlp"
width = 512
data = "digits"
scheme = "block"
sparsity = 0.8
"""


def start(*arguments):
    return subprocess.Popen([*MAIN, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said


def without_clock(metrics):
    kept = {key: value for key, value in metrics.items() if key not in CLOCKED}
    if kept["mutation"]:
        kept["mutation"] = {key: value for key, value in kept["mutation"].items() if key != "seconds"}
    return kept


def outcome(folder: Path):
    """What a run came to, but for its clocks: metrics, and the arrays and facts of both checkpoints."""
    lines = [without_clock(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    states = []
    for name in ("checkpoint", "checkpoint.previous", "best"):
        arrays, facts = checkpoint.read(folder / f"{name}.safetensors")
        facts["extra"]["history"] = [without_clock(metrics) for metrics in facts["extra"]["history"]]
        states.append((arrays, facts))
    return lines, states


def assert_same(one, other):
    assert one[0] == other[0]
    for (arrays, facts), (others, other_facts) in zip(one[1], other[1], strict=True):
        assert facts == other_facts and arrays.keys() == others.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, others[name], name)


def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    seed = random.randrange(2**32)
    print("seed", seed)
    moments = random.Random(seed)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    finish(start("--recipe", recipe, "--out", tmp_path / "warm"))  # kernels are in the cache from here on
    began = time.perf_counter()
    finish(start("--recipe", recipe, "--out", tmp_path / "whole"))
    seconds, wanted = time.perf_counter() - began, outcome(tmp_path / "whole")
    assert_same(outcome(tmp_path / "warm"), wanted)
    assert wanted[1][0][0]["extra/sieve.kept"].sum() < len(wanted[1][0][0]["extra/sieve.kept"])

    kills = runs = resumed = 0
    while kills < KILLS:
        folder = tmp_path / f"run{runs}"
        process = start("--recipe", recipe, "--out", folder)
        while not (folder / "checkpoint.safetensors").exists():  # what is killed before it has begun has nothing to resume
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        delay = moments.uniform(0, seconds / 3)  # the rest of a run: start-up is most of it
        while True:
            try:
                process.wait(delay)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
            process = start("--resume", folder)
            resumed += 1
            delay = moments.uniform(0, 1.2 * seconds) if kills < KILLS else 300
        finish(process)
        assert_same(outcome(folder), wanted)
        runs += 1
    assert resumed >= KILLS

"""Training that is killed with SIGKILL, again and again, and ends as if nothing had happened.

Every other kill comes at a random moment, the others while a checkpoint is written. MEST_KILLS sets their number
(default 2); `MEST_KILLS=50 pytest -s tests/training/test_kill.py` takes some minutes.
"""

import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import forked
import numpy as np
import pytest

from mest_compile.runtime import checkpoint

KILLS = int(os.environ.get("MEST_KILLS", "2"))
CLOCKED = {"images_per_second", "train_seconds", "step_seconds", "evaluation_seconds", "kernels"}
RECIPE = """
epochs = 8
method = "em_s"
lr = 0.05
mutate_every = 1

[sieve]
drop = 0.1
after_epoch = 2
every = 2

{freeze}
[run]
model = "mlp"
width = 512
data = "digits"
scheme = "{scheme}"
sparsity = 0.8
"""


def finish(process):
    process.join(1200)
    assert process.exitcode == 0, forked.said(process)


def without_clock(metrics):
    kept = {key: value for key, value in metrics.items() if key not in CLOCKED}
    if "freeze" in kept:
        kept["freeze"] = {key: value for key, value in kept["freeze"].items() if key != "seconds"}
    if "budget" in kept:
        kept["budget"] = {key: value for key, value in kept["budget"].items() if key != "seconds"}
    if kept["mutation"]:
        kept["mutation"] = {
            key: value for key, value in kept["mutation"].items() if key not in ("seconds", "reindex_seconds")
        }
        layers = Counter(
            kept["mutation"]["layers"]
        )  # whether specialized kernels are worth compiling is decided by times
        kept["mutation"]["layers"] = {"unchanged": layers["unchanged"], "moved": layers.total() - layers["unchanged"]}
    return kept


def outcome(folder: Path):
    """What a run came to, but for its clocks: metrics, and the arrays and facts of both checkpoints."""
    lines = [without_clock(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    states = []
    for name in ("checkpoint", "checkpoint.previous", "best"):
        arrays, facts = checkpoint.read(folder / f"{name}.safetensors")
        facts["extra"].get("budget", {}).pop("seconds", None)
        facts["extra"]["history"] = [without_clock(metrics) for metrics in facts["extra"]["history"]]
        states.append((arrays, facts))
    return lines, states


def assert_same(one, other):
    assert one[0] == other[0]
    for (arrays, facts), (others, other_facts) in zip(one[1], other[1], strict=True):
        assert facts == other_facts and arrays.keys() == others.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, others[name], name)


FREEZE = "[freeze]\nshare = 0.2\nbegin = 0.3\n"


@pytest.mark.parametrize(
    ("scheme", "options", "freeze"), [("block", [], ""), ("filter", ["--specialize"], FREEZE)], ids=["block", "filter"]
)
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path, scheme, options, freeze):
    seed = random.randrange(2**32)
    print("seed", seed)
    moments = random.Random(seed)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("{scheme}", scheme).replace("{freeze}", freeze))

    def start(*arguments):
        return forked.start(tmp_path, "train", *arguments)

    finish(start("--recipe", recipe, "--out", tmp_path / "warm", *options))  # kernels are in the cache from here on
    began = time.perf_counter()
    process = start("--recipe", recipe, "--out", tmp_path / "whole", *options)
    until_begun(process, tmp_path / "whole")
    start_seconds = time.perf_counter() - began
    finish(process)
    seconds, wanted = time.perf_counter() - began, outcome(tmp_path / "whole")
    assert_same(outcome(tmp_path / "warm"), wanted)
    assert wanted[0][-1].get("freeze", {"parts": 0})["parts"] == (2 if freeze else 0)
    assert wanted[1][0][0]["extra/sieve.kept"].sum() < len(wanted[1][0][0]["extra/sieve.kept"])

    kills = torn = runs = 0
    while kills < KILLS:
        folder = tmp_path / f"run{runs}"
        process = start("--recipe", recipe, "--out", folder, *options)
        until_begun(process, folder)
        stale, left = set(), seconds - start_seconds
        while kills < KILLS and lives(process, folder, moments, writing=kills % 2 == 1, seconds=left):
            before = scratch(folder)
            process.kill()
            process.join()
            kills += 1
            torn += bool(scratch(folder) & (before - stale))
            stale = scratch(folder)
            process, left = start("--resume", folder), seconds
        finish(process)
        assert_same(outcome(folder), wanted)
        assert not scratch(folder)  # what killed writers leave goes
        runs += 1
    print(f"{kills} kills, {torn} of them in the middle of writing a checkpoint, {runs} runs")
    assert torn or KILLS < 10


def until_begun(process, folder):
    """What is killed before it has begun has nothing to resume."""
    while not (folder / "checkpoint.safetensors").exists():
        assert process.is_alive(), forked.said(process)
        time.sleep(0.002)


def scratch(folder):
    """Checkpoints that have no name yet."""
    return {path.name for path in folder.glob(".*.safetensors.*")}


def lives(process, folder, moments, writing, seconds):
    """Waits until a random moment, or with `writing` until a random checkpoint is being written; whether the run still
    goes on then."""
    end, writes = time.perf_counter() + moments.uniform(0, 1.1 * seconds), moments.randrange(6)
    stale, seen = scratch(folder), set()
    while process.is_alive():
        if writing:
            seen |= (now := scratch(folder) - stale)
            if now and len(seen) > writes:
                return True
            time.sleep(0.0005)
        elif time.perf_counter() > end:
            return True
        else:
            time.sleep(0.002)
    return False

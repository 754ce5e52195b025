"""The shipped log: its records are of today's problems, and give the choices that they gave before."""

import hashlib
import json
from dataclasses import is_dataclass
from functools import cache
from itertools import groupby
from typing import get_args, get_type_hints

import pytest

from mest_compile.hardware.target import find_target
from mest_compile.operators.batch_norm import BatchNormBackward, BatchNormForward
from mest_compile.operators.layers.gather import GatherConv, GatherGrad
from mest_compile.planning.layout import CutLayer, WholeStep
from mest_compile.records.log import Measure, Records, key_of, plain, shipped
from mest_compile.records.record import read_log

KINDS = {
    "conv": GatherConv,
    "grad": GatherGrad,
    "batch_norm.forward": BatchNormForward,
    "batch_norm.backward": BatchNormBackward,
    "step": WholeStep,
    "sections.forward": CutLayer,
    "sections.grad_input": CutLayer,
}
PATH = shipped(find_target("local"))
EVERY = 32  # problems of which one is asked for with its own records away

# Of the log, of all choices of its problems' own records, and of those that the nearest other problem gives. Where the
# log has changed, look at what it gives now, and note the new ones.
DIGESTS = ("d0a21db65743ea43", "09f8382f668cbc63", "4f85006f3403b5f0")


types_of = cache(get_type_hints)


def made(hint, value):
    """A problem, or a part of one, from what records hold of it; `hint` is its type."""
    inner = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
    if isinstance(value, dict):
        hints = types_of(inner)
        return inner(**{name: made(hints[name], item) for name, item in value.items()})
    return tuple(made(inner, item) for item in value) if isinstance(value, list) else value


def problem_of(record):
    return made(KINDS.get(record.kernel) or KINDS[record.kernel.rpartition(".")[2]], record.problem)


def clock(record):
    return record.cpu, record.target["vector"]


def told(choice):
    return choice.origin, plain(choice.knobs), choice.seconds, choice.default_seconds


def digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.fixture(scope="module")
def records():
    return list(read_log(PATH))


def test_problems_are_todays_and_keep_their_keys(records):
    for record in {record.key: record for record in records}.values():
        problem = problem_of(record)
        assert key_of(record.kernel, problem, record.live) == record.key
        assert set(record.problem) == set(plain(problem))


def test_they_give_the_choices_that_they_gave_before(records):
    exact, nearest = [], []
    for (cpu, vector), group in groupby(sorted(records, key=clock), key=clock):
        known, firsts = Records(find_target("local"), (), cpu), {}
        for record in group:
            known.add(record)
            firsts.setdefault(record.key, record)
        for number, (key, record) in enumerate(sorted(firsts.items())):
            problem = problem_of(record)
            asked, trials = (record.kernel, problem, record.live), known.trials(record.kernel, problem, record.live)
            texts = {json.dumps(plain(one.knobs)): one.text for one in trials.records}
            own = known.best(*asked, lambda knobs, texts=texts: texts.get(json.dumps(plain(knobs))))
            exact.append((cpu, vector, key, told(own)))
            if number % EVERY == 0:
                of_all = known._trials[Measure.MEASURED, cpu]
                hidden = of_all.pop(key)
                nearest.append((cpu, vector, key, told(known.best(*asked, lambda knobs: "another text"))))
                of_all[key] = hidden
    assert {choice[-1][0] for choice in exact} == {"exact"}
    assert {choice[-1][0] for choice in nearest} == {"nearest", "default"}
    found = [digest(PATH.read_bytes()), *(digest(json.dumps(choices).encode()) for choices in (exact, nearest))]
    assert tuple(found) == DIGESTS

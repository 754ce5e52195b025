"""A schedule's knobs as a MetaSchedule design space.

Our candidates are differently generated PrimFuncs, which no trace of schedule primitives gives. So MetaSchedule
schedules a stand-in: a function with one block whose annotations name the knobs' values, each drawn by
`sample_categorical`. Its traces, mutations, database and cost model are MetaSchedule's own; builder and runner read the
knobs off the annotations and make the kernel from them.
"""

from __future__ import annotations

import math
import random
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mest_compile.tuning.task import Task

BLOCK = "knobs"
PARTS = 3  # numbers that the cost model gets of a knob: a tile has three
STAND_IN = """
@T.prim_func(s_tir=True)
def main(a: T.Buffer((1,), "float32")):
    T.func_attr({{"global_symbol": "main", "mest.task": {number}}})
    for i in range(1):
        with T.sblock("knobs"):
            v = T.axis.spatial(1, i)
            a[v] = T.float32(0)
"""


def meta_schedule() -> Any:
    """TVM's module. Its contexts import `tensor_intrin`, tables of intrinsics that none of ours uses, for a minute
    where torch is installed; an empty module in its place spares that.
    """
    name = "tvm.s_tir.tensor_intrin"
    sys.modules.setdefault(name, types.ModuleType(name))
    from tvm.s_tir import meta_schedule as found

    return found


class Space:
    """One task's knobs. number: of the task in its session, which tells the builder whose candidate it has."""

    def __init__(self, task: Task, number: int):
        import tvm
        from tvm.script import tirx

        self.task, self.number, self.knobs = task, number, task.space()
        function = tvm.script.from_source(STAND_IN.format(number=number), extra_vars={"T": tirx})
        self.module = tvm.IRModule({"main": function})

    @property
    def size(self) -> int:
        return math.prod(len(values) for values in self.knobs.values())

    def sample(self, schedule: Any, decisions: Mapping[str, int] | None = None) -> None:
        """Draws every knob, or sets it to the value of that place."""
        block = schedule.get_sblock(BLOCK)
        for name, values in self.knobs.items():
            count = len(values)
            place = schedule.sample_categorical(
                list(range(count)), [1 / count] * count, None if decisions is None else decisions[name]
            )
            schedule.annotate(block, f"mest.{name}", place)

    def places(self, knobs: Mapping[str, Any]) -> dict[str, int] | None:
        """Where each knob's value stands in the space; None when one does not."""
        if not knobs.keys() <= self.knobs.keys():
            return None
        try:
            return {name: values.index(knobs.get(name, values[0])) for name, values in self.knobs.items()}
        except ValueError:
            return None

    def knobs_at(self, places: Mapping[str, int]) -> dict[str, Any]:
        """The knobs that differ from the defaults."""
        return {name: self.knobs[name][place] for name, place in places.items() if place}

    def features(self, places: Mapping[str, int], names: Sequence[str]) -> list[float]:
        """What the cost model knows of a candidate; `names` are the knobs of all tasks of the session."""
        found = [float(self.number), math.log2(self.task.live + 1), float(self.task.calls)]
        for name in names:
            value = self.knobs[name][places[name]] if name in self.knobs else math.nan
            parts = value if isinstance(value, tuple) else (value,)
            numbers = [float(part) if isinstance(part, int | float) else -1.0 for part in parts]
            if any(isinstance(part, str) for part in parts):
                numbers = [float(places[name])]
            found += (numbers + [math.prod(numbers)] + [math.nan] * PARTS)[: PARTS + 1]
        return found


def places_in(module: Any) -> tuple[int, dict[str, int]]:
    """(task's number, {knob: place}) of a scheduled stand-in."""
    from tvm.s_tir import Schedule

    schedule = Schedule(module)
    annotations = schedule.get(schedule.get_sblock(BLOCK)).annotations
    found = {
        str(name).removeprefix("mest."): int(place)
        for name, place in annotations.items()
        if str(name).startswith("mest.")
    }
    return int(module["main"].attrs["mest.task"]), found


def mutator(seed: int) -> Any:
    """A MetaSchedule mutator that draws one knob anew."""
    from tvm.ir.utils import derived_object

    base: Any = meta_schedule().mutator.PyMutator
    rng = random.Random(seed)

    @derived_object
    class DrawOneKnob(base):
        def _initialize_with_tune_context(self, context: Any) -> None:
            pass

        def apply(self, trace: Any, seed: int = -1) -> Any:
            drawn = [instruction for instruction in trace.insts if instruction.kind.name == "SampleCategorical"]
            chosen = rng.choice(drawn)
            return trace.with_decision(chosen, rng.randrange(len(chosen.attrs[0])), remove_postproc=True)

        def clone(self) -> DrawOneKnob:
            return DrawOneKnob()

    return DrawOneKnob()


def feature_extractor(spaces: Sequence[Space]) -> Any:
    """Features of the knobs themselves for MetaSchedule's cost model: the stand-in's loops would tell it nothing."""
    import tvm
    from tvm.ir.utils import derived_object

    base: Any = meta_schedule().feature_extractor.PyFeatureExtractor
    names = sorted({name for space in spaces for name in space.knobs})

    @derived_object
    class KnobFeatures(base):
        def extract_from(self, context: Any, candidates: Sequence[Any]) -> list[Any]:
            found = []
            for candidate in candidates:
                number, places = places_in(candidate.sch.mod)
                found.append(tvm.runtime.tensor(np.array([spaces[number].features(places, names)], np.float32)))
            return found

    return KnobFeatures()

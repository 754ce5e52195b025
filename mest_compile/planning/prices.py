"""What a step costs, told by its kernel calls: by what they took in steps that were timed, or by a count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any

from mest_compile.ir.layouts.layout import ITEM_BYTES
from mest_compile.ir.program import FUNCTIONS, PRODUCTS, Buffer, Call
from mest_compile.operators.layers.family import held_cells, masked_elems
from mest_compile.planning.plan import Plan

# Operations that a core does in the time in which it reads or writes a byte: 16 a cycle at half their rate, as a
# Cortex-A76 starts two multiply-adds of four floats, and a byte a cycle beyond its caches. Ours, and rough: of
# the nets of docs/finetuning.md shares of steps come out near measured ones, but for a 7x7 stem's.
FLOP_A_BYTE = 8


def calls_of(plan: Plan) -> list[Call]:
    """Those that a training step runs."""
    _, stages = FUNCTIONS["train"]
    return [call for call in plan.train.calls if call.stage in stages]


def call_bytes(call: Call, plan: Plan) -> int:
    """Of all its arguments."""
    live = held_cells(plan.layers, {})

    def size(buffer: Buffer) -> int:
        elems = masked_elems(buffer, plan.layers, live, call.layer) if buffer.elems is None else buffer.elems
        return elems * ITEM_BYTES[buffer.dtype]

    return sum(map(size, call.buffers))


Key = tuple[str, Any, str]


def _key(call: Call) -> Key:
    """Kernel, problem, and the first array: equal problems of layers with other masks, or of values that lie elsewhere
    in the caches, take other times."""
    return call.kernel, call.problem, call.buffers[0].name


class Prices(ABC):
    """kind: what costs are, for people: "measured"."""

    kind: str

    def __init__(self) -> None:
        self._known: dict[Key, float] = {}

    def of(self, plan: Plan) -> float:
        """What a training step of the plan costs, in a unit of its own: the sum over its calls."""
        return sum(self.known(call, plan) for call in calls_of(plan))

    def known(self, call: Call, plan: Plan) -> float:
        """The price of a call, asked for once."""
        key = _key(call)
        if key not in self._known:
            self._known[key] = self.price(call, plan)
        return self._known[key]

    @abstractmethod
    def price(self, call: Call, plan: Plan) -> float:
        """What a call of the plan's costs."""


@dataclass(frozen=True, slots=True)
class _Timed:
    kernel: str
    problem: Any
    place: str
    size_bytes: int
    seconds: float


class MeasuredPrices(Prices):
    """Seconds of calls as they took them within whole steps. One that was in none of these is taken for the most alike
    of those that were, in proportion to its bytes: of the same kernel, problem and place before all others."""

    kind = "measured"

    def __init__(self) -> None:
        super().__init__()
        self._timed: dict[Key, _Timed] = {}

    def learn(self, plan: Plan, seconds: Mapping[str, float]) -> None:
        """seconds: {call name: of it}, of a step of the plan. What is known already stays."""
        alike: dict[Key, list[Call]] = {}
        for call in calls_of(plan):
            alike.setdefault(_key(call), []).append(call)
        for key, calls in alike.items():  # what is computed again in the backward pass is a call like the first
            if key not in self._timed:
                mean = sum(seconds[call.name] for call in calls) / len(calls)
                self._timed[key] = _Timed(*key, call_bytes(calls[0], plan), mean)
        self._known = {key: one.seconds for key, one in self._timed.items()}

    def price(self, call: Call, plan: Plan) -> float:
        (kernel, problem, place), size = _key(call), call_bytes(call, plan)

        def unlike(one: _Timed) -> tuple[bool, bool, bool, float]:
            other = one.kernel != kernel, one.problem != problem, one.place != place
            return *other, abs(log(one.size_bytes / size))

        like = min(self._timed.values(), key=unlike)
        return like.seconds * size / like.size_bytes


class CountedPrices(Prices):
    """Bytes that a step's calls read and write; of a layer's phases the operations in their place, where they would
    take longer. Of a device that nobody can ask."""

    kind = "counted"

    def price(self, call: Call, plan: Plan) -> float:
        return max(call_bytes(call, plan), _flop(call, plan) / FLOP_A_BYTE)


def _flop(call: Call, plan: Plan) -> int:
    if call.layer not in plan.layers or call.phase not in PRODUCTS:
        return 0
    layer = plan.layers[call.layer]
    height, width = layer.spec.output_size
    live = layer.scheme.live_cells(layer.spec, layer.sparsity) * layer.scheme.cell_elems(layer.spec)
    return 2 * PRODUCTS[call.phase] * live * height * width * layer.spec.input_shape[0]

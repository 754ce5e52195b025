"""What a step costs on an ARM core that is not there: modelled cycles of its kernel calls, each emulated once."""

from __future__ import annotations

from mest_compile.devices import cycles, emulation
from mest_compile.hardware.target import Target
from mest_compile.ir.program import Call, Program
from mest_compile.kernels.arguments import any_arrays
from mest_compile.kernels.choosing import choose_knobs
from mest_compile.kernels.source import kernel_source
from mest_compile.planning.plan import Plan
from mest_compile.planning.prices import Prices, call_bytes, calls_of
from mest_compile.planning.retargeting import with_batch

SLICES = 4  # what a call does once, or once a weight, then weighs little: 1% of a step of convolutions with 1 for 4


def missing_tools(target: Target) -> list[str]:
    """Programs that this machine lacks for them. Raises TargetError for a target of which there are none."""
    cycles.core_of(target)
    return emulation.missing_tools(emulation.machine_of(target)) + cycles.missing_tools()


class CyclePrices(Prices):
    """Modelled cycles (`cycles`) of every call on a random mask: no caches and no memory are in them.

    Calls are emulated on SLICES vectors of examples at most, and of larger batches what depends on their number is told
    in proportion.
    """

    def __init__(self, target: Target):
        super().__init__()
        self.kind = f"modelled cycles of {cycles.core_of(target)}"
        self._emulated: dict[tuple[str, int], float] = {}

    def of(self, plan: Plan) -> float:
        batch, few = plan.facts.graph.input_shape[0], SLICES * plan.target.vector
        if batch <= few or batch % few:
            return super().of(plan)
        small = with_batch(plan, few)
        pairs = zip(calls_of(plan), calls_of(small), strict=True)
        return sum(
            self.known(less, small) * (1 if less.problem == call.problem else batch / few) for call, less in pairs
        )

    def price(self, call: Call, plan: Plan) -> float:
        """Raises BuildError, DeviceError, NotInstalled."""
        alone = Program("train", [call])
        chosen = choose_knobs([alone], plan.layers, plan.target, plan.records)["train"][call.name]
        source = kernel_source(call.kernel, call.problem, plan.target, **chosen.knobs)
        key = source.key, call_bytes(call, plan)
        if key not in self._emulated:
            execution = emulation.emulate(source, any_arrays(call, plan.layers, plan.train))
            self._emulated[key] = cycles.model(execution, plan.target, 0).cycles
        return self._emulated[key]

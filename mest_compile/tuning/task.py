"""A kernel of a step as it is tuned: its problem, valid arguments, and what they must hold after a run.

Arguments hold whole numbers between -1 and 1, so that float32 sums of products are exact in any order: a right answer
of a convolution is equal bit by bit, and one wrong pixel among 65,536 is seen. Kernels that divide are compared within
rounding instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.errors import StateError
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target, find_target
from mest_compile.ir.layouts.layout import BITS, rounded, to_float
from mest_compile.ir.program import Call, Program
from mest_compile.kernels.arguments import _argument
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.choosing import live_of
from mest_compile.kernels.source import KernelSource, kernel_source, knob_space
from mest_compile.operators.layers.depthwise import (
    DepthwiseForward,
    DepthwiseGradInput,
    DepthwiseGradWeight,
    depthwise_forward_reference,
    depthwise_grad_input_reference,
    depthwise_grad_weight_reference,
)
from mest_compile.operators.layers.gather import GatherConv, GatherGrad, gather_conv_reference, gather_grad_reference
from mest_compile.operators.layers.index import LayerIndex
from mest_compile.operators.layers.pattern_groups import GroupedConv, GroupedGrad, single_taps
from mest_compile.records.log import text_digest
from mest_compile.sparsity.layer import Layer

EXACT = frozenset({"conv", "grad", "depthwise"})  # words in names of kernels that only add up products
ROUNDINGS = 64  # float32 roundings that two right answers of other kernels may differ by, at the largest value


@dataclass(frozen=True, slots=True)
class Task:
    """One kernel problem with the layers' real sparsity.

    name    of the first call that needs it
    calls   of the training step that do
    live    live cells of their layers
    target  the device it is tuned for
    arrays  file of its arguments, written by `prepare`
    """

    name: str
    kernel: str
    problem: Any
    live: int
    calls: int
    target: Target
    arrays: Path

    def space(self) -> dict[str, tuple]:
        """{knob: values, the default first}, knobs with a choice only."""
        return {
            name: tuple(values)
            for name, values in knob_space(self.kernel, self.problem, self.target).items()
            if len(values) > 1
        }

    def source(self, knobs: Mapping[str, Any]) -> KernelSource:
        return kernel_source(self.kernel, self.problem, self.target, **knobs)

    def load(self) -> Arrays:
        return Arrays.load(self.arrays)

    def arguments(self) -> list[np.ndarray]:
        """Fresh arguments of a call, in order, flat."""
        return self.load().arguments

    def check(self, after: Sequence[np.ndarray]) -> str | None:
        """What is wrong with the arguments as they are after a run; None when they are right."""
        return self.load().check(after)


@dataclass(frozen=True, slots=True)
class Arrays:
    """arguments  of a call, before it
    wanted     place of each argument that it changes -> what it holds afterwards
    allowed    the largest difference, 0 where the answer is exact
    warm       places of those that the call before has just written or read
    """

    arguments: list[np.ndarray]
    wanted: dict[int, np.ndarray]
    allowed: float
    warm: tuple[int, ...]

    def save(self, path: Path) -> None:
        named = {f"argument{place}": array for place, array in enumerate(self.arguments)}
        named |= {f"wanted{place}": array for place, array in self.wanted.items()}
        np.savez(path, **{"allowed": np.array(self.allowed), "warm": np.array(self.warm, np.int64), **named})  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Arrays:
        with np.load(path, allow_pickle=False) as found:
            arguments = [
                found[f"argument{place}"] for place in range(sum(name.startswith("argument") for name in found.files))
            ]
            wanted = {
                int(name.removeprefix("wanted")): found[name] for name in found.files if name.startswith("wanted")
            }
            return cls(arguments, wanted, float(found["allowed"]), tuple(found["warm"].tolist()))

    def check(self, after: Sequence[np.ndarray]) -> str | None:
        """As Task.check."""
        for place, array in enumerate(after):
            array, wanted = map(to_float, (array, self.wanted.get(place, self.arguments[place])))
            wrong = ~(
                np.abs(array - wanted) <= self.allowed * max(float(np.abs(wanted).max(initial=0)), 1e-30)
            )  # not true of NaN
            if wrong.any():
                first = int(np.argmax(wrong))
                return (
                    f"argument {place}: {wrong.sum()} of {wrong.size} elements, the first at {first}: {array[first]}, "
                    f"not {wanted[first]}"
                )
        return None


def tasks_of(program: Program, layers: Mapping[str, Layer], target: Target, folder: Path) -> list[Task]:
    """Every distinct problem of the step whose schedule has knobs; `prepare` makes their arrays."""
    found: dict[tuple[str, Any, int], Task] = {}
    for call in program.calls:
        kind = (call.kernel, call.problem, live_of(call, layers))
        if kind in found:
            found[kind] = replace(found[kind], calls=found[kind].calls + 1)
        else:
            path = folder / f"{call.kernel}-{text_digest(repr((kind, target)))}.npz"
            found[kind] = Task(call.name, *kind, 1, target, path)
    return [task for task in found.values() if task.space()]


def prepare(task: Task, program: Program, layers: Mapping[str, Layer], builder: Builder, seed: int = 0) -> None:
    """Writes the task's arrays. The wanted answer is that of the default kernel on this machine, which is itself
    compared with the float64 reference where there is one. Raises StateError when they differ.
    """
    rng = np.random.default_rng([seed, int(text_digest(repr(task.problem)), 16)])
    number = next(number for number, call in enumerate(program.calls) if call.name == task.name)
    call = program.calls[number]
    indices: dict[str, LayerIndex] = {}
    exact = not EXACT.isdisjoint(task.kernel.split("."))
    arguments = [_argument(call, buffer, program, layers, indices, exact, rng) for buffer in call.buffers]
    after = _default_answer(task, arguments, builder)
    wanted = {place: array for place, array in enumerate(after) if not np.array_equal(array, arguments[place])}
    _check_default(task, arguments, after)
    allowed = 0.0 if exact else ROUNDINGS * float(np.finfo(np.float32).eps)
    made = Arrays(arguments, wanted, allowed, tuple(_warm(program.calls, number)))
    task.arrays.parent.mkdir(parents=True, exist_ok=True)
    made.save(task.arrays)


def _warm(calls: Sequence[Call], number: int) -> Iterable[int]:
    """Arguments of call `number` that the last call before it that touched an image had as well."""
    before = next((call for call in reversed(calls[:number]) if any(buffer.image for buffer in call.buffers)), None)
    return [
        place
        for place, buffer in enumerate(calls[number].buffers)
        if before and buffer.image and buffer in before.buffers
    ]


def _default_answer(task: Task, arguments: Sequence[np.ndarray], builder: Builder) -> list[np.ndarray]:
    """All arguments after a run of the default kernel for this machine, whatever device the task is for."""
    import tvm

    host = replace(find_target("local"), vector=task.target.vector)
    if not backend_of(host).has(task.kernel):  # what only OpenCL devices have is computed on this machine's
        from mest_compile.backends.opencl.runner import answer_here

        return answer_here(
            task.kernel, task.problem, builder.function(task.source({})), list(arguments), task.target.limits.name
        )
    tensors = [tvm.runtime.tensor(array) for array in arguments]
    builder.function(kernel_source(task.kernel, task.problem, host))(*tensors)
    return [tensor.numpy() for tensor in tensors]


def _check_default(task: Task, arguments: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> None:
    """Compares an answer with the float64 reference, for kernels whose rows are not listed."""
    problem, arguments = task.problem, [to_float(array) for array in arguments]
    if isinstance(problem, GroupedConv | GroupedGrad):
        arguments = [*single_taps(problem, *arguments[:2]), *arguments[2:]]
        problem = problem.gather
    if (reference := _reference(problem, arguments)) is None:
        return
    place, wanted = reference
    got, wanted = to_float(after[place]), wanted.ravel()
    if image := getattr(problem, "result", None):
        got = image.view(got).ravel()
    if after[place].dtype == BITS:
        wanted = rounded(wanted, "bfloat16")
    if not np.array_equal(got, wanted):
        raise StateError(
            f"the default kernel of {task.kernel} for {task.name} differs from its reference at "
            f"{np.count_nonzero(got != wanted)} of {wanted.size} elements; nothing can be tuned against it"
        )


def _reference(problem: Any, arguments: Sequence[np.ndarray]) -> tuple[int, np.ndarray] | None:
    """(place of the argument that a kernel's results are in, what they are in float64), of a convolution's kernel."""
    match problem:
        case DepthwiseForward():
            at, others = _others(problem, arguments, 1)
            return at + 1, depthwise_forward_reference(problem, arguments[0], *arguments[at : at + 2], *others)
        case DepthwiseGradInput():
            return 2, depthwise_grad_input_reference(problem, *arguments)
        case DepthwiseGradWeight():
            return 0, depthwise_grad_weight_reference(problem, *arguments[1:])
        case GatherConv(rows_live=0):
            at, others = _others(problem, arguments, 4 if problem.sources_live else 3)
            return at + 1, gather_conv_reference(problem, *arguments[:3], *arguments[at : at + 2], *others)
        case GatherGrad(rows_live=0):
            at = 3 if problem.sources_live else 2
            return at + 2, gather_grad_reference(problem, *arguments[:2], *arguments[at : at + 3])
    return None


def _others(
    problem: DepthwiseForward | GatherConv, arguments: Sequence[np.ndarray], first: int
) -> tuple[int, list[np.ndarray | None]]:
    """(place of the source, [bias or None, what an epilogue takes]); first: place of the first of these."""
    ends = problem.epilogue
    count = (2 if ends.residual else 1) if ends else 0
    begin = first + problem.bias
    return begin + count, [arguments[first] if problem.bias else None, *arguments[begin : begin + count]]

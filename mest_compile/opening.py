"""Steps out of files: checkpoints and artifacts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mest_compile import __version__
from mest_compile.base import checks, exclusive
from mest_compile.base.errors import StateError, UsageError
from mest_compile.hardware.host import cores
from mest_compile.hardware.target import Target, find_target
from mest_compile.ir.program import functions_of
from mest_compile.options import check_threads
from mest_compile.planning.facts import Facts, read_facts
from mest_compile.planning.freezing import stages
from mest_compile.runtime import checkpoint
from mest_compile.runtime.artifact import LIBRARY, STATE, _check_host, _read, _signatures
from mest_compile.runtime.library import LibraryRunner, _load, find_runtime
from mest_compile.runtime.trained import no_dense_step, zeros

if TYPE_CHECKING:
    from mest_compile.devices.session import Device
    from mest_compile.kernels.cache import Builder
    from mest_compile.runtime.compiled import Compiled, Knobs
    from mest_compile.runtime.step import TrainStep


def load(
    path: str | Path,
    threads: int | None = None,
    builder: Builder | None = None,
    device: Device | None = None,
    target: str | Path | Target | None = None,
    batch: int | None = None,
) -> TrainStep:
    """The step that `step.save` wrote, with all its state and on the kernels that it had: tuning since then changes
    nothing, so that a run that goes on gives the same numbers.

    device  as in `compile`
    target, batch  to go on with weights, masks, states and statistics on another device, or with so many examples a
            step; kernels and threads are then chosen as `compile` does. None: as it was saved
    Raises StateError, BuildError, DeviceError, UsageError, TargetError.
    """
    from mest_compile.assembling import make_step
    from mest_compile.compiling import check_objects, of_machine
    from mest_compile.planning.plan import Plan
    from mest_compile.planning.retargeting import retargeted
    from mest_compile.records.log import Records

    exclusive.this_process()
    check_objects(builder, device, None)
    arrays, document = checkpoint.read(path)
    facts = read_facts(document, f"checkpoint {path}")
    plan, knobs = Plan(facts, Records(facts.target)), document.get("knobs", {})
    if target is not None or batch is not None:
        plan = retargeted(
            facts,
            facts.target if target is None else find_target(target),
            facts.batch if batch is None else batch,
            lambda target: of_machine(Records.of(target), device),
        )
        knobs = None
        document = {name: value for name, value in document.items() if name != "coming"}  # of other kernels
        document |= {part: plan.facts.to_json()[part] for part in ("graph", "layers")}
    if threads is not None:
        plan = replace(plan, facts=replace(plan.facts, threads=check_threads(threads)))
    step = make_step(plan, zeros(plan.facts), builder, device, knobs)
    step._restore(arrays, document, path)
    return step


def open_artifact(
    path: str | os.PathLike, threads: int | None = None, runtime: str | os.PathLike | None = None
) -> TrainStep:
    """The step of an artifact, to train here: no compiler, no torch, no tvm package.

    threads  None: as many as it was built for, at most the cores there are
    runtime  TVM's libtvm_runtime.so; None: in the artifact's folder, in an installed tvm package, or where the system
             looks
    Raises StateError when files are damaged, TargetError when this machine lacks what the kernels use, NotInstalled.
    """
    from mest_compile.runtime.compiled import Compiled
    from mest_compile.runtime.step import TrainStep

    exclusive.this_process()
    path = Path(path)
    manifest, files = _read(path)
    facts = read_facts(manifest["facts"], f"artifact {path}")
    _check_host(path, files[LIBRARY], facts, manifest["features"])
    steps = _steps(facts, manifest)
    if [manifest["functions"], *manifest.get("coming", [])] != [_signatures(*one.lower()) for one in steps]:
        raise StateError(
            f"artifact {path} was built by mest-compile {manifest['versions']['mest-compile']}, whose steps have "
            "other arrays "
            f"than those of {__version__}, which is installed here; use the same version on both sides"
        )
    wanted = (
        facts.threads
        if threads is None
        else checks.whole("threads", threads, 1, ", or None for as many as it was built for")
    )
    module = _load(path, files[LIBRARY], find_runtime(path, runtime))
    again = _Becomes(path)

    def compiled(number: int, facts: Facts) -> Compiled:
        train, predict = facts.lower()
        runner = partial(LibraryRunner, module, functions_of(train, predict), min(wanted, cores()), number)
        told = {"trainable": facts.graph.trainable(), "frozen": dict(facts.graph.frozen)}
        document = {**manifest["facts"], **facts.to_json(), "describe": {**manifest["facts"]["describe"], **told}}
        return Compiled(facts, train, predict, document, runner, no_dense_step, again=again if len(steps) > 1 else None)

    again.steps = [compiled(number, facts) for number, facts in enumerate(steps)]
    step = TrainStep(again.steps[0], zeros(facts))
    step._restore(*checkpoint.unpack(files[STATE], path / STATE), path / STATE)
    return step


def _steps(facts: Facts, manifest: Mapping[str, Any]) -> list[Facts]:
    """Of the steps in an artifact: the one that it was built of, and those that this becomes as it freezes."""
    count = len(manifest.get("coming", []))
    return [facts, *stages(facts, facts.parts)[1:][-count:]] if count else [facts]


class _Becomes:
    """What an artifact's step becomes as it freezes (`runtime.compiled.Recompiles`): all of it is there."""

    steps: Sequence[Compiled]

    def __init__(self, path: Path):
        self._path = path

    def knobs(self, facts: Facts) -> Knobs:
        self.compiled(facts, {})
        return {}

    def ahead(self, coming: Sequence[tuple[Facts, Knobs]]) -> None:
        pass

    def compiled(self, facts: Facts, knobs: Knobs) -> Compiled:
        """Raises UsageError where there is no such step."""
        if found := next((one for one in self.steps if one.facts == facts), None):
            return found
        raise UsageError(
            f"artifact {self._path} was built to freeze other parts, or in another order; train by the recipe that it "
            "was built by, or build another one"
        )

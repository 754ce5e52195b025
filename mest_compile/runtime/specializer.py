"""Keeps a step on its fastest kernels: plans by measured times, has them compiled in the background, exchanges them
between two steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import UsageError
from mest_compile.ir.program import Call, Program
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import KernelSource
from mest_compile.kernels.specializing import Structure, specialized, structure_of
from mest_compile.kernels.workers import Workers
from mest_compile.operators.layers.gather import GatherConv, GatherGrad
from mest_compile.runtime.compiled import Compiled
from mest_compile.runtime.runner import Exchanges, Runner
from mest_compile.runtime.variants import Choice, Times, Variant, choose

log = logging.getLogger(__name__)
REPEATS = 9  # timings of each kernel, in turns; their median counts


@dataclass(frozen=True, slots=True)
class Place:
    """A kernel call of a layer, by whose name its kernel is exchanged."""

    call: Call
    indexed: KernelSource

    @property
    def name(self) -> str:
        return self.call.name

    @property
    def key(self) -> str:
        """Of the indexed kernel."""
        return self.indexed.key


@dataclass(frozen=True, slots=True)
class Planned:
    """One call of the plan. source: the specialized kernel; None where there is nothing to bake."""

    layer: str
    phase: str
    choice: Choice
    source: KernelSource | None = None
    times: Times | None = None


@dataclass(slots=True)
class LayerTimes:
    """Of one layer since the last report. seconds: compiling in workers; exchange_seconds: in the training thread."""

    recompiled: int = 0
    compile_seconds: float = 0.0
    exchange_seconds: float = 0.0


@dataclass(slots=True)
class _State:
    """running: call -> key of the specialized kernel that runs; wanted: the one that is to."""

    running: dict[str, str] = field(default_factory=dict)
    wanted: dict[str, KernelSource] = field(default_factory=dict)

    @property
    def missing(self) -> dict[str, KernelSource]:
        return {call: source for call, source in self.wanted.items() if call not in self.running}


class Specializer:
    """The specialized kernels of one step. Evaluation stays on the indexed ones: a plan counts steps.

    program   for training
    sources   (program, call) -> what its kernel was compiled from
    exchange  puts kernels of the program in place: {call: callable}
    get       a copy of a held buffer's array
    steps     between two mutations, None without
    passes    of a step, in each of which a kernel runs
    """

    def __init__(
        self,
        program: Program,
        layers: Iterable[str],
        sources: Mapping[tuple[str, str], KernelSource],
        exchange: Callable[[Mapping[str, Any]], None],
        get: Callable[[str], np.ndarray],
        builder: Builder,
        steps: int | None,
        threads: int,
        workers: Workers | None = None,
        passes: int = 1,
    ):
        names = set(layers)
        self._places: dict[str, list[Place]] = {name: [] for name in names}
        for call in program.calls:
            if call.layer in names and isinstance(call.problem, GatherConv | GatherGrad):
                self._places[call.layer].append(Place(call, sources[program.name, call.name]))
        self._exchange, self._get, self._builder = exchange, get, builder
        self._steps, self._threads, self._passes = steps, threads, passes
        self.workers = workers or Workers(builder.folder)
        self._states = {name: _State() for name in names}
        self._baked: dict[str, dict[Structure, KernelSource]] = {}
        self._failed: set[str] = set()  # keys of specialized kernels that are not asked for again
        self._damaged: set[str] = set()  # keys of those whose cache entry was
        self._gains: dict[str, Times] = {}  # key of an indexed kernel -> what was measured of it
        self._compile_seconds: dict[str, float] = {}  # key of a specialized kernel -> what it took a worker
        self.history: dict[str, LayerTimes] = {}

    @classmethod
    def of(
        cls,
        compiled: Compiled,
        runner: Runner,
        get: Callable[[str], np.ndarray],
        steps: int | None,
        workers: Workers | None = None,
    ) -> Specializer:
        """That of a compiled step. Raises UsageError where its kernels cannot be exchanged."""
        steps = (
            None
            if steps is None
            else checks.whole("steps", steps, 1, " between two mutations, or None for no mutations")
        )
        if not isinstance(runner, Exchanges) or compiled.builder is None:
            raise UsageError(
                "specialized kernels are for steps that run in this process on the processor; leave specialize out"
            )
        return cls(
            compiled.train,
            compiled.layers,
            compiled.sources,
            runner.exchange,
            get,
            compiled.builder,
            steps,
            compiled.facts.threads,
            workers,
            compiled.facts.passes,
        )

    def successor(self, compiled: Compiled, runner: Runner, get: Callable[[str], np.ndarray]) -> Specializer:
        """That of the same step, compiled otherwise, with what was measured so far. What it wants is put in place as it
        is compiled."""
        found = Specializer.of(compiled, runner, get, self._steps, self.workers)
        found._gains, found._failed, found._damaged = self._gains, self._failed, self._damaged
        found._compile_seconds, found.history = self._compile_seconds, self.history
        for name in found._places:
            found.changed(name)
        return found

    @property
    def _runs(self) -> int | None:
        """Of a kernel between two mutations."""
        return None if self._steps is None else self._steps * self._passes

    def plan(self) -> list[Planned]:
        """Every call's variant under the present masks. What was not measured before is compiled and timed first."""
        found = {name: [self._source(name, place) for place in self._places[name]] for name in self._places}
        unknown: dict[str, tuple[Place, KernelSource]] = {}
        for name in found:
            for place, source in zip(self._places[name], found[name]):
                if isinstance(source, KernelSource) and place.key not in self._gains and source.key not in self._failed:
                    unknown[source.key] = place, source
        missing = [source for _, source in unknown.values() if not self._builder.has(source)]
        built = {built.key: built for built in self.workers.wait(missing)} if missing else {}
        for key, (place, source) in unknown.items():
            if key in built and built[key].problem:
                self._failed.add(key)
                log.warning("%s stays on its indexed kernel: %s", place.name, built[key].problem)
            elif place.key not in self._gains:
                self._gains[place.key] = self._measure(place, source, built[key].seconds if key in built else 0.0)
        planned = []
        for name in found:
            for place, source in zip(self._places[name], found[name]):
                if isinstance(source, str):
                    planned.append(Planned(name, place.call.phase, Choice("indexed", source)))
                elif place.key not in self._gains or source.key in self._failed:
                    why = "its specialized kernel does not compile"
                    planned.append(Planned(name, place.call.phase, Choice("indexed", why)))
                else:
                    times = self._gains[place.key]
                    planned.append(Planned(name, place.call.phase, choose(times, self._runs), source, times=times))
        return planned

    def candidates(self, layers: Iterable[str]) -> list[KernelSource]:
        """Every specialized kernel of these layers under the present masks, whatever it gains."""
        found = (self._source(name, place) for name in layers for place in self._places[name])
        return list({source.key: source for source in found if isinstance(source, KernelSource)}.values())

    def begin(self) -> None:
        """Plans, and exchanges what is chosen at once: before the first step there is nothing to wait beside."""
        self.plan()
        for name in self._places:
            self._want(name)
        missing = [
            source
            for state in self._states.values()
            for source in state.wanted.values()
            if not self._builder.has(source)
        ]
        if missing:
            self.workers.wait(missing)
        self.poll()

    def changed(self, name: str) -> bool:
        """Called when a layer's index has changed. Kernels whose structure is no longer the layer's make room for the
        indexed ones at once. Whether others take their place, now or when they are compiled.
        """
        state, before = self._states[name], dict(self._states[name].running)
        self._want(name)
        kept = {call: key for call, key in before.items() if call in state.wanted and state.wanted[call].key == key}
        stale = before.keys() - kept.keys()
        if stale:
            start = time.perf_counter()
            indexed = {
                place.name: self._builder.function(place.indexed) for place in self._places[name] if place.name in stale
            }
            self._exchange(indexed)
            self._note(name).exchange_seconds += time.perf_counter() - start
            state.running = kept
        self.workers.ask(source for source in state.missing.values() if not self._builder.has(source))
        return bool(state.missing)

    def poll(self) -> list[str]:
        """Puts in place what has been compiled since; the layers it did so for. Cheap when there is nothing."""
        for built in self.workers.done():
            self._compile_seconds[built.key] = built.seconds
            if built.problem:
                self._failed.add(built.key)
            for name, state in self._states.items():
                of_layer = [call for call, source in state.wanted.items() if source.key == built.key]
                if of_layer and built.problem:
                    log.warning("%s stays on its indexed kernels: %s", name, built.problem)
                    for call in of_layer:
                        del state.wanted[call]
                elif of_layer:
                    self._note(name).compile_seconds += built.seconds
        exchanged = []
        for name, state in self._states.items():
            missing = state.missing
            if not missing or not all(self._builder.has(source) for source in missing.values()):
                continue
            if self._measure_new(name):
                self._want(name)
                if not (missing := state.missing):
                    continue
            start = time.perf_counter()
            found = {call: self._builder.find(source) for call, source in missing.items()}
            if damaged := [missing[call] for call, kernel in found.items() if kernel is None]:
                self._compile_again(name, damaged)
                continue
            # Said first: a kernel that runs and is not said to would stay when the structure changes.
            state.running |= {call: source.key for call, source in missing.items()}
            self._exchange(found)
            note = self._note(name)
            note.exchange_seconds += time.perf_counter() - start
            note.recompiled += len({source.key for source in missing.values()})
            exchanged.append(name)
        return exchanged

    def _compile_again(self, name: str, damaged: list[KernelSource]) -> None:
        """A cache entry that is not what it was is no work for the training thread. What is damaged a second time stays
        indexed."""
        hopeless = {source.key for source in damaged} & self._damaged
        if hopeless:
            log.warning("%s stays on its indexed kernels: they are damaged in the cache time and again", name)
            self._failed |= hopeless
            wanted = self._states[name].wanted
            self._states[name].wanted = {call: source for call, source in wanted.items() if source.key not in hopeless}
        self._damaged |= {source.key for source in damaged}
        self.workers.ask(source for source in damaged if source.key not in hopeless)

    def waiting(self) -> bool:
        """Whether any layer waits for a kernel."""
        return any(state.missing for state in self._states.values())

    def report(self) -> dict[str, LayerTimes]:
        """{layer: times} since the last report, of layers that were compiled or exchanged."""
        found, self.history = self.history, {}
        return found

    def running(self, name: str) -> Variant:
        return "specialized" if self._states[name].running else "indexed"

    def _note(self, name: str) -> LayerTimes:
        return self.history.setdefault(name, LayerTimes())

    def _want(self, name: str) -> None:
        """What the layer is to run on: of measured calls what was chosen, of others the specialized kernel, to measure
        it."""
        state = self._states[name]
        state.wanted = {}
        for place in self._places[name]:
            source = self._source(name, place)
            if isinstance(source, str) or source.key in self._failed:
                continue
            if place.key not in self._gains or choose(self._gains[place.key], self._runs).variant == "specialized":
                state.wanted[place.name] = source

    def _measure_new(self, name: str) -> bool:
        """Measures what the layer wants and nobody had compiled when all was planned; whether there was any."""
        wanted, found = self._states[name].wanted, False
        for place in self._places[name]:
            source = wanted.get(place.name)
            if source is not None and place.key not in self._gains and self._builder.find(source) is not None:
                self._gains[place.key] = self._measure(place, source, self._compile_seconds.get(source.key, 0.0))
                found = True
        return found

    def _source(self, name: str, place: Place) -> KernelSource | str:
        """The specialized kernel of a call under the layer's present mask, or why there is none."""
        problem, pointers = place.call.problem, place.call.buffers[0].name
        prefix = place.call.buffers[0].role.removesuffix("pointers")
        live = int(self._get(f"{name}:{prefix}live_groups")[0]) if problem.rows_live else None
        structure = structure_of(problem, self._get(pointers), live)
        if isinstance(structure, str):
            return structure
        known = self._baked.setdefault(place.name, {})
        if structure not in known:
            known[structure] = specialized(place.indexed, problem, structure)
        return known[structure]

    def _measure(self, place: Place, source: KernelSource, compile_seconds: float) -> Times:
        """Both kernels in turns on the layer's own index; what they write is thrown away."""
        import tvm

        tvm.get_global_func("runtime.config_threadpool")(1, self._threads)
        rng = np.random.default_rng(0)
        arguments = [
            tvm.runtime.tensor(
                self._get(buffer.name)
                if buffer.held
                else rng.standard_normal(buffer.elems, np.float32).astype(buffer.dtype)
            )
            for buffer in place.call.buffers
        ]
        kernels = self._builder.function(place.indexed), self._builder.function(source)
        seconds: tuple[list[float], list[float]] = [], []
        for turn in range(REPEATS + 1):
            for kernel, times in zip(kernels, seconds):
                start = time.perf_counter()
                kernel(*arguments)
                if turn:
                    times.append(time.perf_counter() - start)
        return Times(float(np.median(seconds[0])), float(np.median(seconds[1])), compile_seconds)

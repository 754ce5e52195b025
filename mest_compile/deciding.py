"""What `activations="auto"` is: on this machine's processor the type, and with float32 and float16 the vector width,
whose steps are the fastest, as they were timed once; elsewhere what a target's features tell."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.assembling import make_step
from mest_compile.frontend import import_model
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.cpu import host_model
from mest_compile.hardware.folders import Kept, cache_folder, digest
from mest_compile.hardware.target import Target, find_target, is_foreign
from mest_compile.kernels.cache import Builder
from mest_compile.models.catalog import BuiltIn
from mest_compile.options import AUTO, StepOptions
from mest_compile.planning.layout import widened
from mest_compile.planning.plan import plan_step
from mest_compile.records.log import Records

if TYPE_CHECKING:
    from mest_compile.devices.session import Device

log = logging.getLogger(__name__)

# A net with the stages of the wide ResNet-32, whose kernels wait for arithmetic and for memory as those of larger ones.
MODEL, SHAPE, WIDTH, SPARSITY = "resnet8", (3, 32, 32), 32, 0.9
MOST_EXAMPLES = 64  # of larger batches every slice is full, too
ROUNDS = 7
LEAST_GAIN = 1.05  # over float32 in the target's own vectors: what is not faster by that is not worth its digits


@dataclass(frozen=True, slots=True)
class Way:
    """How a step stores its activations, and how many floats its vectors have; with bfloat16 the target's own."""

    activations: str
    vector: int

    def __str__(self) -> str:
        return self.activations if self.activations == "bfloat16" else f"{self.activations} in vectors of {self.vector}"


@dataclass(frozen=True, slots=True)
class Timed:
    """Medians of processor seconds of a step of each way, and their ratios to the first, the usual one; the way that
    was chosen."""

    cpu: str
    versions: Sequence[str]
    target: str
    examples: int
    seconds: Mapping[str, float]
    gains: Mapping[str, float]
    chosen: Way

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Timed:
        return cls(**{**document, "chosen": Way(**document["chosen"])})


def decided(
    options: StepOptions, examples: int, device: Device | None = None, builder: Builder | None = None
) -> StepOptions:
    """The options with "auto" replaced by what it is for steps of so many examples; the same where nothing is "auto".

    device  where it will run; None: this machine
    """
    if options.activations != AUTO:
        return options
    target = find_target(options.target)
    if device is not None or not backend_of(target).processor or is_foreign(target):
        kind = "bfloat16" if target.bfloat16 else "float32"
        log.info(
            "activations are %s, as target %r tells: what is fastest was not timed, it runs elsewhere",
            kind,
            target.name,
        )
        return replace(options, activations=kind)
    way = fastest(target, min(examples, MOST_EXAMPLES), builder).chosen
    wide = widened(target, way.vector)
    return replace(options, activations=way.activations, target=options.target if wide == target else wide)


def fastest(target: Target, examples: int, builder: Builder | None = None) -> Timed:
    """What was timed on this machine for steps of so many examples, or what is timed now."""

    def make() -> bytes:
        return json.dumps(asdict(_time(target, examples, builder))).encode()

    facts = [host_model(), _versions(), target.tvm_fields, target.vector, examples, [str(way) for way in ways(target)]]
    return Timed.from_json(json.loads(_kept().made(digest(json.dumps(facts).encode()), make)))


def known() -> list[Timed]:
    """All that was timed on machines like this one, by these versions, and is kept."""
    documents, here = map(json.loads, _kept().contents()), (host_model(), _versions())
    found = [Timed.from_json(one) for one in documents if (one.get("cpu"), one.get("versions")) == here]
    return sorted(found, key=lambda one: (one.target, one.examples))


def ways(target: Target) -> Iterator[Way]:
    """Those to choose from, the usual one first."""
    yield Way("float32", target.vector)
    yield from (Way("float32", vector) for vector in target.vectors if vector != target.vector)
    if target.float16:
        yield Way("float16", target.vector)
    yield Way("bfloat16", target.vector)


def choose(seconds: Mapping[Way, Sequence[float]]) -> tuple[Way, dict[Way, float]]:
    """The fastest way, and the median of each way's gains over the first, round by round."""
    first = next(iter(seconds))
    gains = {
        way: statistics.median(usual / mine for usual, mine in zip(seconds[first], each, strict=True))
        for way, each in seconds.items()
    }
    best = max(gains, key=gains.__getitem__)
    return (best if gains[best] >= LEAST_GAIN else first), gains


def _time(target: Target, examples: int, builder: Builder | None) -> Timed:
    log.info("timing how steps of %d examples are the fastest on this machine; what is found is kept", examples)
    shape = (examples, *SHAPE)
    graph, state = import_model(BuiltIn(MODEL, shape, width=WIDTH), shape)
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal(shape, np.float32), rng.integers(0, 10, examples)

    def step_of(way: Way) -> Callable[[], Any]:
        options = StepOptions(
            sparsity=SPARSITY, activations=way.activations, target=widened(target, way.vector), threads=1
        )
        step = make_step(plan_step(graph, options, Records.of), state, builder, None)
        return lambda: step(images, labels, lr=0.0)

    seconds = in_turns({way: step_of(way) for way in ways(target)})
    chosen, gains = choose(seconds)
    log.info("the fastest are steps in %s: %.2f times as fast as in %s", chosen, gains[chosen], next(iter(gains)))
    medians = {str(way): statistics.median(each) for way, each in seconds.items()}
    told = {str(way): gain for way, gain in gains.items()}
    return Timed(host_model(), _versions(), target.name, examples, medians, told, chosen)


def in_turns(steps: Mapping[Way, Callable[[], Any]]) -> dict[Way, list[float]]:
    """Processor seconds of each, in rounds after two that warm up."""
    found: dict[Way, list[float]] = {way: [] for way in steps}
    for _ in range(ROUNDS + 2):
        for way, step in steps.items():
            begun = time.process_time()
            step()
            found[way].append(time.process_time() - begun)
    return {way: each[2:] for way, each in found.items()}


def _versions() -> list[str]:
    return [metadata.version(name) for name in ("mest-compile", "apache-tvm")]


def _kept() -> Kept:
    return Kept(cache_folder() / "timed", 2**20)

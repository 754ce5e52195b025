"""What a training step asks of an OpenCL device, and what its roofline allows.

`python benchmarks/roofline.py` writes the tables of docs/opencl.md. Nothing is run or compiled:
operations and bytes follow from the plan of the step, peaks from the device's file in targets/.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import documents

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically
from mest_compile.frontend import import_model
from mest_compile.hardware.target import Target, find_target
from mest_compile.ir.program import ITEM_BYTES, Call
from mest_compile.models.catalog import build_model
from mest_compile.operators.batch_norm import BatchNormMoments
from mest_compile.operators.layers.family import masked_elems
from mest_compile.options import StepOptions
from mest_compile.planning.plan import plan_step
from mest_compile.sparsity import parse_scheme
from mest_compile.sparsity.layer import Layer

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "opencl.md"
embed = partial(documents.embed, what="roofline")
MODEL, WIDTH, SHAPE, SCHEME, SPARSITY = "resnet32", 32, (64, 3, 32, 32), "block:4x1", 0.9
TARGETS = ("mali-g78", "mali-g710", "adreno-650", "adreno-740")


@dataclass(slots=True)
class Row:
    """All calls of one kernel in one phase.

    flop   2 * live weights * output pixels * batch for convolutions; 0 for kernels that only pass over memory
    moved_bytes  each buffer of each call once: what has to cross the bus even if every cache were perfect
    """

    calls: int = 0
    flop: int = 0
    moved_bytes: int = 0

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flop / self.moved_bytes

    def seconds(self, target: Target) -> tuple[float, str]:
        """The least time on the device, and which of its two limits makes it."""
        computing = self.flop / (target.limits.gflops * 1e9)
        moving = self.moved_bytes / (target.limits.gigabytes_per_second * 1e9)
        return max((computing, "operations"), (moving, "bytes"))


def rows(target: Target) -> dict[tuple[str, str], Row]:
    """{(kernel, phase): Row} of a training step."""
    graph, _ = import_model(build_model(MODEL, SHAPE, 10, WIDTH), SHAPE)
    plan = plan_step(graph, StepOptions(parse_scheme(SCHEME), SPARSITY, target=target))
    layers = plan.layers
    live = {name: layer.scheme.live_cells(layer.spec, layer.sparsity) for name, layer in layers.items()}
    found: dict[tuple[str, str], Row] = defaultdict(Row)
    for call in plan.train.calls:
        if call.stage == "clip":  # of steps with a bound on the gradients
            continue
        row = found[call.kernel, call.stage if call.phase in ("", "grad_bias") else call.phase]
        row.calls += 1
        row.flop += _flop(call, layers, live)
        row.moved_bytes += _moved_bytes(call, layers, live)
    return dict(found)


def _flop(call: Call, layers: Mapping[str, Layer], live: dict[str, int]) -> int:
    name = call.layer
    if call.kernel.rpartition(".")[2] not in ("conv", "grad") or name not in layers:
        return 0
    layer = layers[name]
    height, width = layer.spec.output_size
    return 2 * live[name] * layer.scheme.cell_elems(layer.spec) * height * width * SHAPE[0]


def _moved_bytes(call: Call, layers: Mapping[str, Layer], live: dict[str, int]) -> int:
    image = call.buffers[0].image
    if call.kernel == "image.zero_halo" and image:  # touches the border alone
        return (image.elems - image.channels * image.height * image.width * image.batch) * ITEM_BYTES["float32"]
    buffers = call.buffers
    if (
        isinstance(call.problem, BatchNormMoments) and call.problem.chunks
    ):  # the values are read of channels whose mean is far from 0 alone
        buffers = tuple(buffer for buffer in buffers if not buffer.image)
    return sum(
        (buffer.elems if buffer.elems is not None else masked_elems(buffer, layers, live)) * ITEM_BYTES[buffer.dtype]
        for buffer in buffers
    )


def table() -> str:
    """The markdown between the markers."""
    targets = [find_target(name) for name in TARGETS]
    found = rows(targets[0])
    parts = [
        "| kernel | phase | calls | MFLOP | MB | FLOP a byte | "
        + " | ".join(f"{target.name} ms" for target in targets)
        + " |",
        "|---|---|---:|---:|---:|---:|" + "---:|" * len(targets),
    ]

    def line(kernel: str, phase: str, row: Row, least: list[str]) -> str:
        cells = [
            kernel,
            phase,
            str(row.calls),
            f"{row.flop / 1e6:.0f}",
            f"{row.moved_bytes / 1e6:.1f}",
            f"{row.intensity:.1f}",
            *least,
        ]
        return f"| {' | '.join(cells)} |"

    for (kernel, phase), row in sorted(found.items(), key=lambda item: -item[1].moved_bytes):
        limits = [row.seconds(target) for target in targets]
        parts.append(
            line(
                kernel,
                phase,
                row,
                [f"{seconds * 1e3:.2f}{'*' if by == 'operations' else ''}" for seconds, by in limits],
            )
        )
    total = Row(
        sum(row.calls for row in found.values()),
        sum(row.flop for row in found.values()),
        sum(row.moved_bytes for row in found.values()),
    )
    least = [sum(row.seconds(target)[0] for row in found.values()) for target in targets]
    parts.append(line("whole step", "", total, [f"{seconds * 1e3:.1f}" for seconds in least]))
    parts += [
        "",
        "| device | GFLOP/s | GB/s | FLOP a byte at the ridge | threads | local memory, bytes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for target in targets:
        gpu = target.limits
        parts.append(
            f"| {target.name} | {gpu.gflops:.0f} | {gpu.gigabytes_per_second:.1f} | "
            f"{gpu.gflops / gpu.gigabytes_per_second:.1f} | "
            f"{gpu.threads} of {gpu.most_threads} | {gpu.local_bytes} |"
        )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    try:
        write_atomically(DOCUMENT, embed(DOCUMENT.read_text(encoding="utf-8"), table()))
    except MestError as error:
        sys.exit(f"error: {error}")

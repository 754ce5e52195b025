"""Bytes that a step needs, by kind, known before anything is compiled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import Target
from mest_compile.ir.layouts.layout import ITEM_BYTES
from mest_compile.ir.program import Buffer, Program
from mest_compile.operators.layers.family import FAMILIES, masked_elems
from mest_compile.operators.layers.gather import GatherConv, GatherGrad
from mest_compile.sparsity.layer import Layer

KINDS = ("values", "indices", "gradients", "optimizer", "activations", "workspace", "batch")


def footprint(
    train: Program, predict: Program, layers: Mapping[str, Layer], live_units: Mapping[str, int], target: Target
) -> dict[str, int]:
    """{kind: bytes, "total": bytes}.

    live_units   weight name -> units in the layer's value array; beside the kernels' arrays a step keeps what
                 `kept_bytes` says
    activations  what the forward pass keeps for the backward pass; workspace: the rest of the arena, and what kernels
                 allocate: partial sums of the weight gradient of the largest layer, lanes of sums times threads' shares
                 of every live weight, and copies in float32 of what is stored in less
    """
    found = dict.fromkeys(KINDS, 0)
    for buffer in _held((train, predict)):
        elems = buffer.elems if buffer.elems is not None else masked_elems(buffer, layers, live_units)
        found[buffer.kind] += elems * ITEM_BYTES[buffer.dtype]
    found["indices"] += sum(
        FAMILIES.find(layers[name].kernels).kept_bytes(layers[name], cells) for name, cells in live_units.items()
    )
    found["activations"] = min(train.saved_bytes(), train.arena_bytes)
    spared = {
        call.layer
        for call in train.calls
        if isinstance(call.problem, GatherGrad) and not backend_of(target).keeps_sums(call.problem, target)
    }
    most_live = max(
        (
            live_units[name] * layer.scheme.cell_elems(layer.spec)
            for name, layer in layers.items()
            if layer.spec.output_size != (1, 1) and name not in spared
        ),
        default=0,
    )
    lanes = target.vector // 2 if target.pairs else target.vector  # of sums
    kernels = (most_live * lanes + _copied_elems(train, target)) * target.cores * ITEM_BYTES["float32"]
    found["workspace"] = train.arena_bytes - found["activations"] + kernels
    return found | {"total": sum(found.values())}


def told_spared(spared: Mapping[str, int] | None) -> dict[str, int]:
    """{"spared_by_microbatch": bytes, "spared_by_recomputing": bytes} of a step with a memory budget; of one without
    nothing."""
    return {f"spared_by_{how}": size for how, size in (spared or {}).items()}


def _copied_elems(train: Program, target: Target) -> int:
    """Elements of the largest slice that a thread widens as a whole before it reads it."""
    sources = [call.problem.source for call in train.calls if isinstance(call.problem, GatherConv)]
    return max(
        (
            source.slice_elems
            for source in sources
            if source.dtype != "float32" and backend_of(target).widens_once(source, target)
        ),
        default=0,
    )


def _held(programs: Iterable[Program]) -> list[Buffer]:
    return list(dict.fromkeys(buffer for program in programs for buffer in program.held()))

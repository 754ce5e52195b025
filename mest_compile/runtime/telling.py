"""What a step tells of itself; nothing changes."""

from __future__ import annotations

import html
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base.pages import table
from mest_compile.ir.graph import ForwardGraph
from mest_compile.ir.program import Program
from mest_compile.operators.layers.family import held_cells
from mest_compile.operators.losses.loss import Loss
from mest_compile.operators.optimizers.optimizer import Optimizer
from mest_compile.planning.footprint import footprint, told_spared
from mest_compile.runtime.changes import Changes, in_turn
from mest_compile.runtime.compiled import Compiled
from mest_compile.runtime.mutating import Mutating
from mest_compile.runtime.state import HeldState
from mest_compile.sparsity.layer import Layer

if TYPE_CHECKING:
    from mest_compile.records.record import Choice


class Tells:
    """Facts of a step, compiled and present."""

    _compiled: Compiled
    _state: HeldState
    _mutating: Mutating
    _turn: threading.RLock
    _changes: Changes
    _from_file: bool

    def __repr__(self) -> str:
        masks = self._mutating.sparse
        facts, shape = self._compiled.facts, "x".join(map(str, self.input_shape))
        live = sum(self.live_weights().values())
        weights = sum(layer.spec.weight_elems for layer in self.layers.values())
        return (
            f"<TrainStep {shape} to {self.classes}: {len(list(masks))} of {len(self.layers)} layers sparse, {live} of "
            f"{weights} weights live, {self.memory()['total'] / 2**20:.1f} MiB, {self.loss.name}, "
            f"{self.optimizer.name}, target {facts.target.name}>"
        )

    def _repr_html_(self) -> str:
        live = self.live_weights()
        rows = [
            (name.removesuffix(".weight"), layer.scheme, layer.spec.weight_elems, live[name])
            for name, layer in self.layers.items()
        ]
        return f"<p>{html.escape(repr(self))}</p>{table(rows, ('layer', 'scheme', 'weights', 'live'))}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(N, C, H, W), (N, C, L) or (N, features): of several inputs all of them, one behind another."""
        return (self.batch, *self._compiled.graph.input_shape[1:])

    @property
    def batch(self) -> int:
        """Examples of a step, at most."""
        return self._compiled.facts.batch

    @property
    def microbatch(self) -> int | None:
        """Examples of each of the passes that a step makes; None: it makes one of all."""
        return self._compiled.graph.input_shape[0] if self._compiled.train.adds else None

    @property
    def whole_batches(self) -> bool:
        """Whether it does not take any number of examples up to `batch` to train on, as there is no compiler for
        others."""
        return self._compiled.fewer is None and self._compiled.graph.input_shape[0] > 1

    @property
    def classes(self) -> int:
        """Outputs an example."""
        return self._compiled.graph.nodes[-1].shape[1]

    @property
    def graph(self) -> ForwardGraph:
        """The forward pass, as it was imported."""
        return self._compiled.graph

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(N, classes), or (N, classes, H, W) of maps."""
        return (self.batch, *self._compiled.graph.nodes[-1].shape[1:])

    @property
    def loss(self) -> Loss:
        return self._compiled.facts.loss

    @property
    def optimizer(self) -> Optimizer:
        return self._compiled.optimizer

    @property
    def asked_lr(self) -> float | None:
        """The learning rate that the caller gave the optimizer; None: the default, or a step from a file, where it is
        nobody's wish now."""
        rule = self._compiled.optimizer
        return None if self._from_file or rule.lr == type(rule)().lr else rule.lr

    @property
    def program(self) -> Program:
        """The training step's kernel calls, in order."""
        return self._compiled.train

    @property
    def layers(self) -> Mapping[str, Layer]:
        """{weight name: Layer}, every convolution and linear layer."""
        return self._compiled.layers

    @in_turn
    def live_weights(self) -> dict[str, int]:
        """{weight name: weights that are computed with now}, every convolution and linear layer."""
        layers = self._compiled.layers
        return {
            name: int(self._state.keep(name).sum()) * layer.scheme.cell_elems(layer.spec)
            for name, layer in layers.items()
        }

    def describe(self) -> dict[str, Any]:
        """Target, threads, seed, schemes and versions, ready for JSON."""
        return dict(self._compiled.document["describe"])

    def kernel_choices(self) -> dict[str, Choice]:
        """{name of a call of `program`: its kernel's knobs, and whether they are "exact", "nearest" or "default"}."""
        return dict(self._compiled.choices)

    @in_turn
    def sparsity(self) -> dict[str, float]:
        """{weight name: share of weights that are zero now}, sparse layers only."""
        return {name: 1.0 - float(self._state.keep(name).mean()) for name in self._mutating.sparse}

    @in_turn
    def not_finite(self) -> list[str]:
        """Which arrays hold NaN or infinity, of live weights, statistics, optimizer state and gradients; none when
        training is sound."""
        return [name for name in self._state.own() if not np.isfinite(self._state.get(name)).all()]

    def memory_by_microbatch(self) -> dict[int, int]:
        """{examples of a pass: bytes that the step would need at its densest if it made such passes}, most first."""
        from mest_compile.planning.retargeting import bytes_by_microbatch

        return bytes_by_microbatch(self._compiled.facts)

    @in_turn
    def memory(self, at_capacity: bool = False) -> dict[str, int]:
        """Bytes by kind: values, indices, gradients, optimizer, activations (saved for the backward pass), workspace,
        batch, total.

        at_capacity  when every layer is as dense as it may become (`grow_to` of `mest.compile`); layers without a bound
                     count as they are
        Of a step with a memory budget also how many bytes it does without: spared_by_microbatch, beside one pass of all
        examples, and spared_by_recomputing, beside passes that keep what they usually do.
        """
        layers = self._compiled.layers
        units = {
            name: len(places) // layers[name].scheme.unit_cells(layers[name].spec)
            for name, places in self._state.places.items()
        }
        if at_capacity:
            units |= {name: layer.capacity for name, layer in layers.items() if layer.capacity is not None}
        target, cells = self._compiled.facts.target, held_cells(layers, units)
        found = footprint(self._compiled.train, self._compiled.predict, layers, cells, target)
        return found | told_spared(self._compiled.document["describe"].get("spared_bytes"))

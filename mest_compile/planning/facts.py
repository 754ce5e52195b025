"""What a step was compiled from, as a JSON document: checkpoints and artifacts hold it, and the same programs come out
of it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mest_compile.base.errors import MestError, StateError
from mest_compile.hardware.target import Gpu, Target
from mest_compile.ir.graph import ForwardGraph, LayerSpec, plain, tuples
from mest_compile.ir.program import Program
from mest_compile.lowering.fusing import fuse
from mest_compile.lowering.programs import lower, lower_training
from mest_compile.operators.losses.loss import Loss, read_loss
from mest_compile.operators.optimizers.optimizer import Optimizer, read_optimizer
from mest_compile.sparsity import parse_scheme
from mest_compile.sparsity.layer import Layer


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that decides what a step computes, and on what.

    graph       as imported, before fusing, of the examples of a pass
    layers      weight name -> Layer
    recomputed  nodes whose values the backward pass computes again
    activations  what they are stored as
    parts       names of the parameters that freeze one after another while the step trains, those that have frozen
                too: each part has a learning rate of its own
    passes      micro-batches that a step runs its programs on, whose gradients add up
    """

    graph: ForwardGraph
    layers: Mapping[str, Layer]
    recomputed: frozenset[str]
    optimizer: Optimizer
    target: Target
    threads: int
    seed: int
    loss: Loss
    activations: str = "float32"
    parts: tuple[tuple[str, ...], ...] = ()
    passes: int = 1

    def lower(self) -> tuple[Program, Program]:
        """(training step, prediction)."""
        return lower(
            fuse(self.graph),
            self.layers,
            self.target,
            self.recomputed,
            self.loss,
            self.activations,
            self.optimizer,
            self.parts,
            self.passes > 1,
        )

    @property
    def batch(self) -> int:
        """Examples of a step: all its passes'."""
        return self.passes * self.graph.input_shape[0]

    def with_batch(self, batch: int) -> Facts:
        """Those of passes of so many examples, else as they are, the layout too."""
        layers = {
            name: replace(layer, spec=replace(layer.spec, input_shape=(batch, *layer.spec.input_shape[1:])))
            for name, layer in self.layers.items()
        }
        return replace(self, graph=self.graph.with_batch(batch), layers=layers)

    def lower_fewer(self, examples: int, train: Program) -> Program:
        """The training program for so many examples, fewer than a pass's, in the memory of the step's own, `train`:
        with other arrays for a batch, and otherwise the same."""
        facts = self.with_batch(examples)
        return lower_training(
            fuse(facts.graph),
            facts.layers,
            facts.target,
            {},
            facts.recomputed,
            facts.loss,
            facts.activations,
            facts.optimizer,
            facts.parts,
            facts.passes > 1,
            train,
        )

    def to_json(self) -> dict[str, Any]:
        target = self.target
        return {
            "graph": self.graph.to_json(),
            "optimizer": plain(self.optimizer.to_json()),
            "threads": self.threads,
            "seed": self.seed,
            "recomputed": sorted(self.recomputed),
            "loss": self.loss.to_json(),
            "activations": self.activations,
            **({"parts": plain(self.parts)} if self.parts else {}),
            **({"passes": self.passes} if self.passes > 1 else {}),
            "target": {**asdict(target), "llvm": [list(pair) for pair in target.llvm]},
            "layers": [
                {
                    "spec": plain(asdict(layer.spec)),
                    "scheme": str(layer.scheme),
                    "sparsity": layer.sparsity,
                    "kernels": layer.kernels,
                    "capacity": layer.capacity,
                    "sections": [layer.section_channels, layer.transposed_section_channels],
                }
                for layer in self.layers.values()
            ],
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Facts:
        """Raises KeyError or TypeError when the document is of another version."""
        graph = ForwardGraph.from_json(facts["graph"])
        known = {field.name for field in fields(Gpu)}  # documents of 0.1 have more
        gpu = facts["target"].get("gpu")
        target = Target(
            **{
                **facts["target"],
                "llvm": tuples(facts["target"]["llvm"]),
                "gpu": Gpu(**{name: value for name, value in gpu.items() if name in known}) if gpu else None,
            }
        )
        specs = [LayerSpec(**{key: tuples(value) for key, value in entry["spec"].items()}) for entry in facts["layers"]]
        layers = {
            spec.name: Layer(
                spec,
                parse_scheme(entry["scheme"]),
                entry["sparsity"],
                entry["kernels"],
                entry["sections"][0],
                entry["sections"][1],
                entry["capacity"],
                spec.name in graph.frozen,
            )
            for spec, entry in zip(specs, facts["layers"], strict=True)
        }
        return cls(
            graph,
            layers,
            frozenset(facts["recomputed"]),
            read_optimizer(facts["optimizer"]),
            target,
            facts["threads"],
            facts["seed"],
            read_loss(facts),
            facts.get("activations", "float32"),
            tuples(facts.get("parts", [])),
            facts.get("passes", 1),
        )


def read_facts(document: Mapping[str, Any], where: str) -> Facts:
    """The facts that `where`, a file whose digest was right, holds. Raises StateError when another version wrote it."""
    try:
        return Facts.from_json(document)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, MestError) as problem:
        raise StateError(f"{where} lacks {problem}; it is of another version of mest-compile") from problem

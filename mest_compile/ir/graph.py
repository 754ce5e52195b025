"""Frozen facts that the rest of the compiler passes around. Everything checks itself when made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mest_compile.base.errors import SpecError

MOST_ELEMS = 2**31 - 1  # of a weight, and of a slice of an activation: their places are told in int32
STATISTICS = ("running_mean", "running_var")  # roles of what no optimizer touches
LAYERS = ("conv2d", "linear", "conv_transpose2d")  # operators whose parameter "weight" may be sparse

# Why a parameter stays as it is. What torch froze, or the caller did, may be asked to train after all.
FLAG, CHOSEN = "requires_grad=False", "not in trainable"
BUFFER, CUT = "a buffer", "behind a cut gradient"
FROZE = "frozen while training"  # by `step.freeze`: it trained before


COUNTER = "num_batches_tracked"  # what torch calls a BatchNorm's number of training steps, a buffer of its own


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A trainable convolution or linear layer, every size known when we compile.

    name          torch name of its weight: "layer1.0.conv1.weight"
    weight_shape  (out, in, kh, kw), elements; a linear layer is (out, in, 1, 1); `in` is of one group
    input_shape   (batch, in, h, w), elements; a linear layer is (batch, in, 1, 1); `in` is of all groups
    stride, dilation  (y, x), pixels
    padding       (y, x) pixels of zeros above and left of the input
    groups        of channels, each convolved by itself
    padding_end   (y, x) pixels of zeros below and right of it; None: as many as `padding`
    transposed    the layer is the input gradient of that convolution: it makes what the convolution would take of what
                  it would give; `input_shape` is then of the layer's output
    """

    name: str
    weight_shape: tuple[int, int, int, int]
    input_shape: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    dilation: tuple[int, int] = (1, 1)
    padding_end: tuple[int, int] | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.weight_shape[1] * self.groups != self.input_shape[1]:
            several = f" in each of {self.groups} groups" if self.groups > 1 else ""
            raise SpecError(
                f"{self.name}: the weight takes {self.weight_shape[1]} channels{several}, the input has "
                f"{self.input_shape[1]}"
            )
        if self.weight_shape[0] % self.groups:
            raise SpecError(
                f"{self.name}: {self.weight_shape[0]} output channels do not fall into {self.groups} groups; wanted a "
                "multiple"
            )
        if self.weight_elems > MOST_ELEMS:
            raise SpecError(
                f"{self.name}: the weight has {self.weight_elems:,} elements; wanted at most {MOST_ELEMS:,}, which "
                f"31 bits tell apart: make the layer narrower"
            )
        if min(self.output_size) < 1:
            raise SpecError(
                f"{self.name}: a {self.input_shape[2]}x{self.input_shape[3]} input is too small for "
                f"a {self.extent[0]}x{self.extent[1]} kernel with padding {self.padding}"
            )

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the output, pixels."""
        return tuple(
            (size + pad + end - extent) // step + 1
            for size, pad, end, extent, step in zip(
                self.input_shape[2:], self.padding, self.padding_end or self.padding, self.extent, self.stride
            )
        )  # type: ignore

    @property
    def extent(self) -> tuple[int, int]:
        """(height, width) that the taps reach over, pixels: the kernel's size where they are neighbours."""
        return tuple((taps - 1) * apart + 1 for taps, apart in zip(self.weight_shape[2:], self.dilation))  # type: ignore

    @property
    def depthwise(self) -> bool:
        """Every input channel is a group of its own."""
        return self.groups > 1 and self.weight_shape[1] == 1

    @property
    def weight_elems(self) -> int:
        out, inputs, height, width = self.weight_shape
        return out * inputs * height * width


@dataclass(frozen=True, slots=True)
class Node:
    """One operator of the forward graph.

    op      name in the operator registry: "conv2d", "linear", "conv_transpose2d", "batch_norm", "add", "max_pool2d",
            "avg_pool2d", "global_avg_pool", "flatten", "detach" (its input, without a gradient), or an activation:
            "relu"
    name    unique; the dotted torch module path where there is one
    inputs  names of the producing nodes; "input" is the graph's input
    params  role -> torch parameter or buffer name. LAYERS: weight, bias?; batch_norm: weight, bias, running_mean,
            running_var
    attrs   conv2d: stride, padding, padding_end where it is another, and groups, dilation where they are not 1;
            batch_norm: eps, momentum (torch's: share of the new statistics), evaluating (only if it is: it normalises
            with its running statistics, and keeps them, while the step trains; FROZE where that began while training);
            pools: fields of operators.pool.Pool, none where adaptive; others: as their operators say
    shape   of the output: (N, C, H, W) or (N, features)
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    params: Mapping[str, str] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a model does to its input before an operator sees it, channel by channel; nothing of it is trained.

    operation  "add", "subtract", "multiply" or "divide", as ir.expressions has them
    operand    a number, one a channel, or the name of a buffer that holds one a channel
    swapped    the operand comes first
    """

    operation: str
    operand: float | tuple[float, ...] | str
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class ForwardGraph:
    """A model's forward pass in topological order; the last node gives the logits (N, classes), or maps
    of them (N, classes, H, W).

    state_shapes  every parameter and buffer of the model by torch name, in torch's order and shape
    prepared      what becomes of the input before the nodes see it, one after another
    inputs        of a model of several: the shape of each, without the batch; `input_shape` is then of features, in
                  which they lie one behind another
    frozen        what nodes take as a parameter and no step changes -> why: FLAG, CHOSEN, BUFFER, CUT or FROZE
    """

    nodes: tuple[Node, ...]
    input_shape: tuple[int, ...]
    state_shapes: Mapping[str, tuple[int, ...]]
    prepared: tuple[Preparation, ...] = ()
    frozen: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[tuple[int, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "input_shape": list(self.input_shape),
            "state_shapes": plain(dict(self.state_shapes)),
            "nodes": [
                {
                    "op": node.op,
                    "name": node.name,
                    "inputs": list(node.inputs),
                    "shape": list(node.shape),
                    "params": dict(node.params),
                    "attrs": plain(node.attrs),
                }
                for node in self.nodes
            ],
            **({"prepared": [plain(asdict(one)) for one in self.prepared]} if self.prepared else {}),
            **({"frozen": dict(self.frozen)} if self.frozen else {}),
            **({"inputs": plain(self.inputs)} if self.inputs else {}),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ForwardGraph:
        """What `to_json` gave. Raises KeyError or TypeError when the document is of another version."""
        return cls(
            tuple(
                Node(
                    node["op"],
                    node["name"],
                    tuple(node["inputs"]),
                    tuple(node["shape"]),
                    node["params"],
                    {key: tuples(value) for key, value in node["attrs"].items()},
                )
                for node in document["nodes"]
            ),
            tuple(document["input_shape"]),
            {name: tuple(shape) for name, shape in document["state_shapes"].items()},
            tuple(
                Preparation(one["operation"], tuples(one["operand"]), one["swapped"])
                for one in document.get("prepared", ())
            ),
            document.get("frozen", {}),
            tuples(document.get("inputs", [])),
        )

    def with_batch(self, batch: int) -> ForwardGraph:
        """The same of so many examples: every shape begins with them."""
        nodes = tuple(replace(node, shape=(batch, *node.shape[1:])) for node in self.nodes)
        return replace(self, nodes=nodes, input_shape=(batch, *self.input_shape[1:]))

    def parameters(self) -> dict[str, Node]:
        """Name of every parameter that a node takes, statistics left out -> the node, in the order of nodes."""
        return {name: node for node in self.nodes for role, name in node.params.items() if role not in STATISTICS}

    def trainable(self) -> list[str]:
        """Names of the parameters that a step changes."""
        return [name for name in self.parameters() if name not in self.frozen]

    def moving(self) -> set[str]:
        """Names of the nodes whose value follows a parameter that trains: gradients flow through these alone."""
        trained = {node.name for name, node in self.parameters().items() if name not in self.frozen}
        found: set[str] = set()
        for node in self.nodes:
            if node.op != "detach" and (node.name in trained or any(source in found for source in node.inputs)):
                found.add(node.name)
        return found


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def tuples(value: Any) -> Any:
    """What `plain` made of a value without mappings."""
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value

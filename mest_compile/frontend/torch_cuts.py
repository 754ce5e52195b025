"""Makes torch.export keep where a forward pass cuts its gradient, and where it drops while it trains.

torch.export drops `inference_mode` and, where the caller has gradients off, `no_grad`; its decompositions turn `detach`
into an alias like others, and dropout in evaluation mode into nothing. So such a value goes through an operator of our
own, which they keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from mest_compile.frontend.torch_attention import written_out
from mest_compile.frontend.torch_depth import shown

CUTS = ("detach", "detach_", "data")  # functions and attributes of tensors
# Functions that drop while they train, as torch's modules call them, and torch_depth's.
RECURRENT = ("gru", "lstm", "rnn_tanh", "rnn_relu")  # converted whole; argument 7: whether they train
DROPOUTS = (
    *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "feature_dropout_"),
    *("drop_path", "drop_batch"),
)
CUT, DROP = "cut.default", "drop.default"  # as torch.export names our operators


@torch.library.custom_op("mest_compile::cut", mutates_args=(), schema="(Tensor x) -> Tensor")
def cut(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


cut.register_fake(torch.empty_like)


@torch.library.custom_op(
    "mest_compile::drop", mutates_args=(), schema="(Tensor x, float p, str written, int number) -> Tensor"
)
def drop(x: torch.Tensor, p: float, written: str, number: int) -> torch.Tensor:
    """`number` counts the calls of DROPOUTS in a forward pass."""
    return x.clone()


drop.register_fake(lambda x, p, written, number: torch.empty_like(x))


def dropping(arguments: tuple, named: Mapping[str, Any]) -> tuple[Any, float, bool, bool]:
    """(value, p, whether it drops, whether in place) of a call of one of DROPOUTS."""
    given = dict(zip(("input", "p", "training", "inplace"), arguments, strict=False)) | dict(named)
    p, training = float(given.get("p", 0.5)), given.get("training", given.get("train", True))
    return given["input"], p, bool(training) and p > 0, bool(given.get("inplace", False))


def name_of(function: Any) -> str:
    """Of a function that a TorchFunctionMode is shown; of an attribute's getter the attribute's."""
    name = getattr(function, "__name__", str(function))
    return function.__self__.__name__ if name == "__get__" else name


@contextmanager
def marked(module: torch.nn.Module) -> Iterator[None]:
    """While it lasts, the module's forward pass marks its cuts for torch.export. Gradients must be on when it is
    called. The caller puts the module's attributes back."""
    forward = module.forward

    def marking(*arguments: Any, **named: Any) -> Any:
        with _Marks():
            return forward(*arguments, **named)

    module.forward = marking
    try:
        with shown(module), written_out(module):
            yield
    finally:
        module.forward = forward


class _Marks(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.dropouts = 0
        self.renewed: dict[int, tuple[Any, Any]] = {}  # id of what was dropped from in place -> (it, what it is now)

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple = (), named: dict[str, Any] | None = None
    ) -> Any:
        name = name_of(function)
        if self.renewed:
            arguments, named = tree_map_only(
                torch.Tensor, lambda leaf: self.renewed.get(id(leaf), (leaf, leaf))[1], (arguments, named)
            )
        if name in DROPOUTS:
            value, p, drops, in_place = dropping(arguments, named or {})
            if drops:
                return function(*arguments, **(named or {}))  # in evaluation mode as well, which is refused by name
            made = drop(value, p, name, self.dropouts)
            self.dropouts += 1
            if in_place or name.endswith("_"):
                self.renewed[id(value)] = value, made
            return made
        if name == "_set_grad_enabled":  # done, but not told to torch.export, which would make a subgraph of it
            with torch._C.DisableTorchFunction():
                return function(*arguments, **(named or {}))
        if name in CUTS:
            return cut(arguments[0])
        result = function(*arguments, **(named or {}))
        if torch.is_grad_enabled():
            return result
        return tree_map_only(torch.Tensor, lambda leaf: cut(leaf) if leaf.is_floating_point() else leaf, result)

"""Makes torch.export keep where a forward pass cuts its gradient.

torch.export drops `inference_mode` and, where the caller has gradients off, `no_grad`; its decompositions turn `detach`
into an alias like others. So a value whose gradient is cut goes through an operator of our own, which they keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

CUTS = ("detach", "detach_", "data")  # functions and attributes of tensors
OPERATOR = "cut.default"  # as torch.export names it


@torch.library.custom_op("mest_compile::cut", mutates_args=(), schema="(Tensor x) -> Tensor")
def cut(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


cut.register_fake(torch.empty_like)


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
        yield
    finally:
        module.forward = forward


class _Marks(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple = (), named: dict[str, Any] | None = None
    ) -> Any:
        name = name_of(function)
        if name == "_set_grad_enabled":  # done, but not told to torch.export, which would make a subgraph of it
            with torch._C.DisableTorchFunction():
                return function(*arguments, **(named or {}))
        if name in CUTS:
            return cut(arguments[0])
        result = function(*arguments, **(named or {}))
        if torch.is_grad_enabled():
            return result
        return tree_map_only(torch.Tensor, lambda leaf: cut(leaf) if leaf.is_floating_point() else leaf, result)

"""Models of several inputs, and of whole numbers: read as models of one input of float32 features, in which several lie
one behind another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


@contextmanager
def taking(module: torch.nn.Module, shapes: Sequence[Shape], several: bool) -> Iterator[None]:
    """`module`'s forward takes one float32 tensor for a while: of an input of that shape or, where there are several,
    features (N, F) of all. Inputs that it only takes as whole numbers it gets so.
    """
    whole = _whole(module, shapes)
    if not several and not whole:
        yield
        return
    forward, sizes = module.forward, [prod(shape[1:]) for shape in shapes]

    def packed(features: Any) -> Any:
        parts = features.split(sizes, 1) if several else [features]
        given = [part.reshape(shape) if several else part for part, shape in zip(parts, shapes, strict=True)]
        return forward(*(one.long() if place in whole else one for place, one in enumerate(given)))

    before = dict(vars(module))
    vars(module)["forward"] = packed
    try:
        yield
    finally:
        if "forward" in before:
            vars(module)["forward"] = before["forward"]
        else:
            del vars(module)["forward"]


def _whole(module: torch.nn.Module, shapes: Sequence[Shape]) -> tuple[int, ...]:
    """Places of the inputs that a model with embeddings does not take as float32."""
    import torch

    if not any(isinstance(part, torch.nn.Embedding | torch.nn.EmbeddingBag) for part in module.modules()):
        return ()
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        for count in range(len(shapes) + 1):
            for chosen in combinations(range(len(shapes)), count):
                given = [
                    torch.zeros(shape, dtype=torch.int64 if k in chosen else None) for k, shape in enumerate(shapes)
                ]
                try:
                    with torch.no_grad():
                        module(*given)
                except (RuntimeError, TypeError, ValueError, IndexError):
                    continue
                return chosen
    finally:
        for part, training in modes:
            part.training = training
    return ()  # which says what is wrong where it is called

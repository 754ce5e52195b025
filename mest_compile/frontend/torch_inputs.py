"""Models of several inputs, of whole numbers, and of several outputs: read as models of one input of float32 features,
in which several lie one behind another, and of one output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING, Any

from mest_compile.base.errors import SpecError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]


@contextmanager
def taking(module: torch.nn.Module, shapes: Sequence[Shape], several: bool, output: str | int | None) -> Iterator[None]:
    """`module`'s forward takes one float32 tensor for a while: of an input of that shape or, where there are several,
    features (N, F) of all. Inputs that it only takes as whole numbers it gets so. Of several values it gives the one
    that `output` says. Raises SpecError where there is none such.
    """
    whole = _whole(module, shapes)
    if not several and not whole and output is None:
        yield
        return
    forward, sizes = module.forward, [prod(shape[1:]) for shape in shapes]

    def packed(features: Any) -> Any:
        parts = features.split(sizes, 1) if several else [features]
        given = [part.reshape(shape) if several else part for part, shape in zip(parts, shapes, strict=True)]
        found = forward(*(one.long() if place in whole else one for place, one in enumerate(given)))
        return found if output is None else _chosen(found, output)

    before = dict(vars(module))
    vars(module)["forward"] = packed
    try:
        yield
    finally:
        if "forward" in before:
            vars(module)["forward"] = before["forward"]
        else:
            del vars(module)["forward"]


def outputs(found: Any) -> dict[str | int, Any]:
    """{name or number: value} of what forward gives; none where it is one value."""
    if isinstance(found, Mapping):
        return dict(found)
    if isinstance(found, tuple | list):
        return dict(enumerate(found)) | {name: getattr(found, name) for name in getattr(found, "_fields", ())}
    return {}


def names_of(found: Any) -> list[str | int]:
    """Of `outputs`; numbers of those without names."""
    there: list[str | int] = list(outputs(found))
    return [name for name in there if isinstance(name, str)] or there


def _chosen(found: Any, output: str | int) -> Any:
    there = outputs(found)
    if there and output not in there:
        raise SpecError(f"the model gives no output {output!r}; there are: {', '.join(map(str, names_of(found)))}")
    return there.get(output, found)


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

"""Stochastic depth as libraries write it: modules that make an example's values 0 while they train, or a batch's.

What they draw is drawn here as dropouts draw (operators/dropout.py). A module is known by its class's name and by what
it does to a tensor of ones; its forward becomes a call that torch_cuts and torch_trace know as they know F.dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

NAMES = ("StochasticDepth", "DropPath")  # ends of class names: torchvision's, timm's, those of transformers
TRIED = 64  # examples


def drop_path(value: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Drops whole examples."""
    if has_torch_function_unary(value):
        return handle_torch_function(drop_path, (value,), value, p, training)
    return value


def drop_batch(value: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Drops the whole batch."""
    if has_torch_function_unary(value):
        return handle_torch_function(drop_batch, (value,), value, p, training)
    return value


@contextmanager
def shown(module: torch.nn.Module) -> Iterator[None]:
    """While it lasts, the module's parts that are stochastic depth call `drop_path` and `drop_batch`."""
    changed = []
    try:
        for part in module.modules():
            if type(part).__name__.endswith(NAMES) and "forward" not in vars(part) and (found := _read(part)):
                part.forward = partial(_forward, part, *found)
                changed.append(part)
        yield
    finally:
        for part in changed:
            del part.forward


def _forward(part: torch.nn.Module, drop: Callable[..., torch.Tensor], p: float, value: torch.Tensor) -> torch.Tensor:
    return drop(value, p, part.training)


def _read(part: Any) -> tuple[Callable[..., torch.Tensor], float] | None:
    """(function, p) that it is, None where it does something else, or nothing."""
    name = "p" if hasattr(part, "p") else "drop_prob"
    p, training = getattr(part, name, None), part.training
    if not isinstance(p, int | float) or not 0 < p < 1:
        return None
    drop, ones = drop_batch if getattr(part, "mode", "row") == "batch" else drop_path, torch.ones(TRIED, 2, 1, 1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            part.training = True
            setattr(part, name, 0.5)  # of small ones too few would be dropped to tell anything
            rows, others = type(part).forward(part, ones)[:, :, 0, 0].T
            part.training = False
            stays = torch.equal(type(part).forward(part, ones), ones)
        except Exception:  # whatever its own code raises: tracing tells what it does
            return None
        finally:
            part.training = training
            setattr(part, name, p)
    dropped, kept = int((rows == 0).sum()), int((rows == 2).sum())
    together = 0 in (dropped, kept)
    alike = torch.equal(rows, others) and dropped + kept == TRIED and together == (drop is drop_batch)
    return (drop, p) if stays and alike else None

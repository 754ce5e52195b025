"""Pruned torch modules whose masks are still attached, read as the plain parameters that forward computes with.

torch.nn.utils.prune keeps `weight_orig` and `weight_mask` and makes `weight` of them before every forward: until then
it is stale. Under torch.nn.utils.parametrize, which torch.ao.pruning uses, `weight` is what a module makes of
`parametrizations.weight.original`; that is a mask where it is a product with zeros and ones, some of them zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import parametrize, prune

from mest_compile.base.errors import StateError

_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError)  # of other weights


@dataclass(frozen=True, slots=True)
class Masked:
    """A parameter with a mask attached.

    part         the module that has it, under the attribute `name`
    original     what trains
    mask         zeros and ones in its shape: the buffer of torch.nn.utils.prune, or what a parametrization does
    by_property  whether it is parametrized
    """

    part: torch.nn.Module
    name: str
    original: torch.nn.Parameter
    mask: torch.Tensor
    by_property: bool

    @property
    def prunes(self) -> bool:
        return bool((self.mask == 0).any())


def attached_masks(model: torch.nn.Module) -> dict[str, Masked]:
    """{torch name, as if the mask were not there: Masked} of a module and its parts."""
    return {
        f"{path}.{one.name}".lstrip("."): one
        for path, part in model.named_modules()
        for one in [*_by_hook(part), *_by_property(part)]
    }


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """`named_parameters()` under the names that `plainly` gives them."""
    plain = {id(one.original): name for name, one in attached_masks(model).items()}
    return {plain.get(id(parameter), name): parameter for name, parameter in model.named_parameters()}


@contextmanager
def plainly(model: torch.nn.Module) -> Iterator[dict[str, Masked]]:
    """For a while masks are multiplied in and masked parameters are plain ones; afterwards all is as it was. Gives what
    `attached_masks` does."""
    found = attached_masks(model)
    parts = {id(one.part): one.part for one in found.values()}.values()
    before = [(part, type(part), dict(vars(part))) for part in parts]
    plain: dict[int, torch.nn.Parameter] = {}  # of weights that layers share there is one
    try:
        for one in found.values():
            place = one.original.data_ptr() or id(one.original)
            _replace(one, plain.setdefault(place, _product(one)))
        yield found
    finally:
        for part, kind, attributes in before:
            part.__class__ = kind
            vars(part).clear()
            vars(part).update(attributes)


def check_masks(trained: Mapping[str, torch.Tensor], found: Mapping[str, Masked]) -> None:
    """Raises StateError where a parametrization would mask weights that are not 0."""
    for name, one in found.items():
        if one.by_property and bool(((trained[name] != 0) & (one.mask.cpu() == 0)).any()):
            raise StateError(
                f"{name} is parametrized by a mask that is not the step's: call "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, name) on it first"
            )


def write_back(
    trained: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor], found: Mapping[str, Masked]
) -> None:
    """Writes masked parameters to where they train, and with them the masks of torch.nn.utils.prune.

    masks  those of the step; where it has none, weights that are not 0 are alive
    """
    with torch.no_grad():
        for name, one in found.items():
            one.original.copy_(trained[name])
            if not one.by_property:
                one.mask.copy_(masks.get(name, trained[name] != 0))
                setattr(one.part, one.name, one.original * one.mask)  # stale until the next forward otherwise


def _by_hook(part: torch.nn.Module) -> list[Masked]:
    found = []
    for hook in getattr(part, "_forward_pre_hooks", {}).values():
        if isinstance(hook, prune.BasePruningMethod):
            name = hook._tensor_name
            original, mask = part._parameters[f"{name}_orig"], part._buffers[f"{name}_mask"]
            assert original is not None and mask is not None
            found.append(Masked(part, name, original, mask, False))
    return found


def _by_property(part: torch.nn.Module) -> list[Masked]:
    if not parametrize.is_parametrized(part):
        return []
    found = []
    for name, listed in part.parametrizations.items():  # type: ignore[union-attr, operator]
        original = getattr(listed, "original", None)
        if isinstance(original, torch.nn.Parameter) and (mask := _mask_of(listed, original)) is not None:
            found.append(Masked(part, name, original, mask, True))
    return found if len(found) == len(part.parametrizations) else []  # type: ignore[arg-type]


def _mask_of(parametrizations: Any, original: torch.Tensor) -> torch.Tensor | None:
    """What is multiplied, if that is all that is done; asked of copies in evaluation mode, which forward may change."""

    def applied(weight: torch.Tensor) -> torch.Tensor:
        for one in copied:
            weight = one(weight)
        return weight

    try:
        copied = deepcopy(parametrizations).eval()
        with torch.no_grad():
            mask = applied(torch.ones_like(original))
            others = original, torch.linspace(1, 2, original.numel()).to(original).reshape(original.shape)
            if not all(torch.equal(applied(other), other * mask) for other in others):
                return None
    except _REFUSALS:
        return None
    return mask if bool(((mask == 0) | (mask == 1)).all()) and bool((mask == 0).any()) else None


def _product(one: Masked) -> torch.nn.Parameter:
    with torch.no_grad():
        plain = torch.nn.Parameter(one.original * one.mask, one.original.requires_grad)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):  # which are refused
        if found := getattr(one.original, hooks, None):
            setattr(plain, hooks, found)
    return plain


def _replace(one: Masked, plain: torch.nn.Parameter) -> None:
    attributes, name = vars(one.part), one.name
    if one.by_property:
        one.part.__class__ = type(one.part).__bases__[0]
        attributes["_modules"] = {key: part for key, part in one.part._modules.items() if key != "parametrizations"}
        attributes["_parameters"] = {**one.part._parameters, name: plain}
        return
    attributes.pop(name, None)
    attributes["_parameters"] = {
        name if key == f"{name}_orig" else key: plain if key == f"{name}_orig" else value
        for key, value in one.part._parameters.items()
    }
    attributes["_buffers"] = {key: value for key, value in one.part._buffers.items() if key != f"{name}_mask"}
    attributes["_forward_pre_hooks"] = type(one.part._forward_pre_hooks)(
        (key, hook)
        for key, hook in one.part._forward_pre_hooks.items()
        if not (isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name)
    )

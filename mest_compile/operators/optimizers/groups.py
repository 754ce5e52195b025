"""Groups of parameters, with a learning rate and a weight decay of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Protocol

from mest_compile.base import checks
from mest_compile.base.errors import SpecError
from mest_compile.ir.graph import FROZE, LAYERS

# What the learning rate is multiplied by, weight decay, and which of the rates it is: the place among the parts that
# freeze one after another, LAST of all that never does.
Setting = tuple[float, float, int]
LAST = -1


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that are updated otherwise than the optimizer says.

    names  their torch names as a pattern, "head.*", or a list of patterns; * is any text, ? any letter
    rate   what the learning rate is multiplied by; 0: they stay, but for what momentum is left
    weight_decay  theirs; None: the optimizer's
    """

    names: str | tuple[str, ...]
    rate: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        listed = (
            (self.names,)
            if isinstance(self.names, str)
            else tuple(checks.names("Group: names", self.names, error=SpecError))
        )
        if not listed or not all(listed):
            raise SpecError(f'Group: names is {checks.shown(self.names)}; wanted a pattern of names, such as "head.*"')
        object.__setattr__(self, "names", listed)
        object.__setattr__(self, "rate", checks.number("Group: rate", self.rate, error=SpecError))
        if self.weight_decay is not None:
            decay = checks.number("Group: weight_decay", self.weight_decay, error=SpecError)
            object.__setattr__(self, "weight_decay", decay)

    def has(self, parameter: str) -> bool:
        return any(fnmatchcase(parameter, name) for name in self.names)


class _Node(Protocol):
    @property
    def op(self) -> str: ...

    @property
    def params(self) -> Mapping[str, str]: ...


class _Rule(Protocol):
    """What groups are of: an optimizer."""

    @property
    def groups(self) -> tuple[Group, ...]: ...

    @property
    def decay_weights_only(self) -> bool: ...

    @property
    def weight_decay(self) -> float: ...


def groups_of(kind: str, value: Any) -> tuple[Group, ...]:
    """Groups, of objects or of tables as files have them. Raises SpecError."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise SpecError(f"{kind}: groups is {checks.shown(value)}; wanted a list of mest.Group objects")
    return tuple(_group(kind, one) for one in value)


def _group(kind: str, value: Any) -> Group:
    if isinstance(value, Group):
        return value
    known = {field.name for field in fields(Group)}
    if not isinstance(value, Mapping) or not {"names"} <= value.keys() <= known:
        raise SpecError(
            f"{kind}: a group is {checks.shown(value)}; wanted mest.Group(names, rate, weight_decay), or a table with "
            "these keys"
        )
    return Group(**value)


class Settings:
    """Which parameters of a model are updated how; of frozen ones nothing is said.

    listed  the settings that there are; the optimizer's own is the first
    """

    def __init__(
        self,
        rule: Any,
        nodes: Iterable[_Node],
        frozen: Mapping[str, str] = MappingProxyType({}),
        parts: Sequence[Collection[str]] = (),
    ):
        """rule: an optimizer; frozen: names of parameters -> why; parts: names of those that freeze one after another.
        Raises SpecError for a group that never had one which trains."""
        usual: _Rule = rule
        own = (1.0, usual.weight_decay, LAST)
        turn = {name: place for place, part in enumerate(parts) for name in part}
        self._of: dict[str, Setting] = {}
        for node in nodes:
            for role, name in node.params.items():
                if role.startswith("running_") or name in frozen:
                    continue
                group = next((group for group in usual.groups if group.has(name)), None)
                decays = not usual.decay_weights_only or (node.op in (*LAYERS, "recurrent") and role == "weight")
                decay = usual.weight_decay if decays else 0.0
                if group is not None and group.weight_decay is not None:
                    decay = group.weight_decay
                self._of[name] = (1.0 if group is None else group.rate, decay, turn.get(name, LAST))
        trained = {*self._of, *(name for name, why in frozen.items() if why == FROZE)}
        for group in usual.groups:
            if not any(map(group.has, trained)):
                stays = "that trains " if any(map(group.has, frozen)) else ""
                raise SpecError(
                    f"no parameter {stays}is called {' or '.join(group.names)}, as a group of {type(rule).__name__} "
                    f"has it; there are: {', '.join(self._of)}"
                )
        self.listed = [own, *sorted(set(self._of.values()) - {own})]

    def of(self, parameter: str) -> int:
        """Place in `listed` of a parameter's."""
        return self.listed.index(self._of[parameter])


def hyper_name(place: int) -> str:
    """Name of the buffer with the scalars of a setting."""
    return f"hyper:{place}" if place else "hyper"

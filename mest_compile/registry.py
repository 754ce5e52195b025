"""Plug-ins are files: a registry finds them in their folder the first time a name is asked for."""

import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mest_compile.errors import DuplicateName, UnknownName

_loading = threading.RLock()  # one for all: a plug-in may be in two registries


class Registry(dict[str, Any]):
    """Names to plug-ins. `package` is the package whose modules register themselves when imported."""

    def __init__(self, kind: str, package: str):
        super().__init__()
        self.kind = kind
        self.package = package
        self._begun = self._loaded = False

    def load(self) -> "Registry":
        """Imports every module of the package once; returns self, with all there is: another thread waits until it is there."""
        if not self._loaded:
            with _loading:
                if not self._begun:  # a plug-in may ask for others while it is imported
                    self._begun = True
                    try:
                        package = importlib.import_module(self.package)
                        for module in pkgutil.iter_modules(package.__path__):
                            importlib.import_module(f"{self.package}.{module.name}")
                        self._loaded = True
                    finally:
                        self._begun = self._loaded  # what was interrupted begins anew
        return self

    def add(self, name: str, item: Any) -> None:
        if name in self and _origin(item) != _origin(self[name]):  # a file whose import was interrupted is imported again
            raise DuplicateName(f"{self.kind} {name!r} is registered twice; is its file imported twice?")
        self[name] = item

    def find(self, name: str) -> Any:
        """The plug-in of that name. Raises UnknownName with the names there are."""
        return self.load()[name]

    def names(self) -> list[str]:
        return sorted(self.load())

    def __missing__(self, name: str) -> Any:
        raise UnknownName(f"no {self.kind} {name!r}; there are: {', '.join(sorted(self)) or 'none'}")

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


def _origin(item: Any) -> tuple[str, str]:
    """Module and name of what a plug-in is, or is an instance of."""
    made = item if hasattr(item, "__qualname__") else type(item)
    return made.__module__, made.__qualname__


SCHEMES = Registry("scheme", "mest_compile.sparsity.schemes")
OPERATORS = Registry("operator", "mest_compile.operators")
SCHEDULES = Registry("schedule", "mest_compile.schedules")
FAMILIES = Registry("kernel family", "mest_compile.operators")


def scheme(name: str):
    """Class decorator: registers a sparsity scheme."""

    def register(cls):
        SCHEMES.add(name, cls)
        return cls

    return register


def operator(name: str):
    """Class decorator: registers a training operator (one instance serves all layers)."""

    def register(cls):
        OPERATORS.add(name, cls())
        return cls

    return register


def family(name: str):
    """Class decorator: registers a family of kernels (one instance serves all layers)."""

    def register(cls):
        FAMILIES.add(name, cls())
        return cls

    return register


Knobs = Mapping[str, tuple]


def schedule(kernel: str, device: str, knobs: Knobs | Callable[..., Knobs] | None = None, section_channels=None):
    """Function decorator: registers the code that runs `kernel` ("conv.forward") on a kind of device ("cpu").

    The function takes (problem, target, **knobs) and returns TVMScript text of one PrimFunc named `kernel`.
    `knobs` lists the values each knob may take, the first being the default; or it is a function (problem, target) that does.
    `section_channels` is for "gather.conv": the rule that says how many source channels a section of the index has.
    """

    def register(function):
        function.kernel, function.device, function.knobs = kernel, device, knobs or {}
        function.section_channels = section_channels
        SCHEDULES.add(f"{device}/{kernel}", function)
        return function

    return register

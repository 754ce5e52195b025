"""Plug-ins are files: a registry finds them in their folder the first time a name is asked for."""

import importlib
import pkgutil
import threading
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from mest_compile.base import plugins
from mest_compile.base.errors import DuplicateName, UnknownName
from mest_compile.base.names import meant

_loading = threading.RLock()  # one for all: a plug-in may be in two registries


class Registry(dict[str, Any]):
    """Names to plug-ins. `package` is the package whose modules, those in its folders too, register themselves when
    imported.

    each  where a plug-in is a folder: the one module of each that is imported
    """

    def __init__(self, kind: str, package: str, each: str | None = None):
        super().__init__()
        self.kind = kind
        self.package, self.each = package, each
        self._begun = self._loaded = False

    def load(self) -> "Registry":
        """Imports every module of the package and its folders once; returns self, with all there is: another thread
        waits until then."""
        if not self._loaded:
            with _loading:
                if not self._begun:  # a plug-in may ask for others while it is imported
                    self._begun = True
                    try:
                        package = importlib.import_module(self.package)
                        for name in self._modules(package):
                            importlib.import_module(name)
                        plugins.take_given()
                        self._loaded = True
                    finally:
                        self._begun = self._loaded  # what was interrupted begins anew
        return self

    def _modules(self, package: Any) -> list[str]:
        if self.each:
            return [f"{self.package}.{folder.name}.{self.each}" for folder in pkgutil.iter_modules(package.__path__)]
        return [module.name for module in pkgutil.walk_packages(package.__path__, f"{self.package}.")]

    def add(self, name: str, item: Any) -> None:
        if name in self and _origin(item) != _origin(
            self[name]
        ):  # a file whose import was interrupted is imported again
            raise DuplicateName(f"{self.kind} {name!r} is registered twice; is its file imported twice?")
        self[name] = item

    def find(self, name: str) -> Any:
        """The plug-in of that name. Raises UnknownName with the names there are."""
        return self.load()[name]

    def names(self) -> list[str]:
        return sorted(self.load())

    def __missing__(self, name: str) -> Any:
        raise UnknownName(f"no {self.kind} {name!r}; there are: {', '.join(sorted(self)) or 'none'}{meant(name, self)}")

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


def _origin(item: Any) -> tuple[str, str]:
    """Module and name of what a plug-in is, or is an instance of."""
    made = item if isinstance(item, type | FunctionType) else type(item)
    return made.__module__, made.__qualname__

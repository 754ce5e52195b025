"""Forward graphs of modules that were read before, kept between processes: reading one again takes seconds. Of
built-in models fresh weights are kept beside them, so that torch, which makes them, need not be imported.

What a module computes is known without running it where all of its parts are of packages whose code has a version: then
its key is made of their classes, of what their attributes say and of the tensors' shapes. Ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base.tensorfile import pack, unpack
from mest_compile.frontend.relax_graph import READERS
from mest_compile.hardware.folders import Kept, cache_folder, digest
from mest_compile.ir.graph import ForwardGraph
from mest_compile.models.catalog import BuiltIn

if TYPE_CHECKING:
    import torch

KNOWN = ("torch.nn.modules.", "mest_compile.models.", "torchvision.", "timm.")  # modules whose classes have a version
PACKAGES = ("torch", "torchvision", "timm", "apache-tvm")
MOST_BYTES = 25 * 2**20  # of graphs, each some 50 KB
MOST_WEIGHT_BYTES = 2**28  # of weights, of resnet20 1 MB, of resnet50 94


class _Unknown(Exception):
    """Something that another module of the same class may have otherwise."""


def key_of(module: torch.nn.Module, input_shape: Sequence[Any]) -> str | None:
    """The same for modules that are read as the same graph; None where that cannot be told.

    Values of parameters are no part of it where they are those of torch's own layers, nor are BatchNorms' statistics.
    """
    try:
        said = [_code(), list(input_shape), list(_told(module))]
    except _Unknown:
        return None
    return digest(json.dumps(said).encode())


def recall(key: str) -> ForwardGraph | None:
    """The graph of that key, if it is there and whole."""
    content = Kept(_folder(), MOST_BYTES).find(key)
    return None if content is None else ForwardGraph.from_json(json.loads(content))


def remember(key: str, graph: ForwardGraph) -> None:
    """Keeps a graph, where a file can be written and says all of it."""
    content = json.dumps(graph.to_json())
    if ForwardGraph.from_json(json.loads(content)) == graph:
        Kept(_folder(), MOST_BYTES).keep(key, content.encode())


def recall_fresh(model: BuiltIn, input_shape: Sequence[Any]) -> tuple[ForwardGraph, dict[str, np.ndarray]] | None:
    """The graph of a built-in model, and its fresh weights, if both are there."""
    graph = recall(_key_of_fresh(model, input_shape))
    weights = None if graph is None else _fresh_weights().find(_key_of_fresh(model))
    if graph is None or weights is None:
        return None
    arrays, texts = unpack(weights)
    return graph, {name: arrays[name] for name in json.loads(texts["order"])}  # torch's, in which `pack` has none


def remember_fresh(
    model: BuiltIn, input_shape: Sequence[Any], graph: ForwardGraph, state: Mapping[str, np.ndarray]
) -> None:
    """Keeps what reading that built-in model gave."""
    if sum(array.nbytes for array in state.values()) <= MOST_WEIGHT_BYTES // 4:
        remember(_key_of_fresh(model, input_shape), graph)
        _fresh_weights().keep(_key_of_fresh(model), pack(state, {"order": json.dumps(list(state))}))


def _key_of_fresh(model: BuiltIn, input_shape: Sequence[Any] = ()) -> str:
    """Weights are the same for any batch."""
    said = [model.name, model.input_shape[1:], model.classes, model.width, model.seed]
    return digest(json.dumps([_code(), *said, list(input_shape)]).encode())


def _fresh_weights() -> Kept:
    return Kept(cache_folder() / "fresh", MOST_WEIGHT_BYTES)


def _folder() -> Path:
    return cache_folder() / "graphs"


@cache
def _code() -> str:
    """A digest of all code that reads modules."""
    own = Path(__file__).parent.parent
    readers = {reader.__code__.co_filename for reader in READERS.load().values()}
    found = hashlib.sha256()
    for path in sorted({str(path) for path in own.rglob("*.py")} | readers):
        found.update(path.removeprefix(str(own)).encode() + Path(path).read_bytes())
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found.update(f"{package} {metadata.version(package)}".encode())
    return found.hexdigest()


def _told(module: torch.nn.Module) -> Iterator[Any]:
    """What tells modules apart, ready for JSON. Raises _Unknown."""
    import torch

    places: dict[int, str] = {}  # a tensor or a part that stands in several places is one
    for name, part in module.named_modules(remove_duplicate=False):
        kind = type(part)
        if not kind.__module__.startswith(KNOWN):
            raise _Unknown(kind)
        yield name, kind.__module__, kind.__qualname__, places.setdefault(id(part), name)
        valued = not kind.__module__.startswith("torch.nn.modules.")
        steady = valued or not isinstance(part, torch.nn.modules.batchnorm._NormBase)
        for key, value in sorted(vars(part).items()):
            if key in ("_parameters", "_buffers"):
                of_value = valued if key == "_parameters" else steady
                for own, tensor in value.items():
                    yield own, None if tensor is None else _tensor(tensor, of_value, places, f"{name}.{own}")
            elif key != "_modules":
                yield key, _plain(value)


def _tensor(tensor: torch.Tensor, of_value: bool, places: dict[int, str], name: str) -> Any:
    import torch

    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise _Unknown(tensor.layout)
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if of_value else b""
    facts = list(tensor.shape), str(tensor.dtype), str(tensor.layout), tensor.requires_grad, type(tensor).__name__
    return [*facts, places.setdefault(id(tensor), name), digest(content)]


def _plain(value: Any) -> Any:
    """An attribute's value, ready for JSON. Raises _Unknown where it is of a kind that does not say all of itself."""
    import torch

    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return [type(value).__name__, str(value)]
    if isinstance(value, tuple | list | set | frozenset):
        each = [_plain(one) for one in value]
        return [type(value).__name__, sorted(each) if isinstance(value, set | frozenset) else each]
    if isinstance(value, Mapping):
        return [type(value).__name__, [[_plain(key), _plain(one)] for key, one in value.items()]]
    if getattr(value, "__module__", None) and getattr(value, "__closure__", 0) is None:  # a function by its name
        known = value.__module__.startswith((*KNOWN, "torch.")) and "<" not in value.__qualname__
        if known:
            return ["function", value.__module__, value.__qualname__]
    raise _Unknown(type(value))

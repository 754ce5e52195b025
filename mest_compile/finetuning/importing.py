"""The net that is fine-tuned, as it comes. What a net of a name was imported as is kept beside compiled kernels: torch
and TVM take longer, and more memory, to import a mobile net than to train its last blocks on 200 images.
"""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import mest_compile
from mest_compile.base import checks, tensorfile
from mest_compile.base.errors import DataError, UnknownName, UsageError
from mest_compile.base.foreign import is_module
from mest_compile.frontend import import_model
from mest_compile.ir.graph import ForwardGraph
from mest_compile.kernels.cache import Builder
from mest_compile.models.catalog import MODELS, build_model
from mest_compile.models.pretrained import (
    PRETRAINED,
    classes_in,
    load_weights,
    pretrained_file,
    pretrained_model,
    read_weights,
)
from mest_compile.models.sources import find_model

PACKAGES = ("timm:", "torchvision:")
ANY = 1  # class: fine-tuning puts a classifier for two or more in its place
DECIDES = ("frontend", "ir", "models")  # folders of the package whose code decides what a net is imported as

Imported = tuple[ForwardGraph, dict[str, np.ndarray]]


def imported(model: Any, shape: tuple[int, ...], weights: str | Path | None, builder: Builder) -> Imported:
    """A net's graph and its state by torch name.

    model    name of a pretrained net, timm:NAME or torchvision:NAME; with `weights`, a file, of any built-in one;
             torch.nn.Module; .onnx file
    shape    (N, C, H, W)
    Raises UnknownName, UsageError, DataError, and what loading and importing do.
    """
    if is_module(model) or isinstance(model, Path) or (isinstance(model, str) and model.endswith(".onnx")):
        if weights is not None:
            raise UsageError(f"the model has its weights already; leave weights {weights} out")
        return import_model(model, shape)
    if not isinstance(model, str):
        raise UsageError(
            f"a pretrained net's name, a torch.nn.Module or an .onnx file is wanted, got {type(model).__name__}"
        )
    if model.startswith(PACKAGES):
        made = find_model(model, shape, ANY, pretrained=weights is None, weights=weights)
        return import_model(made, shape)
    if model not in MODELS:
        there = ", ".join(sorted(MODELS))
        raise UnknownName(
            f"no model {checks.shown(model)}; there are: {there}; or timm:NAME, torchvision:NAME, a file.onnx"
        )
    if weights is None and model not in PRETRAINED:
        raise UsageError(
            f"{model} comes without weights; give a file of them (--weights), or one of: {', '.join(PRETRAINED)}"
        )
    file = pretrained_file(model) if weights is None else Path(weights)
    return _unpacked(builder.keep(_key(model, shape, file), lambda: _packed(*_read(model, shape, weights))))


def _read(model: str, shape: tuple[int, ...], weights: str | Path | None) -> Imported:
    if weights is None:
        return import_model(pretrained_model(model, shape)[0], shape)
    module = build_model(model, shape, classes_in(build_model(model, shape), read_weights(weights)) or 1)
    load_weights(module, weights)
    return import_model(module, shape)


def _key(model: str, shape: tuple[int, ...], file: Path) -> str:
    """Of all that decides what a net is imported as."""
    try:
        found = hashlib.sha256(file.read_bytes())
    except OSError as problem:
        raise DataError(f"{file} cannot be read: {problem.strerror}; give a file of weights") from problem
    versions = [metadata.version(name) for name in ("torch", "apache-tvm")]
    found.update(json.dumps([model, shape, *versions]).encode())
    package = Path(mest_compile.__file__).parent
    for path in sorted(path for folder in DECIDES for path in (package / folder).rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _packed(graph: ForwardGraph, state: dict[str, np.ndarray]) -> bytes:
    return tensorfile.pack(state, {"graph": json.dumps(graph.to_json())})


def _unpacked(content: bytes) -> Imported:
    state, texts = tensorfile.unpack(content)
    return ForwardGraph.from_json(json.loads(texts["graph"])), state

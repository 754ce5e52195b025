"""Trained weights out again: into torch modules, ONNX files and safetensors files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mest_compile.base import weightfile
from mest_compile.base.errors import DataError, StateError, UsageError
from mest_compile.base.files import write_whole
from mest_compile.ir.graph import COUNTER, Preparation

if TYPE_CHECKING:
    import torch

    from mest_compile.runtime.step import TrainStep


def to_torch(step: TrainStep, model: torch.nn.Module) -> None:
    """Writes the step's parameters and statistics into the torch module that it was compiled from, or that was exported
    to the .onnx file that it was compiled from, and what the model does not use as it was. A module that
    torch.nn.utils.prune has masked gets the step's masks as well. Raises StateError.
    """
    import torch

    from mest_compile.frontend.torch_checks import read_shapes, unwrapped
    from mest_compile.frontend.torch_masks import check_masks, plainly, write_back

    model = unwrapped(model)
    trained = {name: torch.from_numpy(array) for name, array in step.state_dict().items()}
    with plainly(model) as masked:
        there, ours = read_shapes(model), {name: tuple(value.shape) for name, value in trained.items()}
        odd = sorted(name for name, _ in there.items() ^ ours.items() if name in trained or not name.endswith(COUNTER))
        if odd:
            raise StateError(
                f"the module is not the one that was compiled: they differ in {odd[0]}{_made_of(odd[0], there)}"
            )
        check_masks(trained, masked)
        model.load_state_dict(trained, strict=False)
    write_back(trained, {name: torch.from_numpy(mask) for name, mask in step.masks().items()}, masked)


def _made_of(name: str, there: Collection[str]) -> str:
    """What to do where the module computes a parameter from others."""
    path, _, last = name.rpartition(".")
    computed = f"{path}.parametrizations.{last}.original".lstrip(".")
    if "parametrizations" in name or any(other.startswith(computed) for other in there):
        return "; it is parametrized: call torch.nn.utils.parametrize.remove_parametrizations(layer, name) on it first"
    return ""


def to_onnx(
    step: TrainStep,
    path: str | Path,
    opset: int | None = None,
    into: str | Path | None = None,
    pixels: bool = False,
) -> None:
    """Writes the model, as `step.predict` computes it, to an .onnx file, whole or not at all.

    Weights are initializers of float32 under their torch names, +0.0 where they are dead. The input is called "input",
    the output "logits", the batch is of any size. What the model does not use is left out.
    opset  17 or later; None: 17
    into   the .onnx file that the step was compiled from: what is written is that file, with the step's weights and
           statistics where and as it stores them; it may be `path` itself
    Raises UsageError, StateError (`into` is another model), DataError, UnsupportedOperator, MestError without the
    package onnx.
    """
    from mest_compile.frontend import onnx_writer
    from mest_compile.frontend.onnx_into import written_into
    from mest_compile.operators.operator import OPERATORS

    onnx_writer.load_onnx_package()
    state = step.state_dict()
    if into is not None:
        if opset is not None:
            raise UsageError(f"{into} has its opset already; leave one of opset and into out")
        if pixels:
            raise UsageError(f"what {into} does to its input stays as it is; leave one of pixels and into out")
        model, weights = written_into(into, step.graph, state), None
    else:
        opset = onnx_writer.OPSET if opset is None else onnx_writer.check_opset(opset)
        writer = onnx_writer.Writer(state, step.input_shape)
        writer.prepare((*(_scaling(step) if pixels else ()), *step.graph.prepared))
        for node in step.graph.nodes:
            writer.operator(node, OPERATORS.find(node.op).onnx)
        model, weights = writer.model(step.graph, opset), writer.weights
    if step.reading is not None and step.reading.classes:
        model.metadata_props.add(key="classes", value=json.dumps(step.reading.classes))
    _write(path, onnx_writer.content_of(model) if weights is None else onnx_writer.pieces(model, weights))


def _scaling(step: TrainStep) -> list[Preparation]:
    """What makes pixels what the step is fed; nothing where they are that. Raises UsageError where nobody says it."""
    if step.reading is None or step.reading.inputs is None:
        raise UsageError(
            "nobody says how pixels become this step's images: give step.reading, a mest.Reading, or leave pixels out"
        )
    inputs = step.reading.inputs
    plain = not any(inputs.mean) and set(inputs.std) == {1.0}
    return [] if plain else [Preparation("subtract", inputs.mean), Preparation("divide", inputs.std)]


def to_safetensors(step: TrainStep, path: str | Path, compressed: bool = False) -> None:
    """Writes `step.state_dict()` and `step.masks()` to a safetensors file, whole or not at all; `read_safetensors`
    reads it. `step.reading` is the text "reading" of its header.

    compressed  of each sparse weight only what lives, and a bit for each of its weights (base/weightfile.py has the
                form); else the whole array NAME, and its mask as the bool array "mask:NAME"
    Raises UsageError.
    """
    told = {} if step.reading is None else {"reading": json.dumps(step.reading.to_json())}
    _write(path, weightfile.pieces(step.state_dict(), step.masks(), {"format": "pt", **told}, compressed))


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(what `step.load_state_dict` takes, what `step.set_masks` takes) of a file that `to_safetensors` wrote, in either
    form: {torch name: array in torch's shape, 0 where it is dead} and {weight name: bool array}. Raises DataError."""
    try:
        return weightfile.unpack(Path(path).read_bytes())
    except OSError as problem:
        raise DataError(f"{path} cannot be read: {problem.strerror}; give a file of weights") from problem
    except ValueError as problem:
        raise DataError(f"{path} is no whole safetensors file: {problem}; write it again") from problem


def save_torch(step: TrainStep, path: str | Path) -> None:
    """Writes `step.state_dict()` as torch.save does a dict of tensors, which torch.load(path, weights_only=True) reads.
    Raises UsageError."""
    import io

    import torch

    file = io.BytesIO()
    torch.save({name: torch.from_numpy(np.array(array)) for name, array in step.state_dict().items()}, file)
    _write(path, file.getvalue())


def _write(path: str | Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as problem:
        raise UsageError(f"{path} cannot be written: {problem.strerror}; pass another path") from problem

"""Models from outside become a ForwardGraph and their state. torch, tvm and onnx are imported when a model is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base import checks
from mest_compile.base.errors import SpecError
from mest_compile.base.foreign import is_module
from mest_compile.frontend.refusals import Refusals, check_finite
from mest_compile.ir.graph import ForwardGraph
from mest_compile.models.catalog import BuiltIn

if TYPE_CHECKING:
    import torch


def import_model(
    model: torch.nn.Module | BuiltIn | str | Path,
    input_shape: Sequence[Any],
    refusals: Refusals | None = None,
    output: str | int | None = None,
) -> tuple[ForwardGraph, dict[str, np.ndarray]]:
    """The model's forward graph and its state: parameters and BatchNorm buffers by torch name, float32 copies.

    model        torch.nn.Module, a path that ends in .onnx, or a model's name: see models.sources. Of a built-in model
                 that was read before nothing is made
    input_shape  (N, C, H, W), (N, C, L) or (N, features); of a torch module of several inputs one for each
    refusals     where goes what cannot be trained, in whose places the graph then has nodes that nothing compiles, as
                 far as there is a graph without it; None: it is raised
    output       of a torch module that gives several values, the name or number of the one that is the logits
    Raises UnknownName, UnsupportedOperator, SpecError, DataError.
    """
    if isinstance(model, Path) or (isinstance(model, str) and model.endswith(".onnx")):
        if output is not None:
            raise SpecError(
                f"output is {output!r}, which chooses a value of a torch module; an .onnx file is to have one"
            )
        return from_onnx(model, input_shape, refusals)
    if isinstance(model, str):
        from mest_compile.models.sources import model_to_read

        model = model_to_read(model, _checked(input_shape)[0])
        assert not isinstance(model, str)
    if isinstance(model, BuiltIn):
        return _from_built_in(model, input_shape, refusals, output)
    return from_torch(model, input_shape, refusals, output)


def _from_built_in(
    model: BuiltIn, input_shape: Sequence[Any], refusals: Refusals | None, output: str | int | None
) -> tuple[ForwardGraph, dict[str, np.ndarray]]:
    from mest_compile.frontend.remembered import recall_fresh, remember_fresh

    if refusals is not None or output is not None:
        return from_torch(model.made(), input_shape, refusals, output)
    shape, _ = _checked(input_shape)
    if known := recall_fresh(model, shape):
        return known
    graph, state = from_torch(model.made(), input_shape)
    remember_fresh(model, shape, graph, state)
    return graph, state


def from_torch(
    module: torch.nn.Module,
    input_shape: Sequence[Any],
    refusals: Refusals | None = None,
    output: str | int | None = None,
) -> tuple[ForwardGraph, dict[str, np.ndarray]]:
    """As `import_model`, from a torch module, which is left as it was."""
    import torch

    from mest_compile.frontend.remembered import key_of, recall, remember
    from mest_compile.frontend.torch_checks import check_module, read_state
    from mest_compile.frontend.torch_import import read_module

    if not isinstance(module, torch.nn.Module):
        raise SpecError(
            "a torch.nn.Module, a path to an .onnx file or the name of a built-in model is wanted, "
            f"got {type(module).__name__}"
        )
    shape, several = _checked(input_shape)
    if refusals is not None:
        return read_module(module, shape, several, output, refusals)
    key = key_of(module, [several or shape, output])
    noted = Refusals()
    if key and (graph := recall(key)):
        check_module(module, noted)
        noted.check()
        state = read_state(module)
        check_finite(graph, state)
        return graph, state
    graph, state = read_module(module, shape, several, output, noted)
    noted.check()
    if key:
        remember(key, graph)
    return graph, state


def trained_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What an optimizer of torch trains, by the names that `from_torch` gives it."""
    from mest_compile.frontend import torch_masks
    from mest_compile.frontend.torch_checks import unwrapped

    return torch_masks.trained_parameters(unwrapped(module))


def attached_to(model: Any) -> list[str]:
    """Names of the parameters of a torch module that masks with zeros are attached to; of other models there are
    none."""
    if not is_module(model):
        return []
    from mest_compile.frontend.torch_checks import unwrapped
    from mest_compile.frontend.torch_masks import attached_masks

    return [name for name, one in attached_masks(unwrapped(model)).items() if one.prunes]


def from_onnx(
    path: str | Path, input_shape: Sequence[Any], refusals: Refusals | None = None
) -> tuple[ForwardGraph, dict[str, np.ndarray]]:
    """As `import_model`, from an .onnx file. Initializer names are the torch names that torch.onnx.export kept."""
    from mest_compile.frontend.onnx_import import read_onnx

    noted, (shape, several) = Refusals() if refusals is None else refusals, _checked(input_shape)
    if several:
        raise SpecError(f"an .onnx file of one input is wanted, input_shape has {len(several)}: give the torch module")
    found = read_onnx(path, shape, noted)
    if refusals is None:
        noted.check()
    return found


def _checked(input_shape: Any) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """As `checks.shapes` has it, of lists and sizes of any kind."""

    def plain(value: Any) -> Any:
        return tuple(map(plain, value)) if isinstance(value, Iterable) and not isinstance(value, str) else int(value)

    try:
        return checks.shapes("input_shape", plain(input_shape), SpecError)
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"input_shape is (N, C, H, W), (N, C, L) or (N, features), every size 1 or more; got {input_shape!r}"
        ) from error

"""torch.nn.Module -> ForwardGraph, through torch.export and TVM's Relax importer."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.errors import SpecError, UnsupportedOperator
from mest_compile.frontend.relax_graph import dropout_error, read_main, unsupported
from mest_compile.spec import ForwardGraph

if TYPE_CHECKING:
    import torch

_TRACE_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError)


def read_module(module: torch.nn.Module, input_shape: tuple[int, ...]) -> tuple[ForwardGraph, dict[str, np.ndarray]]:
    """The module's forward pass and a float32 copy of its state by torch name. The module is left as it was.

    input_shape  (N, C, H, W) or (N, features)
    Raises UnsupportedOperator, SpecError.
    """
    state = _state(module)
    _check_modules(module)
    with _evaluation(module), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)               # torch 2.13 warns about its own pytree classes
        program = _export(module, input_shape)
        _check_before_decomposition(program)
        program = program.run_decompositions()
    function, places = _to_relax(program)
    parameters = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target in state}
    graph, _ = read_main(function, parameters, {name: array.shape for name, array in state.items()}, places)
    return graph, state


@contextmanager
def _evaluation(module: torch.nn.Module):
    """Evaluation mode for a while; every submodule gets its own flag back."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def _state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Copies in `state_dict()` order. BatchNorm's batch counter is left out: no operator reads it."""
    state = {}
    for name, tensor in module.state_dict().items():
        if name.rsplit(".", 1)[-1] == "num_batches_tracked" or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if str(tensor.dtype) != "torch.float32":
            raise SpecError(f"float32 parameters are wanted, {name} is {str(tensor.dtype).removeprefix('torch.')}: call model.float()")
        state[name] = tensor.detach().cpu().numpy().copy()
    return state


def _check_modules(module: torch.nn.Module) -> None:
    """Refuses what is not visible, or not complete, in the exported program."""
    import torch

    owners: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = owners.setdefault(id(parameter), name)
        if other != name:
            raise UnsupportedOperator(f"{other} and {name} are one parameter; shared weights cannot be trained here: "
                                      "give each layer its own")
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.track_running_stats and part.momentum is None:
            raise unsupported("batch_norm with momentum=None (a cumulative average)", f"in layer {name!r}")


def _export(module: torch.nn.Module, input_shape: tuple[int, ...]) -> Any:
    import torch

    images = torch.zeros(input_shape)
    with torch.no_grad():
        try:
            return torch.export.export(module, (images,))
        except _TRACE_ERRORS as error:
            failure = error
        try:                       # torch's own complaint about sizes is one line and says more than torch.export's
            module(images)
        except _TRACE_ERRORS as error:
            raise SpecError(f"the model does not take input_shape {input_shape}: {_first_line(error)}") from error
    raise UnsupportedOperator(f"torch.export cannot trace the model's forward pass: {_first_line(failure)}; "
                              "it must not depend on the data's values") from failure


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_before_decomposition(program: Any) -> None:
    """Refuses the arguments that decomposition or TVM's importer drops without a word."""
    for node in program.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or not hasattr(node.target, "_schema"):
            continue
        given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args)) | dict(node.kwargs)
        if "dropout" in name and given.get("p", 0) > 0:
            raise dropout_error(given["p"], _place(node))
        if name.startswith(("add.", "add_.")) and given.get("alpha", 1) != 1:
            raise unsupported(f"add with alpha={given['alpha']}", _place(node))
        if name.startswith("avg_pool2d") and given.get("divisor_override") is not None:
            raise unsupported(f"avg_pool2d with divisor_override={given['divisor_override']}", _place(node))


def _place(node: Any) -> str:
    """Where an operator is called: "in layer 'features.3' (GELU)"; "" for torch.fx nodes without a module."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"in layer {path!r} ({kind.rsplit('.', 1)[-1]})" if path else f"in the model's own forward ({kind.rsplit('.', 1)[-1]})"


def _to_relax(program: Any) -> tuple[Any, dict[str, str]]:
    """The Relax main function of the decomposed program, and the place in the model of each variable.

    The program's signature is changed: its buffers are parameters afterwards.
    """
    from torch.export.graph_signature import InputKind
    from tvm.relax.frontend.torch import from_exported_program
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    # The importer keeps parameters as inputs and turns buffers into constants without a name. The running statistics are ours to
    # update, so they go in as parameters. Non-persistent buffers are not state and stay constants.
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.BUFFER and spec.persistent and program.state_dict[spec.target].is_floating_point():
            spec.kind = InputKind.PARAMETER

    places: dict[str, str] = {}

    def remember(name):
        def convert(node, importer):
            if not hasattr(importer, "unwrapped"):
                importer.unwrapped = importer.create_convert_map()
            value = importer.unwrapped[name](node)
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if hasattr(item, "name"):
                    places.setdefault(item.name, _place(node))
            return value

        return convert

    known = ExportedProgramImporter().convert_map
    called = {node.target.__name__: node for node in program.graph.nodes if node.op == "call_function"}
    for name, node in called.items():
        if name not in known:
            raise unsupported(name.split(".")[0], _place(node))
    try:
        module = from_exported_program(program, keep_params_as_input=True, run_ep_decomposition=False,
                                       custom_convert_map={name: remember(name) for name in called})
    except (ValueError, TypeError, AssertionError, KeyError, NotImplementedError, RuntimeError) as error:
        raise UnsupportedOperator(f"TVM cannot import the model: {_first_line(error)}") from error
    return module["main"], places

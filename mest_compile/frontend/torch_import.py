"""torch.nn.Module -> ForwardGraph, through torch.export and TVM's Relax importer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base.errors import SpecError, UnsupportedOperator
from mest_compile.frontend.refusals import Origin, Refusals, check_finite
from mest_compile.frontend.relax_graph import read_main
from mest_compile.frontend.torch_checks import (
    check_before_decomposition,
    check_float32,
    check_inputs,
    check_module,
    check_unchanged,
    freeze,
    place,
    read_state,
    unwrapped,
)
from mest_compile.frontend.torch_cuts import CUT, DROP, marked
from mest_compile.frontend.torch_inputs import taking
from mest_compile.frontend.torch_trace import check_training
from mest_compile.ir.graph import ForwardGraph

if TYPE_CHECKING:
    import torch

_TRACE_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError)
_CONVERTER_ERRORS = (ValueError, TypeError, AssertionError, LookupError, AttributeError, RuntimeError)


def read_module(
    module: torch.nn.Module,
    input_shape: tuple[int, ...],
    several: tuple[tuple[int, ...], ...],
    output: str | int | None,
    refusals: Refusals,
) -> tuple[ForwardGraph, dict[str, np.ndarray]]:
    """The module's forward pass and a copy of its state by torch name, with masks that are attached to it multiplied in
    (`torch_masks`). The module is left as it was.

    What trains is what torch would train: parameters say so by `requires_grad`, BatchNorms by their mode, where the
    model's parts are not all in one, and forward by where it cuts the gradient.

    input_shape  (N, C, H, W), (N, C, L) or (N, features)
    several      shapes of several inputs, which are features (N, F) then; none where there is one
    output       name or number of the value that is the logits, of several; what only others need is not looked at
    Parameters and statistics that the graph uses are float32; what it does not use is of any type.
    refusals     where goes what cannot be trained, as far as the rest can be read without it
    Raises UnsupportedOperator, SpecError.
    """
    from mest_compile.frontend.torch_masks import plainly

    if not several:
        check_inputs(unwrapped(module))
    with plainly(unwrapped(module)), taking(unwrapped(module), several or (input_shape,), bool(several), output):
        graph, state = _read(module, input_shape, refusals, output is not None)
    return replace(graph, inputs=tuple(shape[1:] for shape in several)), state


def _read(
    module: torch.nn.Module, input_shape: tuple[int, ...], refusals: Refusals, chosen: bool
) -> tuple[ForwardGraph, dict[str, np.ndarray]]:
    check_module(module, refusals)
    module = unwrapped(module)
    state = read_state(module)
    with _kept_as_it_was(module), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 warns about its own pytree classes
        warnings.filterwarnings("ignore", "The tensor attribute")  # and about its own recurrent layers
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)  # which are put back
        module.eval()
        with marked(module):
            program = _export(module, input_shape, state)
        check_before_decomposition(program, state, refusals)
        program = program.run_decompositions(_decompositions())
        with refusals.noted():
            check_unchanged(program)
    evaluating, drops = set[str](), list[bool]()
    with _kept_as_it_was(module), refusals.noted():
        evaluating, drops = check_training(module, input_shape, chosen)
    function, origins = _to_relax(program, dict(enumerate(drops)))
    parameters = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target in state}
    graph, _ = read_main(function, parameters, {name: array.shape for name, array in state.items()}, origins, refusals)
    check_finite(graph, state)
    return freeze(graph, module, evaluating), state


@contextmanager
def _kept_as_it_was(module: torch.nn.Module) -> Iterator[None]:
    """Modes may change for a while, and forward may note what it likes, also in dictionaries that a part has;
    afterwards every submodule is what it was."""
    before = [(part, dict(vars(part))) for part in module.modules()]
    held = [(one, dict(one)) for _, attributes in before for one in attributes.values() if isinstance(one, dict)]
    try:
        yield
    finally:
        module.train(before[0][1]["training"])  # a module's own train() may do more than set the flag
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)
        for one, entries in held:
            one.clear()
            one.update(entries)


def _export(module: torch.nn.Module, input_shape: tuple[int, ...], state: Mapping[str, np.ndarray]) -> Any:
    import torch

    with torch.inference_mode(False):
        images = torch.zeros(input_shape, dtype=torch.float32, device="cpu")
        try:
            with torch.enable_grad():  # off, where forward turns them off
                return torch.export.export(module, (images,))
        except _TRACE_ERRORS as error:
            failure = error
        check_float32(state, state)
        try:  # torch's own complaint about sizes is one line and says more than torch.export's
            with torch.no_grad():
                module(images)
        except _TRACE_ERRORS as error:
            raise SpecError(f"the model does not take input_shape {input_shape}: {_first_line(error)}") from error
    raise UnsupportedOperator(
        f"torch.export cannot trace the model's forward pass: {_first_line(failure)}; "
        "it must not depend on the data's values"
    ) from failure


def _decompositions() -> Any:
    """Torch's, without those of operators that are converted whole."""
    import torch

    from mest_compile.frontend.torch_converters import WHOLE

    table = torch.export.default_decompositions()
    for name in WHOLE:
        operator, overload = name.split(".")
        table.pop(getattr(getattr(torch.ops.aten, operator), overload))
    return table


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _to_relax(program: Any, drops: Mapping[int, bool]) -> tuple[Any, dict[str, Origin]]:
    """The Relax main function of the decomposed program, and where each variable is from.

    What the importer does not take is a call of a function that there is none of, which no reader reads.
    drops  whether each dropout drops while the model trains, as far as that is known
    The program's signature is changed: its buffers are parameters afterwards.
    """
    from torch.export.graph_signature import InputKind
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    from mest_compile.frontend.torch_constants import folded
    from mest_compile.frontend.torch_converters import converters

    # The importer keeps parameters as inputs and turns buffers into constants without a name. The running statistics
    # are ours to update, so they go in as parameters. Non-persistent buffers are not state and stay constants.
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.BUFFER and spec.persistent and program.state_dict[spec.target].is_floating_point():
            spec.kind = InputKind.PARAMETER

    constants = folded(program)
    origins: dict[str, Origin] = {}
    unwrapped: dict[str, Any] = {}  # conversions

    def remember(name: str) -> Callable[[Any, Any], Any]:
        def convert(node: Any, importer: Any) -> Any:
            if node.name in constants:
                return relax.const(constants[node.name].numpy())
            if not unwrapped:
                unwrapped.update(importer.create_convert_map() | converters(importer, constants))
            trouble = ""
            try:
                value = unwrapped[name](node) if name in unwrapped else _nothing(node, importer)
            except _CONVERTER_ERRORS as error:
                value, trouble = _nothing(node, importer), f"TVM: {_first_line(error)}"
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, relax.Var):
                    origin = Origin(place(node), *_called(node), trouble)
                    origins.setdefault(item.name, origin)
            return value

        return convert

    def cut(node: Any, importer: Any) -> Any:
        return importer.block_builder.emit(relax.op.grad.no_grad(importer.env[node.args[0]]))

    def drop(node: Any, importer: Any) -> Any:
        source, p, name, number = node.args
        value = importer.env[source]
        if not drops.get(number, True):
            return value
        dropped = importer.block_builder.emit(relax.op.nn.dropout(value, p))
        origins[dropped.name] = Origin(place(node), name, True)
        return importer.block_builder.emit(relax.TupleGetItem(dropped, 0))

    own = {CUT: cut, DROP: drop}
    names = {node.target.__name__ for node in program.graph.nodes if node.op == "call_function"}
    try:
        module = from_exported_program(
            program,
            keep_params_as_input=True,
            run_ep_decomposition=False,
            custom_convert_map={name: remember(name) for name in names} | own,
        )
    except _CONVERTER_ERRORS as error:
        raise UnsupportedOperator(f"TVM cannot import the model: {_first_line(error)}") from error
    return module["main"], origins


def _nothing(node: Any, importer: Any) -> Any:
    """A value of the type of torch's, from what that is made of, that nothing makes."""
    from tvm import relax

    sources = [importer.env[source] for source in node.all_input_nodes]
    return importer.block_builder.emit(
        relax.op.call_pure_packed(
            "unknown", *[one for one in sources if isinstance(one, relax.Expr)], ty_args=_type(node.meta.get("val"))
        )
    )


def _type(value: Any) -> Any:
    from tvm import relax

    if isinstance(value, tuple | list):
        return relax.TupleType([_type(item) for item in value])
    return relax.TensorType([int(size) for size in value.shape], str(value.dtype).removeprefix("torch."))


def _called(node: Any) -> tuple[str, bool]:
    """(the operator that the author of the model called, whether `node` is one of several that it was decomposed
    into)."""
    made = node.target.__name__.split(".")[0]
    sources = node.meta.get("from_node") or []
    target = str(sources[0].target).split(".") if sources else []
    called = target[1].rstrip("_") if target[:1] == ["aten"] else made
    return called, called != made

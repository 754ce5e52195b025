"""What a torch module asks for that the exported graph does not show: honoured, or refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base.errors import SpecError, UnsupportedOperator
from mest_compile.frontend.refusals import Refusals, dropout_error, unsupported
from mest_compile.frontend.torch_cuts import RECURRENT
from mest_compile.ir.graph import BUFFER, CUT, FLAG, STATISTICS, ForwardGraph

if TYPE_CHECKING:
    import torch

_HOOKS = {
    "_forward_pre_hooks": "forward-pre",
    "_forward_hooks": "forward",
    "_backward_pre_hooks": "backward-pre",
    "_backward_hooks": "backward",
}
# What is not trained may be of these types, which a checkpoint can hold.
KEPT = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


def unwrapped(model: Any) -> Any:
    """The module inside torch.compile, DataParallel and DistributedDataParallel, which do not change what it
    computes."""
    import torch

    while isinstance(model, torch.nn.Module):
        if type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            break
    return model


def check_module(module: torch.nn.Module, refusals: Refusals) -> None:
    """Refuses what cannot be read at all, and what would not run in a compiled step. Raises SpecError,
    UnsupportedOperator."""
    import torch

    if isinstance(module, torch.fx.GraphModule) and "train" in vars(module):  # torch.export puts one there that raises
        raise SpecError(
            "the model is a module of an ExportedProgram, which keeps the mode it was exported in: pass the "
            "module that it was "
            "exported from"
        )
    owners: dict[int, str] = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        if torch.nn.parameter.is_lazy(tensor):
            raise SpecError(f"{name} has no values yet, its module is lazy: call the model once on an example")
        if tensor.is_meta:
            raise SpecError(
                f"{name} is on the meta device and has no values: load the weights first (to_empty, load_state_dict)"
            )
    for name, part in module.named_modules():
        here = f"layer {name!r}" if name else "the model"
        if isinstance(part, torch.jit.ScriptModule):
            raise SpecError(
                f"{here} is a ScriptModule, whose Python source is gone: pass the module that it was made from"
            )
        if (
            isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
            and part.track_running_stats
            and part.momentum is None
        ):
            what = "batch_norm with momentum=None (a cumulative average)"
            refusals.add(unsupported(what, f"in layer {name!r}", "batch_norm"))
        for hooks, kind in _HOOKS.items():
            if found := getattr(part, hooks, None):
                raise _hook_error(kind, here, next(iter(found.values())))
    for hooks, kind in _HOOKS.items():
        if found := getattr(torch.nn.modules.module, f"_global{hooks}", None):
            raise _hook_error(f"global {kind}", "every module", next(iter(found.values())))
    for name, tensor in module.named_parameters():
        for hooks, kind in (("_backward_hooks", "gradient"), ("_post_accumulate_grad_hooks", "post-accumulate-grad")):
            if found := getattr(tensor, hooks, None):
                raise _hook_error(kind, name, next(iter(found.values())))
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = owners.setdefault(
            parameter.data_ptr() or id(parameter), name
        )  # another Parameter may lie in the same memory
        if other != name:
            raise UnsupportedOperator(
                f"{other} and {name} are one parameter; shared weights cannot be trained here: give each layer its own"
            )


def check_inputs(module: torch.nn.Module) -> None:
    """Raises SpecError where forward cannot do without a second input."""
    import torch

    if not isinstance(module, torch.nn.Module) or isinstance(module, torch.jit.ScriptModule):
        return
    wanted = [
        one.name
        for one in inspect.signature(module.forward).parameters.values()
        if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    if len(wanted) > 1:
        raise SpecError(
            f"input_shape is of one input, and the model's forward takes {len(wanted)}: {', '.join(wanted)}; give a "
            "shape for each: ((N, C, H, W), (N, features))"
        )


def _hook_error(kind: str, where: str, hook: Any) -> UnsupportedOperator:
    called = getattr(hook, "__qualname__", type(hook).__name__)
    return UnsupportedOperator(
        f"{where} has a {kind} hook ({called}), which a compiled step would not call: remove it first "
        "(its handle's remove(), remove_weight_norm)"
    )


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`state_dict()` without what is no tensor."""
    import torch

    return {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}


def read_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of what `read_state` reads."""
    return {name: tuple(tensor.shape) for name, tensor in _tensors(module).items()}


def read_state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Copies of all parameters and buffers in `state_dict()` order, each in its own type. Raises SpecError."""
    import torch

    state = {}
    for name, tensor in _tensors(module).items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout is not torch.strided or kind not in KEPT:
            kind = kind if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.")
            raise SpecError(
                f"float32 parameters are wanted, {name} is {kind}: call model.float(), or make it dense float32"
            )
        state[name] = tensor.detach().cpu().numpy().copy()
    return state


def check_float32(state: Mapping[str, np.ndarray], names: Iterable[str]) -> None:
    """Raises SpecError when one of these has another floating point type."""
    for name in names:
        if state[name].dtype.kind == "f" and state[name].dtype != np.float32:
            raise SpecError(f"float32 parameters are wanted, {name} is {state[name].dtype}: call model.float()")


def freeze(graph: ForwardGraph, module: torch.nn.Module, evaluating: Set[str]) -> ForwardGraph:
    """The graph with what torch does not train said in `frozen`, and its BatchNorms in evaluation mode.

    evaluating  running means of these
    Raises UnsupportedOperator.
    """
    parameters = dict(module.named_parameters())
    for step in graph.prepared:
        if step.operand in parameters and parameters[step.operand].requires_grad:
            raise UnsupportedOperator(
                f"{step.operand} normalises the input and is a parameter, which torch trains and a step does not: make "
                "it a buffer, or call requires_grad_(False) on it"
            )
    for node in graph.nodes:
        for role in STATISTICS:
            if (name := node.params.get(role)) in parameters:
                raise unsupported(f"{name}, a parameter, as batch_norm's {role}")
    nodes = tuple(
        replace(node, attrs={**node.attrs, "evaluating": True})
        if node.params.get("running_mean") in evaluating
        else node
        for node in graph.nodes
    )
    told = _told(graph)
    frozen = {}
    for name, node in graph.parameters().items():
        if name not in parameters:
            frozen[name] = BUFFER
        elif name in graph.frozen or node.name not in told:
            frozen[name] = CUT
        elif not parameters[name].requires_grad:
            frozen[name] = FLAG
    return replace(graph, nodes=nodes, frozen=frozen)


def _told(graph: ForwardGraph) -> set[str]:
    """Names of the nodes that the loss sends a gradient to, if anything there trains."""
    found = {graph.nodes[-1].name}
    for node in reversed(graph.nodes):
        if node.name in found and node.op != "detach":
            found.update(node.inputs)
    return found


def check_before_decomposition(program: Any, state: Mapping[str, np.ndarray], refusals: Refusals) -> None:
    """Refuses the arguments that decomposition or TVM's importer drops without a word. Raises SpecError."""
    import torch

    def refuse(operator: str, more: str, node: Any) -> None:
        refusals.add(unsupported(operator + more, place(node), operator))

    needed = _needed(program.graph)
    used = {node.name for node in needed if node.op == "placeholder"}
    check_float32(
        state,
        [spec.target for spec in program.graph_signature.input_specs if spec.arg.name in used and spec.target in state],
    )
    for node in program.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        operation = name.split(".")[0].rstrip("_")
        given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args)) | dict(node.kwargs)
        if "dropout" in name:
            if given.get("p", 0) > 0:
                refusals.add(dropout_error(given["p"], place(node)))
        elif (
            torch.Tag.nondeterministic_seeded in node.target.tags
            and node in needed
            and "attention" not in name
            and operation not in RECURRENT
        ):
            refuse(name.split(".")[0], ", which draws random numbers,", node)
        if operation in ("add", "sub", "rsub") and given.get("alpha", 1) != 1:
            refuse(operation, f" with alpha={given['alpha']}", node)
        if operation == "selu":
            refuse("selu", "", node)
        if operation == "pad" and given.get("mode", "constant") != "constant":
            refuse("pad", f" with mode={given['mode']!r}", node)
        if operation.endswith("_aa"):
            refuse(operation.strip("_").removesuffix("_aa"), " with antialias=True", node)
        if name.startswith("avg_pool2d") and given.get("divisor_override") is not None:
            refuse("avg_pool2d", f" with divisor_override={given['divisor_override']}", node)
        if name.startswith("max_pool2d") and not given.get("stride"):
            _set_argument(node, "stride", given["kernel_size"])  # torch's default; TVM takes it for an empty list


def check_unchanged(program: Any) -> None:
    """Raises UnsupportedOperator when forward itself changes a buffer or parameter of the decomposed program."""
    changed = [
        *program.graph_signature.buffers_to_mutate.values(),
        *program.graph_signature.parameters_to_mutate.values(),
    ]
    if changed:
        raise UnsupportedOperator(
            f"forward changes {changed[0]}, which a compiled step would not: change it outside of forward"
        )


def _set_argument(node: Any, name: str, value: Any) -> None:
    place = [argument.name for argument in node.target._schema.arguments].index(name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def _needed(graph: Any) -> set[Any]:
    """The nodes that the output depends on, with all that write in place."""
    pending = [
        node
        for node in graph.nodes
        if node.op == "output" or getattr(node.target, "__name__", "").split(".")[0].endswith("_")
    ]
    needed = set(pending)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                pending.append(source)
    return needed


def place(node: Any) -> str:
    """Where an operator is called: "in layer 'features.3' (GELU)"; "" for torch.fx nodes without a module."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    return (
        f"in layer {path!r} ({kind.rsplit('.', 1)[-1]})"
        if path
        else f"in the model's own forward ({kind.rsplit('.', 1)[-1]})"
    )

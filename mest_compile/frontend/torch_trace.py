"""One forward pass in evaluation and one in training mode, on tensors without values, and what differs between them.

Import reads the forward pass of evaluation mode and trains it; so both passes must make the same calls on the same
values and cut the gradient at the same ones, BatchNorm's choice of statistics aside.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mest_compile.base.errors import UnsupportedOperator
from mest_compile.frontend.torch_attention import written_out
from mest_compile.frontend.torch_cuts import CUTS, DROPOUTS, RECURRENT, dropping, name_of
from mest_compile.frontend.torch_depth import shown
from mest_compile.frontend.torch_inputs import names_of

if TYPE_CHECKING:
    import torch

_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")


@dataclass(frozen=True)
class Called:
    """A call of torch's Python functions.

    arguments  tensors as the names of parameters and buffers or the numbers of the calls that made them, everything
               else as it is
    sources    numbers of the calls whose results it takes
    cut        whether it lets no gradient through to a parameter
    training   batch_norm's: whether it normalises with the batch's statistics; None for any other function
    mean       batch_norm's: name of its running mean
    drops      dropout's: whether it drops
    """

    name: str
    where: str
    arguments: str
    sources: tuple[int, ...]
    cut: bool
    training: bool | None = None
    mean: str = ""
    drops: bool = False


def check_training(
    module: torch.nn.Module, input_shape: tuple[int, ...], chosen: bool = False
) -> tuple[set[str], list[bool]]:
    """(running means of the BatchNorms that are in evaluation mode while the model trains, whether each dropout drops,
    in the order of their calls): by the modes of the model's parts where these differ, else by what its own train()
    leaves them in.

    chosen  the result is one of several values: only calls that it needs count
    Raises UnsupportedOperator when training mode computes anything else than evaluation mode, or a gradient is changed.
    """
    python, numpy = random.getstate(), np.random.get_state()
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    evaluated, evaluated_needed, _, told = _forward(module, input_shape)
    if len({training for _, training in modes}) == 1:
        module.train()
    else:
        for part, training in modes:
            part.training = training
    trained, needed, functions, also_told = _forward(module, input_shape)
    if random.getstate() != python or any(
        np.any(now != then) for now, then in zip(np.random.get_state(), numpy, strict=True)
    ):
        raise UnsupportedOperator(
            "forward draws random numbers in Python, which a compiled step would not: take them out"
        )
    for call in trained + evaluated:
        if call.name in _HOOKS:
            raise UnsupportedOperator(
                f"{call.name} {call.where}: a compiled step would not call that hook; take it out of forward"
            )
    if functions:
        raise UnsupportedOperator(
            f"forward uses {functions[0]}, whose own backward would not be used: write it with torch's operators"
        )
    for number in sorted(needed):
        call = trained[number]
        if call.cut and _in_place(call.name):
            raise UnsupportedOperator(
                f"{call.name} {call.where} cuts the gradient of a value in its place, which is not supported: use "
                f"{call.name.strip('_')} instead"
            )
    if len(also_told) > max(len(told), 1):
        names = ", ".join(map(str, also_told))
        raise UnsupportedOperator(
            f"in training mode the model gives {len(also_told)} values ({names}), in evaluation {max(len(told), 1)}: "
            f"auxiliary heads; compile with output={also_told[0]!r} to train by that one alone, or build the model "
            "without them (aux_logits=False)"
        )
    dropouts = [number for number, call in enumerate(evaluated) if call.name in DROPOUTS]
    pairs = dict(zip(sorted(evaluated_needed), sorted(needed), strict=False))
    drops = {number: trained[pairs[number]].drops for number in dropouts if number in pairs}
    if chosen:
        evaluated, trained = _only(evaluated, evaluated_needed), _only(trained, needed)
    for call, other in zip(trained, evaluated, strict=False):
        if (call.name, call.arguments) != (other.name, other.arguments):
            raise _difference(
                f"{call.name} {call.where} where evaluation does {other.name} {other.where}"
                if call.name != other.name
                else f"{call.name} {call.where} with other arguments than in evaluation"
            )
        if call.cut != other.cut:
            raise _difference(f"{call.name} {call.where} with its gradient {'cut' if call.cut else 'not cut'}")
    if more := trained[len(evaluated) :]:
        raise _difference(f"{more[0].name} {more[0].where}, which evaluation does not")
    if more := evaluated[len(trained) :]:
        raise _difference(f"no {more[0].name} {more[0].where}, which evaluation does")
    evaluating = {call.mean for call in trained if call.training is False}
    if chosen:
        return evaluating, [drops.get(number, False) for number in dropouts]
    return evaluating, [call.drops for call in trained if call.name in DROPOUTS]


def _only(calls: list[Called], needed: set[int]) -> list[Called]:
    """Calls of those numbers, numbered anew."""
    turns = {number: turn for turn, number in enumerate(sorted(needed))}

    def renamed(found: re.Match[str]) -> str:
        return f"'{turns.get(int(found[1]), found[1])} "

    return [replace(calls[number], arguments=re.sub(r"'(\d+) ", renamed, calls[number].arguments)) for number in turns]


def _in_place(name: str) -> bool:
    """Of "add_" and "__iadd__"."""
    return name.startswith("__i") if name.startswith("__") else name.endswith("_")


def _difference(what: str) -> UnsupportedOperator:
    return UnsupportedOperator(
        f"in training mode the model does {what}; a forward pass that differs by more than BatchNorm's statistics "
        "is not supported: take the branch on self.training out"
    )


def _forward(
    module: torch.nn.Module, input_shape: tuple[int, ...]
) -> tuple[list[Called], set[int], list[str], list[str | int]]:
    """(calls of a pass in the module's present mode, numbers of those that the result depends on, custom autograd
    functions in it, names or numbers of the values that it gives, none where it is one)."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = {name: fake.from_tensor(tensor) for name, tensor in tensors.items()}
        images = fake.from_tensor(torch.zeros(input_shape, dtype=torch.float32, device="cpu"))
        with shown(module), written_out(module), _watched(module) as stack:
            recorder = _recorder(stack, {id(value): name for name, value in values.items()} | {id(images): "input"})
            try:
                with fake, recorder:
                    result = torch.func.functional_call(module, values, (images,))
            except Exception as error:  # whatever the model's own code raises
                mode = "training" if module.training else "evaluation"
                line = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise UnsupportedOperator(
                    f"the forward pass in {mode} mode cannot be traced {_where(stack)}, {type(error).__name__}: "
                    f"{line}; it must not depend on the data's values or on chance"
                ) from error
    return recorder.calls, recorder.needed(result), _own_functions(result), names_of(result)


def _recorder(stack: list[tuple[str, str]], names: dict[int, str]) -> Any:
    """A TorchFunctionMode that notes every call; stack: of modules that are being called, innermost last."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_leaves

    class Recorder(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Called] = []
            self.makers: dict[int, int] = {}  # id of a tensor -> number of the call that made or last changed it
            self.alive: list[Any] = []  # so that no id is given twice

        def __torch_function__(
            self, function: Any, types: Any, arguments: tuple = (), named: dict[str, Any] | None = None
        ) -> Any:
            name = name_of(function)
            named, training, mean = dict(named or {}), None, ""
            tensors = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, torch.Tensor)]
            if name == "_set_grad_enabled" or (
                name == "add_" and not tensors[0].is_floating_point() and tensors[0].dim() == 0
            ):
                return function(*arguments, **named)  # BatchNorm counts its batches
            if name == "batch_norm":
                training, arguments, named = _evaluating(arguments, named)
                mean = names.get(id(arguments[1] if len(arguments) > 1 else named.get("running_mean")), "")
            if name == "multi_head_attention_forward" and not _attention_dropout(arguments, named):
                named = {**named, "training": False}  # which decides about dropout alone
            if name in RECURRENT:  # the converter reads its dropout
                arguments = (*arguments[:6], False, *arguments[7:])
            cut = any(tensor.requires_grad for tensor in tensors) and (name in CUTS or not torch.is_grad_enabled())
            drops = False
            shown = "" if name in DROPOUTS else repr(tuple(self.show(leaf) for leaf in tree_leaves((arguments, named))))
            if name in DROPOUTS:  # which may give back what it was given, or not
                value, _, drops, in_place = dropping(arguments, named)
                result = value if in_place or name.endswith("_") else value.clone()
            else:
                result = function(*arguments, **named)
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            if made or name in _HOOKS:
                sources = tuple(self.makers[id(tensor)] for tensor in tensors if id(tensor) in self.makers)
                for tensor in made:
                    self.makers[id(tensor)] = len(self.calls)
                self.alive += made
                self.calls.append(Called(name, _where(stack), shown, sources, cut, training, mean, drops))
            return result

        def show(self, leaf: Any) -> str:
            if not isinstance(leaf, torch.Tensor):
                return repr(leaf) if isinstance(leaf, bool | int | float | str | None) else type(leaf).__name__
            maker = self.makers.get(id(leaf))
            return f"{names.get(id(leaf), 'constant') if maker is None else maker} {tuple(leaf.shape)}"

        def needed(self, result: Any) -> set[int]:
            pending = [self.makers[id(leaf)] for leaf in tree_leaves(result) if id(leaf) in self.makers]
            found = set(pending)
            while pending:
                for source in self.calls[pending.pop()].sources:
                    if source not in found:
                        found.add(source)
                        pending.append(source)
            return found

    return Recorder()


def _evaluating(arguments: tuple, named: dict[str, Any]) -> tuple[bool, tuple, dict[str, Any]]:
    """(whether batch_norm was asked to train, its arguments without that): a batch of one value a channel has a shape
    all the same."""
    place = 5  # of F.batch_norm and of torch.batch_norm
    training = bool(named.get("training", arguments[place] if len(arguments) > place else False))
    statistics = arguments[1] if len(arguments) > 1 else named.get("running_mean")
    if statistics is None:
        return training, arguments, named
    if len(arguments) > place:
        return training, (*arguments[:place], False, *arguments[place + 1 :]), named
    return training, arguments, {**named, "training": False}


def _attention_dropout(arguments: tuple, named: dict[str, Any]) -> float:
    """The p of F.multi_head_attention_forward."""
    place = 10
    return float(arguments[place] if len(arguments) > place else named.get("dropout_p", 0.0))


@contextmanager
def _watched(module: torch.nn.Module) -> Iterator[list[tuple[str, str]]]:
    """The stack of (path, class name) of the modules that are being called."""
    stack: list[tuple[str, str]] = []

    def entering(facts: tuple[str, str]) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            stack.append(facts)

        return enter

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, part in module.named_modules():
        handles += [
            part.register_forward_pre_hook(entering((name, type(part).__name__))),
            part.register_forward_hook(leave),
        ]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _where(stack: list[tuple[str, str]]) -> str:
    if not stack or not stack[-1][0]:
        return "in the model's own forward"
    return f"in layer {stack[-1][0]!r} ({stack[-1][1]})"


def _own_functions(result: Any) -> list[str]:
    """Names of the torch.autograd.Functions that gradients of the result go through."""
    import torch
    from torch.utils._pytree import tree_leaves

    pending = [leaf.grad_fn for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    seen, found = set(), []
    while pending:
        function = pending.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if isinstance(function, torch.autograd.function.BackwardCFunction):
            found.append(type(function).__name__.removesuffix("Backward"))
        pending += [source for source, _ in function.next_functions]
    return found

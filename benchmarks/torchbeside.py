"""Steps of a torch net for benchmarks/coverage.py, and how near ours are to them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np

RULE = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3}
AS_GOOD, TOLERANCE, MOST = 10.0, 1e-3, 0.3  # times torch's own error in float32, an error that is none, one that is
FEW_LOST = 0.1  # share of tensors
NOISY, ROUNDING, AS_NOISY = 12, 2**-23, 2.0  # runs at most, of a tensor's root mean square, times the largest error


def torchs(
    net: Any, start: Any, masks: Any, graph: Any, batches: Any, numbers: bool, kind: Any, noise: int | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Torch's ({parameter: gradient of the first batch}, {tensor: what a step of every batch changed}), float64, of a
    net in a type. noise: seed of what is added to all that a module gives, as large as float32's roundings."""
    import torch

    twin = copy.deepcopy(net).to(kind)
    twin.load_state_dict({name: torch.from_numpy(array) for name, array in start.items()})
    if noise is not None:
        draw = torch.Generator().manual_seed(noise)

        def rounded(part: Any, given: Any, made: Any) -> Any:
            if not (isinstance(made, torch.Tensor) and made.is_floating_point()):
                return made
            size = ROUNDING * made.detach().square().mean().sqrt()
            return made + size * (2 * torch.rand(made.shape, generator=draw) - 1)

        for part in twin.modules():
            if not any(part.children()):
                part.register_forward_hook(rounded)
    optimizer = torch.optim.SGD(twin.parameters(), **RULE)
    gradients: dict[str, np.ndarray] = {}
    for update, (inputs, labels) in enumerate(batches, start=1):
        optimizer.zero_grad()
        with dropping(twin, graph, update):
            output = twin(*(torch.from_numpy(one).to(kind) for one in inputs))
        output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        lossy = torch.nn.functional.mse_loss if numbers else torch.nn.functional.cross_entropy
        wanted = torch.from_numpy(labels).to(output.dtype if numbers else torch.int64)
        lossy(output, wanted.reshape(output.shape) if numbers else wanted).backward()
        trained = {name: one.grad for name, one in twin.named_parameters() if one.grad is not None}
        for name in masks.keys() & trained.keys():
            trained[name] *= torch.from_numpy(masks[name])
        gradients = gradients or {name: one.double().numpy().copy() for name, one in trained.items()}
        optimizer.step()
    return gradients, {name: one.double().numpy() - start[name] for name, one in twin.state_dict().items()}


def worst(ours: Any, theirs: Any, exact: Any, noisy: Any = ()) -> tuple[str, float, float, float]:
    """(tensor, error of ours, of theirs, allowed) of the one whose error is most of what is allowed it. noisy: what
    theirs may as well have been, as roundings move numbers across a ReLU's jump or do not."""
    sizes = {name: np.linalg.norm(value) for name, value in exact.items()}
    least = 1e-4 * sum(sizes.values()) / sum(value.size**0.5 for value in exact.values())  # for an element: rounding
    errors = [{name: np.linalg.norm(one[name] - exact[name]) for name in exact} for one in (ours, theirs, *noisy)]
    usual = float(np.median([errors[1][name] / (size or 1) for name, size in sizes.items()]))
    small = {name: least * exact[name].size ** 0.5 for name in exact}
    found: list[tuple[str, float, float, float, float]] = []
    for name, exactly in sizes.items():
        mine, plain, *others = (one[name] / max(exactly, small[name]) for one in errors)
        reached = max(others, default=0.0)
        found.append((name, mine, max(plain, reached), AS_GOOD * max(plain, usual), AS_NOISY * reached))
    lost = {name for name, _, torchs, _, _ in found if torchs > MOST}  # torch has no digit of them: they say nothing
    few = len(lost) <= FEW_LOST * len(found)  # else it is an error but of those that are 0 but for rounding
    silent = {name for name in lost if few or sizes[name] < small[name]}

    def allowed(name: str, usually: float, noisily: float) -> float:
        if name in silent:
            return max(TOLERANCE, usually, noisily)
        return max(TOLERANCE, min(MOST, usually), 0 if name in lost else noisily)

    return max(
        ((name, mine, torchs, allowed(name, *rest)) for name, mine, torchs, *rest in found),
        key=lambda one: one[1] / one[3],
    )


@contextmanager
def dropping(net: Any, graph: Any, update: int) -> Iterator[None]:
    """Lets a torch module drop what our step drops at an update, counted from 1."""
    import torch

    from mest_compile.operators.dropout import WHOLE, draws, stays

    nodes = iter([node for node in graph.nodes if node.op == "dropout"])

    def drop(x: Any, *_: Any, **__: Any) -> Any:
        node = next(nodes)
        (draw,) = draws(graph, 0, update)[f"{node.name}:draw"]
        kept = stays(int(draw), node.shape, node.attrs["p"], node.attrs.get("whole", "element"))
        if kept.shape != x.shape and x.ndim == 2:  # features lie as channels of one pixel
            kept = kept.reshape(len(kept), -1)
        if kept.shape != x.shape and x.ndim == 3:  # tokens are pixels, of several series of an example row by row
            kept = np.moveaxis(kept, 1, -1).reshape(-1, *x.shape[1:])
        if kept.shape != x.shape:
            raise AssertionError(f"{node.name} drops of {node.shape}, torch of {tuple(x.shape)}")
        return x * torch.from_numpy(kept.copy()) / (1 - node.attrs["p"])

    def function(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return drop(x) if training and p else x

    def path(self: Any, x: Any) -> Any:
        return drop(x) if self.training and (getattr(self, "drop_prob", None) or getattr(self, "p", None)) else x

    kinds = {type(part) for part in net.modules() if type(part).__name__.endswith(("DropPath", "StochasticDepth"))}
    with ExitStack() as patches:
        for name in ("dropout", *WHOLE.keys() & set(dir(torch.nn.functional))):
            patches.enter_context(mock.patch.object(torch.nn.functional, name, function))
        for kind in kinds:
            patches.enter_context(mock.patch.object(kind, "forward", path))
        yield
    if left := [node.name for node in nodes]:
        raise AssertionError(f"torch did not drop at {left}")

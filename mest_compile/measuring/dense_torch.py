"""Dense torch's training step of a `Case`, in the ways that torch has of computing it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mest_compile.base.errors import UsageError
from mest_compile.measuring.case import PROGRAM, Built, Case
from mest_compile.operators.losses.cross_entropy import CrossEntropy
from mest_compile.operators.optimizers.sgd import SGD

if TYPE_CHECKING:
    import torch


def load_torch() -> None:
    import torch  # noqa: F401


def torch_model(case: Case) -> torch.nn.Module:
    """The case's model in training mode, with the weights that every contestant starts from."""
    import torch

    if Path(case.model, PROGRAM).is_file():
        return torch.export.load(Path(case.model, PROGRAM)).module()
    return case.network().train()


def build_torch(case: Case) -> Built:
    return Built(torch_step(torch_model(case), case, channels_last=True))


def build_torch_in_bfloat16(case: Case) -> Built:
    """Under autocast: convolutions and linear layers compute in bfloat16."""
    return Built(torch_step(torch_model(case), case, channels_last=True, autocast=True))


TORCHS = {
    "float32, channels_last": (True, False),
    "float32, contiguous": (False, False),
    "bfloat16 autocast, channels_last": (True, True),
    "bfloat16 autocast, contiguous": (False, True),
}
WARM_STEPS, TRIED_STEPS, TRYING_SECONDS = 2, 3, 12.0  # steps that take seconds are tried less often


def build_best_torch(case: Case) -> Built:
    """The fastest of `TORCHS` here, in the time that the process itself took, which others on the machine matter
    little to."""

    def spent(step: Callable[[], float]) -> float:
        start = time.process_time()
        step()
        return time.process_time() - start

    seconds = {}
    for name, (channels_last, autocast) in TORCHS.items():
        step = torch_step(torch_model(case), case, channels_last, autocast=autocast)
        tried: list[float] = []
        while len(tried) < WARM_STEPS + TRIED_STEPS and sum(tried) < TRYING_SECONDS:
            tried.append(spent(step))
        seconds[name] = min(tried[WARM_STEPS:] or tried[-1:])
    best = min(seconds, key=seconds.__getitem__)
    channels_last, autocast = TORCHS[best]
    step = torch_step(torch_model(case), case, channels_last, autocast=autocast)
    return Built(step, notes=(f"the fastest of {len(TORCHS)} ways of torch here: {best}",))


def build_torch_compile(case: Case) -> Built:
    import torch

    step = torch_step(torch_model(case), case, channels_last=True, wrap=torch.compile)
    step()  # compiles: part of the set-up
    return Built(step)


def torch_step(
    model: torch.nn.Module,
    case: Case,
    channels_last: bool,
    wrap: Callable[[Any], Any] = lambda model: model,
    autocast: bool = False,
) -> Callable[[], float]:
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(case.threads)
    numpy_images, numpy_labels = case.batch()
    images, labels = torch.from_numpy(numpy_images), torch.from_numpy(numpy_labels)
    if channels_last and images.dim() == 4:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    rule = usual_rule(case)
    optimizer = torch.optim.SGD(
        model.parameters(), rule.lr, rule.momentum, weight_decay=rule.weight_decay, nesterov=rule.nesterov
    )
    forward = wrap(model)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def usual_rule(case: Case) -> SGD:
    """The case's optimizer. Raises UsageError where it, or the loss, is none that the others have."""
    rule, loss = case.options.optimizer, case.options.loss
    if not isinstance(rule, SGD) or loss != CrossEntropy():
        raise UsageError(
            f"rivals are built with mest.SGD and cross-entropy, the case has {rule} and {loss}; leave them out"
        )
    return rule

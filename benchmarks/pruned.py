"""What pruned models gain: `python benchmarks/pruned.py measure` times whole steps of ResNets that torch has pruned in
turns with dense torch, and a step that is pruned while it trains, in results/pruned.json, and writes the tables of
docs/finetuning.md; without `measure` the tables alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from importlib import metadata
from time import perf_counter, process_time
from typing import Any

import documents
import numpy as np
import torch
from frozen import DOCUMENT
from run import RESULTS
from torch import nn
from torch.nn.utils import prune

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.measuring.benchmark import machine
from mest_compile.models.catalog import build_model

FILE = RESULTS / "pruned.json"
SHAPE, SPARSITY, ROUNDS, RATE = (64, 3, 32, 32), 0.95, 9, 0.01
MODELS = (("resnet20", 16), ("resnet32", 16), ("resnet32", 32))  # and channels of the first stage
GRADUAL, WAY = ("resnet32", 16), (0.0, 0.5, 0.75, 0.9, 0.95)


def layers(net: nn.Module) -> list[tuple[nn.Module, str]]:
    """The 3x3 convolutions but the first."""
    found = [part for part in net.modules() if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3)]
    return [(part, "weight") for part in found[1:]]


def globally(net: nn.Module) -> None:
    """The smallest weights of all layers together."""
    prune.global_unstructured(layers(net), prune.L1Unstructured, amount=SPARSITY)


def layer_by_layer(net: nn.Module) -> None:
    for part, name in layers(net):
        prune.l1_unstructured(part, name, amount=SPARSITY)


def in_blocks(net: nn.Module) -> None:
    """Of each layer the blocks of four output channels with the smallest norms, by a mask of one's own."""
    for part, name in layers(net):
        out, inputs, height, width = part.get_parameter(name).shape
        norms = part.get_parameter(name).detach().square().reshape(out // 4, 4, inputs, height, width).sum(1)
        keep = norms > norms.flatten().kthvalue(round(SPARSITY * norms.numel())).values
        prune.custom_from_mask(part, name, keep.repeat_interleave(4, 0).float())


PRUNED: dict[str, tuple[Callable[[nn.Module], None], str]] = {  # and the scheme that holds such masks
    "all layers together": (globally, "unstructured"),
    "layer by layer": (layer_by_layer, "unstructured"),
    "4x1 blocks": (in_blocks, "block"),
}


class Dense:
    """Dense torch on the same batch, channels_last."""

    def __init__(self, net: nn.Module, images: np.ndarray, labels: np.ndarray):
        torch.set_num_threads(1)
        self._net = deepcopy(net).to(memory_format=torch.channels_last).train()
        self._images = torch.from_numpy(images).to(memory_format=torch.channels_last)
        self._labels = torch.from_numpy(labels)
        self._rule = torch.optim.SGD(self._net.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)

    def __call__(self) -> None:
        self._rule.zero_grad()
        nn.functional.cross_entropy(self._net(self._images), self._labels).backward()
        self._rule.step()


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round of each, on the clock and of the processor."""
    found: dict[str, dict[str, list[float]]] = {name: {"clock": [], "processor": []} for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            clock, processor = perf_counter(), process_time()
            step()
            if turn > 1:
                found[name]["processor"].append(process_time() - processor)
                found[name]["clock"].append(perf_counter() - clock)
    return found


def batch(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape, np.float32), rng.integers(0, 10, shape[0])


def measure(model: str, width: int, shape: tuple[int, ...] = SHAPE, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds of each kind of pruned net and of dense torch, and whether a step keeps what it was given."""
    import mest_compile as mest

    net, (images, labels) = build_model(model, shape, 10, width), batch(shape)
    made, steps, same = {}, {"dense torch": Dense(net, images, labels)}, {}
    for name, (pruning, scheme) in PRUNED.items():
        pruned = deepcopy(net)
        pruning(pruned)
        made[name] = mest.compile(pruned, shape, scheme=scheme, sparsity="as-given", threads=1)
        given = {path: (part.weight_orig * part.weight_mask).detach().numpy() for path, part in _masked(pruned)}
        state = made[name].state_dict()
        same[name] = all((state[f"{path}.weight"] == weight).all() for path, weight in given.items())
        steps[name] = partial(made[name], images, labels, lr=RATE)
    seconds = in_turns(steps, rounds)
    return {
        "model": model,
        "width": width,
        "seconds": seconds,
        "sparsity": {name: _overall(step) for name, step in made.items()},
        "given_back_untrained": same,
        "weights_outside_after_training": {name: _outside(step) for name, step in made.items()},
    }


def measure_gradual(shape: tuple[int, ...] = SHAPE, rounds: int = ROUNDS, way: Sequence[float] = WAY) -> dict[str, Any]:
    """Seconds of a step as it is pruned, in turns with dense torch, and of one that was compiled at its end."""
    import mest_compile as mest

    model, width = GRADUAL
    net, (images, labels) = build_model(model, shape, 10, width), batch(shape)
    options: dict[str, Any] = {"scheme": "block", "sparsity": way[-1], "threads": 1}
    step, dense, found = mest.compile(net, shape, dense_start=True, **options), Dense(net, images, labels), {}
    for share in way:
        step.prune(share)
        found[str(share)] = in_turns({"dense torch": dense, "gradual": partial(step, images, labels, lr=RATE)}, rounds)
    compiled = mest.compile(net, shape, **options).masks()
    same = all(mask.sum() == compiled[name].sum() for name, mask in step.masks().items())
    return {"model": model, "width": width, "seconds": found, "as_sparse_as_compiled": same}


def _masked(net: nn.Module) -> list[tuple[str, Any]]:
    return [(path, part) for path, part in net.named_modules() if hasattr(part, "weight_mask")]


def _overall(step: Any) -> float:
    masks = step.masks().values()
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.size for mask in masks)


def _outside(step: Any) -> int:
    state = step.state_dict()
    return sum(int(np.count_nonzero(state[name][~mask])) for name, mask in step.masks().items())


def ratio(seconds: dict[str, dict[str, list[float]]], ours: str, clock: str) -> float:
    """How many times as fast as dense torch, the median of the rounds."""
    pairs = zip(seconds["dense torch"][clock], seconds[ours][clock], strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs)


def table(results: dict[str, Any]) -> str:
    """Markdown."""

    def milliseconds(one: dict[str, dict[str, list[float]]], name: str) -> float:
        return statistics.median(one[name]["processor"]) * 1e3

    lines = [
        "| model | pruned | ms a step | dense torch | times as fast | by the clock |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model in results["models"]:
        one = model["seconds"]
        for name in PRUNED:
            lines.append(
                f"| {model['model']}, width {model['width']} | {name} | {milliseconds(one, name):.1f} | "
                f"{milliseconds(one, 'dense torch'):.1f} | {ratio(one, name, 'processor'):.2f} | "
                f"{ratio(one, name, 'clock'):.2f} |"
            )
    gradual = results["gradual"]
    for share, one in gradual["seconds"].items():
        lines.append(
            f"| {gradual['model']}, width {gradual['width']} | gradually, 4x1 blocks, at {share} | "
            f"{milliseconds(one, 'gradual'):.1f} | {milliseconds(one, 'dense torch'):.1f} | "
            f"{ratio(one, 'gradual', 'processor'):.2f} | {ratio(one, 'gradual', 'clock'):.2f} |"
        )
    return "\n".join(lines) + "\n"


embed = partial(documents.embed, what="pruned")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=["measure"])
    results: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    try:
        if parser.parse_args().what:
            results = {
                "command": "python benchmarks/pruned.py measure",
                "case": {"input_shape": SHAPE, "sparsity": SPARSITY, "threads": 1},
                "machine": machine(),
                "versions": {name: metadata.version(name) for name in ("apache-tvm", "torch", "numpy")},
                "models": [measure(*model) for model in MODELS],
                "gradual": measure_gradual(),
            }
            write_json(FILE, results)
    except MestError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    write_atomically(DOCUMENT, embed(DOCUMENT.read_text(), table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

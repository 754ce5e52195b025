"""A fine-tuning that goes on with other images: the net as it was left, with room for further classes, and what it must
not forget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.finetuning.folder import TunedFolder
from mest_compile.finetuning.job import Job
from mest_compile.finetuning.net import Net
from mest_compile.finetuning.replay import Examples, Replay
from mest_compile.models.inputs import Inputs
from mest_compile.runtime import checkpoint
from mest_compile.runtime.state import as_conv
from mest_compile.runtime.trained import step_of
from mest_compile.sparsity.layer import Layer

SCORED = 64  # examples by which what is protected is chosen
PROTECTED_SHARE = 0.5  # of a layer's live units: as many may learn, as many stay


@dataclass(frozen=True, slots=True)
class Before:
    """A fine-tuning that is done. masks: {weight name: (out, in, kh, kw) bool} of its sparse layers."""

    net: Net
    masks: Mapping[str, np.ndarray]
    classes: tuple[str, ...]
    replay: Replay


def read_before(path: Path) -> Before:
    """Raises StateError where the folder holds no fine-tuning that is done, or files are damaged."""
    folder = TunedFolder(path)
    folder.trained()
    arrays, document = checkpoint.read(folder.checkpoint)
    step, told = step_of(arrays, document, folder.checkpoint), document["extra"]["finetuned"]
    last = step.graph.nodes[-1]
    head = tuple(last.params[role] for role in ("weight", "bias") if role in last.params)
    net = Net(step.graph, step.state_dict(), Inputs.from_json(told["inputs"]), head)
    masks = {name: as_conv(mask) for name, mask in step.masks().items()}
    return Before(net, masks, tuple(told["classes"]), Replay.read(folder.replay))


def continued_job(path: Path, data: Any, test: Any, val: Any, given: Mapping[str, Any]) -> Job:
    """What the run in a folder was asked, of other images. given: what else is asked otherwise. Raises StateError."""
    folder = TunedFolder(path)
    job = Job.from_json(folder.read())
    options = replace(job.options, trainable=folder.trained(), update_budget=None)
    unasked: dict[str, Any] = {"model": None, "weights": None, "inputs": None, "image": None}
    return replace(job, **unasked, data=data, test=test, val=val, options=options, continue_from=path, **given)


def widened(net: Net, classes: int) -> Net:
    """The same net with so many outputs; new ones begin at 0. No layer but the last is another."""
    last = net.graph.nodes[-1]
    sizes = {name: (classes, *net.graph.state_shapes[name][1:]) for name in net.head}
    nodes = (*net.graph.nodes[:-1], replace(last, shape=(last.shape[0], classes)))
    graph = replace(net.graph, nodes=nodes, state_shapes={**net.graph.state_shapes, **sizes})
    state = dict(net.state)
    for name, shape in sizes.items():
        grown = np.zeros(shape, np.float32)
        grown[: len(state[name])] = state[name]
        state[name] = grown
    return replace(net, graph=graph, state=state)


def protected(step: Any, layers: Mapping[str, Layer], replayed: Examples) -> dict[str, np.ndarray]:
    """Masks of those units of sparse layers that what is replayed needs most: half of the live ones, by how much, to
    first order, its loss would change without them, |w dL/dw|. It is judged by SCORED examples, as many of each class:
    those that herding chose first, whose mean is near that of all.

    layers  weight name -> Layer, of the step
    Source: that importance for old tasks protects is SparCL's, arXiv:2209.09476, which adds gradients to magnitudes;
    the product is ours, as in `planning.trainable`'s saliency.
    """
    sums: dict[str, np.ndarray] = {}
    replayed = replayed.first(SCORED)
    for begin in range(0, len(replayed.labels), step.batch):
        now = np.resize(np.arange(begin, min(begin + step.batch, len(replayed.labels))), step.batch)
        images = replayed.images[now].astype(np.float32).reshape(step.input_shape)
        for name, gradient in step.gradients(images, replayed.labels[now]).items():
            sums[name] = sums.get(name, 0.0) + gradient
    state, rng, found = step.state_dict(), np.random.default_rng(0), {}
    for name, mask in step.masks().items():
        if name in sums:
            spec, scheme = layers[name].spec, layers[name].scheme
            keep = scheme.collapse(spec, as_conv(mask))
            cells = np.flatnonzero(keep)
            energy = scheme.energy(spec, as_conv(state[name] * sums[name])).ravel()[cells]
            live = max(1, round(PROTECTED_SHARE * scheme.count(spec, keep)))
            stay, _ = scheme.prune(spec, cells.astype(np.int32), energy, live, rng)
            grid = np.zeros(keep.size, bool)
            grid[cells[stay]] = True
            found[name] = scheme.expand(spec, grid.reshape(keep.shape)).reshape(mask.shape)
    return found

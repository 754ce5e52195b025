"""A client of the fleet: trains the server's model on its own examples. A module of its own, which the simulation's
processes import."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from exchange import Layout, pack_masks, pack_values, partitions, take
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import mest_compile as mest
from mest_compile.data import batches, load

BATCH = 32


@lru_cache(maxsize=1)
def opened(model: str, width: int, data: str, scheme: str, sparsity: float, seed: int) -> tuple[Any, Any, Layout]:
    """(step, data, layout), once a process: all clients that it plays have the same step. Plain SGD, as FedAvg has it:
    a client keeps no momentum from round to round."""
    from mest_compile.models.sources import find_model

    split = load(data)
    shape = (BATCH, *split.train.images.shape[1:])
    net = find_model(model, shape, split.train.outputs, width, seed)
    said = {} if scheme == "dense" else {"sparsity": sparsity}
    step = mest.compile(net, shape, scheme=scheme, optimizer=mest.SGD(momentum=0.0), threads=1, seed=seed, **said)
    return step, split, Layout.of(step.state_dict(), step.masks())


def settings_of(config: ConfigRecord) -> tuple[Any, ...]:
    return tuple(config[name] for name in ("model", "width", "data", "scheme", "sparsity", "seed"))


def put(step: Any, state: dict[str, np.ndarray], masks: dict[str, np.ndarray]) -> None:
    """Masks first: values where a weight is dead would be refused."""
    step.set_masks(masks)
    step.load_state_dict({**step.state_dict(), **state})


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Some epochs on the client's own examples; live values go back, and how many examples they are of. Those that do
    not fill a batch are left out, others each epoch: every client would compile a size of its own for them.

    A message without a bitmap is for those who have the mask of the round before, which `context.state` keeps.
    """
    config, number = message.content["config"], int(context.node_config["partition-id"])
    step, split, layout = opened(*settings_of(config))
    held = context.state.get("mask", {"round": 0, "bitmap": b""})
    bitmap = config["bitmap"] or (held["bitmap"] if held["round"] == config["round"] - 1 else b"")
    drawn_by = (config["seed"], config["round"])
    values = message.content["values"]["values"].numpy()
    state, masks = take(layout, values, bitmap, config["share"], drawn_by, config["digest"])
    put(step, state, masks)
    mine = partitions(split.train.labels, config["clients"], config["alpha"], config["seed"])[number]
    losses = []
    for epoch in range(config["epochs"]):
        rng = np.random.default_rng([config["seed"], config["round"], number, epoch])
        for images, labels, _ in batches(split.train, BATCH, rng, False, mine, drop_last=len(mine) >= BATCH):
            losses.append(step(images.reshape(len(images), *step.input_shape[1:]), labels, lr=config["lr"]).loss)
    values = pack_values(layout, step.state_dict(), masks)
    context.state["mask"] = ConfigRecord({"round": config["round"], "bitmap": pack_masks(layout, masks)})
    return Message(
        RecordDict(
            {
                "values": ArrayRecord({"values": Array(values)}),
                "metrics": MetricRecord({"num-examples": len(mine), "loss": float(np.mean(losses))}),
            }
        ),
        reply_to=message,
    )

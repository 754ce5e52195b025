"""Ten clients and a server train one sparse model in Flower's simulation; python fleet.py --help.

Needs the environment of README.md: Flower and this project's command line want different versions of typer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
from clients import BATCH, client, opened, put, settings_of
from exchange import average, digest, mutate, pack_masks, pack_values, unpack_values
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from mest_compile.data import parts
from mest_compile.measuring.machine import machine


def bytes_of(content: RecordDict) -> int:
    """What a message carries of the model, with the array's header."""
    config = content.get("config", {})
    return sum(len(array.data) for array in content["values"].values()) + len(config.get("bitmap", b""))


def accuracy(step: Any, data: Any) -> float:
    right = 0
    for images, labels in parts(data, BATCH):
        right += int((step.predict(images.reshape(len(images), *step.input_shape[1:])).argmax(1) == labels).sum())
    return right / len(data)


def server_of(asked: argparse.Namespace, told: list[dict[str, Any]]) -> ServerApp:
    """told: gets a line a round."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        said = {name: getattr(asked, name) for name in ("model", "width", "data", "scheme", "sparsity", "seed")}
        said |= {name: getattr(asked, name) for name in ("clients", "alpha", "epochs")}
        until = asked.mutate_until * asked.rounds
        step, split, layout = opened(*settings_of(said))
        state, masks = step.state_dict(), step.masks()
        values = pack_values(layout, state, masks)
        holding: dict[int, int] = {}  # {node: the last round whose mask it has}
        while len(nodes := list(grid.get_node_ids())) < asked.clients:
            time.sleep(0.2)
        for number in range(1, asked.rounds + 1):
            before, share = pack_masks(layout, masks), asked.mutate if 1 < number <= until else 0.0
            rng = np.random.default_rng((asked.seed, number))
            state, masks = mutate(unpack_values(layout, values, masks), masks, share, rng)
            lr = asked.lr * (1 + math.cos(math.pi * (number - 1) / asked.rounds)) / 2
            common = {**said, "lr": lr, "round": number, "share": share, "digest": digest(layout, masks)}
            sent = []
            for node in nodes:
                bitmap = b"" if holding.get(node) == number - 1 else before
                config = ConfigRecord({**common, "bitmap": bitmap})
                content = RecordDict({"values": ArrayRecord({"values": Array(values)}), "config": config})
                sent.append(Message(content, dst_node_id=node, message_type="train"))
            replies = [one for one in grid.send_and_receive(sent) if not one.has_error()]
            if not replies:
                raise RuntimeError(f"round {number}: all clients failed; the simulation's log says why")
            holding = {one.metadata.src_node_id: number for one in replies}
            got = [one.content["values"]["values"].numpy() for one in replies]
            counts = [int(one.content["metrics"]["num-examples"]) for one in replies]
            values = average(got, counts)
            put(step, unpack_values(layout, values, masks), masks)
            line = {
                "round": number,
                "clients": len(replies),
                "accuracy": accuracy(step, split.test),
                "down_bytes": max(bytes_of(one.content) for one in sent),
                "up_bytes": max(bytes_of(one.content) for one in replies),
                "dense_bytes": layout.dense_bytes,
                "loss": float(np.average([one.content["metrics"]["loss"] for one in replies], weights=counts)),
            }
            told.append(line)
            print(json.dumps(line), flush=True)

    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"model": "resnet8", "width": 16, "data": "digits", "scheme": "unstructured"}.items():
        parser.add_argument(f"--{name}", default=value, type=type(value))
    for name, value in {"sparsity": 0.9, "alpha": 0.5, "lr": 0.1, "mutate": 0.1, "mutate-until": 0.75}.items():
        parser.add_argument(f"--{name}", default=value, type=float)
    for name, value in {"clients": 10, "rounds": 10, "epochs": 2, "seed": 0, "processes": 2}.items():
        parser.add_argument(f"--{name}", default=value, type=int)
    parser.add_argument("--out", type=Path, help="JSON file for a line a round.")
    asked = parser.parse_args()
    told: list[dict[str, Any]] = []
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ["PYTHONPATH"] = here  # the clients' processes find this folder
    resources = {"num_cpus": asked.processes, "include_dashboard": False}
    run_simulation(
        server_app=server_of(asked, told),
        client_app=client,
        num_supernodes=asked.clients,
        backend_config={"init_args": resources, "client_resources": {"num_cpus": 1}},
    )
    if asked.out:
        whole = sum(line["dense_bytes"] for line in told)
        shares = {f"{way}_share": sum(line[f"{way}_bytes"] for line in told) / whole for way in ("down", "up")}
        packages = ("mest-compile", "apache-tvm", "flwr", "numpy", "torch")
        made_on = {"machine": machine(), "versions": {name: metadata.version(name) for name in packages}}
        command = shlex.join(["python", "examples/flower/fleet.py", *sys.argv[1:]])
        said = {"command": command, **vars(asked), "out": str(asked.out), **shares, **made_on, "rounds": told}
        asked.out.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()

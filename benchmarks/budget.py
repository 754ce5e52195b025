"""Whether a step keeps to its update budget: `python benchmarks/budget.py measure` chooses what of frozen.py's nets
trains in half of a step's time, and times the chosen steps in turns with full ones; `cycles` chooses by modelled cycles
of a Cortex-A76, which takes long; `--only NAME` does so for one net. Both go into results/budget.json, net by net, and
the table of docs/finetuning.md; without either the table alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from importlib import metadata
from inspect import signature
from time import process_time
from typing import Any

import documents
import frozen
import numpy as np
import torch
from run import RESULTS

from mest_compile.base.errors import MestError
from mest_compile.base.files import write_atomically, write_json
from mest_compile.measuring.benchmark import machine

FILE, DOCUMENT = RESULTS / "budget.json", frozen.DOCUMENT
embed = partial(documents.embed, what="budget")
BUDGET, EXAMPLES = 0.5, 128
STEP = {"scheme": frozen.SCHEME, "sparsity": frozen.SPARSITY, "threads": 1}


def measure(name: str, shape: tuple[int, ...] = frozen.SHAPE, rounds: int = frozen.ROUNDS) -> dict[str, Any]:
    """The choice, and seconds of every round of the full and the chosen step, of the processor: others use the machine,
    too. Made-up examples: what they are decides which layers train, not whether the budget holds."""
    import mest_compile as mest

    model, images, labels = case(name, shape)
    choice = mest.choose_trainable(model, shape, (images, labels), BUDGET, **STEP)
    steps = {
        trained: mest.compile(model, shape, trainable=names, **STEP)
        for trained, names in (("all", None), ("chosen", choice.trainable))
    }
    return {
        "choice": choice.to_dict(),
        "seconds": frozen.in_turns(steps, images[: shape[0]], labels[: shape[0]], rounds, process_time),
        "machine": machine(),
    }


def cycles(name: str, shape: tuple[int, ...] = (4, *frozen.SHAPE[1:])) -> dict[str, Any]:
    """The choice for a Cortex-A76, whose kernels are emulated."""
    import mest_compile as mest

    model, images, labels = case(name, shape)
    choice = mest.choose_trainable(model, shape, (images, labels), BUDGET, target="cortex-a76", **STEP)
    return {"choice": choice.to_dict(), "machine": machine()}


def case(name: str, shape: tuple[int, ...]) -> tuple[Any, np.ndarray, np.ndarray]:
    """(model, images, labels)."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((EXAMPLES, *shape[1:]), np.float32)
    return frozen.MODELS[name](), images, rng.integers(0, frozen.CLASSES, EXAMPLES)


MEASURES = {"measure": measure, "cycles": cycles}
NETS = {"measure": [*frozen.MODELS], "cycles": ["ResNet-18", "EfficientNet-lite0"]}


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every choice: its model, what costs are, its budget, how many layers train, and its shares of the full step's
    cost, predicted and of the timed steps; None where none were."""
    found = []
    for part in MEASURES:
        for name, one in results.get(part, {}).get("models", {}).items():
            choice, seconds = one["choice"], one.get("seconds")
            turns = zip(seconds["chosen"], seconds["all"]) if seconds else ()
            found.append(
                {
                    "model": name,
                    **{fact: choice[fact] for fact in ("costs", "budget", "predicted")},
                    "chosen": sum(unit["chosen"] for unit in choice["units"]),
                    "layers": len(choice["units"]),
                    "measured": statistics.median(mine / full for mine, full in turns) if seconds else None,
                }
            )
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| model | costs | budget | layers that train | predicted | measured |", "|---|---|---:|---:|---:|---:|"]
    for row in rows(results):
        measured = "" if row["measured"] is None else f"{row['measured']:.3f}"
        lines.append(
            f"| {row['model']} | {row['costs']} | {row['budget']} | {row['chosen']} of {row['layers']} | "
            f"{row['predicted']:.3f} | {measured} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=[*MEASURES])
    parser.add_argument("--only", choices=[*frozen.MODELS], help="this net alone; the others stay as they are")
    results: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    try:
        if what := (said := parser.parse_args()).what:
            for name in [said.only] if said.only else NETS[what]:
                found = results.get(what, {}).get("models", {}) | {name: MEASURES[what](name)}
                results[what] = {
                    "command": f"python benchmarks/budget.py {what}",
                    "case": {
                        **STEP,
                        "budget": BUDGET,
                        "input_shape": signature(MEASURES[what]).parameters["shape"].default,
                    },
                    "tvm": metadata.version("apache-tvm"),
                    "models": {name: found[name] for name in frozen.MODELS if name in found},
                }
                write_json(FILE, results)
    except MestError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    write_atomically(DOCUMENT, embed(DOCUMENT.read_text(), table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

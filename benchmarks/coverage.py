"""Which of 160 models that people use are taken, and what the others are refused for.

    benchmarks/environments.sh coverage
    python benchmarks/coverage.py [--only PATTERN] [--verify]

writes benchmarks/results/coverage.json and the table in docs/models.md: 30 classifiers and 3 segmentation nets of
torchvision, 82 models of timm, 14 of transformers from small random configs, 31 nets of benchmarks/boards.py, with
random weights and 10 classes. Every model is imported in a process of its own; a run goes on where one of the same
versions was stopped.
--verify also trains the smallest model of every family that is taken for three steps beside torch, in float32 and in
float64, with the same masks and the same elements dropped: tensor by tensor as near to torch in float64 as torch is.
Where it is not, torch is run again with noise as large as roundings, which move numbers across a ReLU's jump or do not.
Kernels are of code that LLVM does not optimise, which takes a fifth of the time; what users get is what kernels' own
tests run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from surveyed import OPTIONS, Case, cases
from torchbeside import MOST, NOISY, RULE, torchs, worst

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests" / "lib"))
from hasty import hastily  # noqa: E402

PACKAGES = HERE / "environments" / "coverage"
RESULT, DOCUMENT = HERE / "results" / "coverage.json", HERE.parent / "docs" / "models.md"
LIMIT_SECONDS = 600.0
ONE_VALUE = "more than 1 value per channel"  # wants torch of BatchNorm, which few examples of one pixel have not
STEPS, SCHEMES, SPARSITY = 3, ("unstructured", "block"), 0.5
BATCHES, FEW, LARGE = (1, 4, 8, 16), 2, 128  # the last is a side of images of which a step has few
FEATURES = 8  # least examples of features: ten BatchNorms of 4 numbers make a third of rounding errors, in torch too


def packages() -> None:
    """What the models need, found behind our own packages."""
    import torch

    if not PACKAGES.is_dir():
        sys.exit(f"{PACKAGES} is missing: benchmarks/environments.sh coverage makes it")
    sys.path.append(str(PACKAGES))
    for name in (
        "nms",
        "qnms",
    ):  # a torchvision for another torch than ours has its compiled part, which no model needs
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.set_num_threads(1)


def examine(case: Case) -> dict[str, Any]:
    """Whether the model is taken; {operator: layers} of what is refused."""
    import torch

    import mest_compile as mest

    torch.manual_seed(0)
    net, shape = case.make()
    start = time.perf_counter()
    found: dict[str, Any] = {
        "family": case.family,
        "source": case.source,
        "input_shape": list(shape),
        "parameters": sum(one.numel() for one in net.parameters()),
    }
    try:
        checked = mest.check(net, shape, **OPTIONS.get(case.name, {}))
    except mest.MestError as error:
        short = re.sub(r"\(.*?\)|'.*?'|[;:].*", "", str(error)).strip()
        found |= {"refused": {f"({short[:60]})": 1}, "words": str(error)}
    else:
        if not checked.taken:
            refused = Counter(one.operator or f"({one.what[:60]})" for one in checked.refused)
            found |= {"refused": dict(refused), "words": checked.words}
    return found | {"taken": "refused" not in found, "seconds": round(time.perf_counter() - start, 1)}


def verify(case: Case, batch: int, folder: str) -> dict[str, Any]:
    """{"verified": whether a net of sparse layers of every scheme trains as torch's, "batch": examples of a step,
    "errors": {"gradients", "steps": [tensor, ours, torch's, allowed]}}, of the tensor that comes nearest to what is
    allowed, "noisy": how many of torch's runs with noise it took, where it took any}. Errors are from torch in float64,
    of the first gradients and of what three steps changed, relative to it.
    """
    import torch

    import mest_compile as mest
    from mest_compile.kernels.cache import Builder

    class HastyBuilder(Builder):
        _new_library = hastily(Builder._new_library)

    torch.manual_seed(0)
    net, shape = case.make()
    net.train()
    shapes = [(batch, *one[1:]) for one in (shape if isinstance(shape[0], tuple) else (shape,))]
    options = OPTIONS.get(case.name, {})
    given = tuple(shapes) if len(shapes) > 1 else shapes[0]
    sparse = [layer.name for layer in mest.check(net, given, **options).layers if layer.state == "sparse"]
    schemes = {name: SCHEMES[place % len(SCHEMES)] for place, name in enumerate(sparse)} | {"*": SCHEMES[0]}
    made: dict[str, Any] = {"optimizer": mest.SGD(**RULE), "threads": 1, "builder": HastyBuilder(folder=Path(folder))}
    step = mest.compile(net, given, schemes, SPARSITY if sparse else 0, **made, **options)
    start, numbers = step.state_dict(), options.get("loss") == "mse"
    rng, batches = np.random.default_rng(0), []
    for _ in range(STEPS):
        inputs = tuple(rng.standard_normal(one, dtype=np.float32) for one in shapes)
        if any(isinstance(part, torch.nn.Embedding) for part in net.modules()):
            inputs = tuple(np.abs(one) for one in inputs)  # of which it takes the whole part
        labels = rng.integers(0, step.classes, (batch, *step.output_shape[2:]))
        if numbers:
            labels = rng.standard_normal(step.output_shape, dtype=np.float32)
        batches.append((inputs, labels))
    in_turn = [(inputs if len(inputs) > 1 else inputs[0], labels) for inputs, labels in batches]
    first = step.gradients(*in_turn[0])
    for one in in_turn:
        step(*one)
    ours = first, {name: array.astype(np.float64) - start[name] for name, array in step.state_dict().items()}
    beside = partial(torchs, net, start, step.masks(), step.graph, batches, numbers)
    exact, theirs, noisy = beside(torch.float64), beside(torch.float32), []
    while True:
        parts = zip(ours, theirs, exact, zip(*noisy) if noisy else ((), ()), strict=True)
        errors = dict(zip(("gradients", "steps"), (worst(*part) for part in parts), strict=True))
        verified = all(mine <= allowed for _, mine, _, allowed in errors.values())
        if verified or len(noisy) == NOISY:
            break
        noisy.append(beside(torch.float32, noise=len(noisy) + 1))
    return {
        "verified": verified,
        "batch": batch,
        "errors": {what: [name, *(float(f"{one:.2g}") for one in rest)] for what, (name, *rest) in errors.items()},
        **({"noisy": len(noisy)} if noisy else {}),
    }


def apart(work: Callable[[Case], dict[str, Any]], case: Case, limit_seconds: float) -> dict[str, Any]:
    """What `work` finds in a process of its own; {"failed": why} where that ends without a result."""
    context = multiprocessing.get_context("fork")  # torch and tvm are loaded once
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            theirs.send(work(case))
        except BaseException as error:
            theirs.send({"failed": f"{type(error).__name__}: {error}"[:300]})

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(limit_seconds) else {"failed": f"not done in {limit_seconds:g} s"}
    except EOFError:
        process.join()
        found = {"failed": f"ended with {process.exitcode}"}
    process.kill()
    process.join()
    return {"family": case.family, "source": case.source, "taken": False} | found


def versions() -> dict[str, str]:
    """Of what decides the answers."""
    names = ("apache-tvm", "torch", "timm", "torchvision", "transformers")
    return {name: metadata.version(name) for name in names}


def missing(models: dict[str, dict[str, Any]]) -> list[tuple[str, int, int, int]]:
    """(operator, models that lack it, those that lack nothing else, those that lack at most two others), most wanted
    first."""
    needs: dict[str, list[int]] = defaultdict(list)
    for model in models.values():
        lacks = set(model.get("refused", ()))
        if "failed" in model:
            lacks.add(f"({model['failed'].partition(':')[0]})")
        for operator in lacks:
            needs[operator].append(len(lacks))
    rows = [(name, len(n), n.count(1), sum(one <= 3 for one in n)) for name, n in needs.items()]
    return sorted(rows, key=lambda row: (-row[1], -row[2], row[0]))


def summary(models: dict[str, dict[str, Any]]) -> str:
    taken = [model for model in models.values() if model["taken"]]
    families = {model["family"] for model in models.values()}
    lines = [
        f"taken: {len(taken)} of {len(models)} models, "
        f"{len({model['family'] for model in taken})} of {len(families)} families",
        "",
        "operator                       needs  alone  <=3",
    ]
    lines += [f"{name[:60]:30} {needs:5} {alone:6} {few:4}" for name, needs, alone, few in missing(models)]
    lines += ["", "model: what it lacks"]
    for name, model in models.items():
        if not model["taken"]:
            lines.append(f"{name}: {model.get('failed') or ', '.join(model['refused'])}")
    return "\n".join(lines)


def table(models: dict[str, dict[str, Any]]) -> str:
    """In Markdown: by source, then what the others lack."""
    lines = ["| models of | taken | families taken | not taken, and what is refused |", "|---|---:|---:|---|"]
    for source in dict.fromkeys(model["source"] for model in models.values()):
        there = {name: model for name, model in models.items() if model["source"] == source}
        taken = [model for model in there.values() if model["taken"]]
        families = [len({model["family"] for model in some}) for some in (taken, there.values())]
        others = "; ".join(
            f"{name.partition(':')[2]}: {model.get('failed') or ', '.join(model['refused'])}"
            for name, model in there.items()
            if not model["taken"]
        )
        lines.append(f"| {source} | {len(taken)} of {len(there)} | {families[0]} of {families[1]} | {others} |")
    return "\n".join([summary(models).partition("\n")[0].capitalize() + ".", "", *lines, "", compared(models)])


def compared(models: dict[str, dict[str, Any]]) -> str:
    """Which families' smallest models were trained beside torch."""
    tried = {model["family"]: model["verified"] for model in models.values() if "verified" in model}
    families = {model["family"] for model in models.values()}
    text = f"Trained beside torch: {len(tried)} of {len(families)} families; {sum(tried.values())} came out as torch's."
    wrong = sorted(family for family, good in tried.items() if not good)
    left = sorted(families - tried.keys())
    text += f" Others: {', '.join(wrong)}." if wrong else ""
    return text + (f" Not yet: {', '.join(left)}." if left else "")


def write_table(models: dict[str, dict[str, Any]]) -> None:
    before, after = "<!-- coverage table: begin -->\n", "<!-- coverage table: end -->"
    text = DOCUMENT.read_text()
    start, end = text.index(before) + len(before), text.index(after)
    DOCUMENT.write_text(f"{text[:start]}\n{table(models)}\n\n{text[end:]}")


def _asks_for_more(found: dict[str, Any]) -> bool:
    """Whether what a verification found tells nothing, as BatchNorms of few numbers make errors of roundings: torch has
    no value of its own there, or none that is near to its own in float64."""
    lost = any(theirs > MOST for _, _, theirs, _ in found.get("errors", {}).values())
    return ONE_VALUE in found.get("failed", "") or (lost and not found["verified"])


def verify_all(chosen: list[Case], models: dict[str, dict[str, Any]], given: argparse.Namespace) -> None:
    """Those that match, smallest first, as far as no run has verified them."""
    chosen = sorted(chosen, key=lambda case: models[case.name]["parameters"])
    with tempfile.TemporaryDirectory() as folder:
        for place, case in enumerate(chosen):
            model = models[case.name]
            if not fnmatch(case.name, given.only) or "verified" in model:
                continue
            shape = model["input_shape"]
            batch = FEW if len(shape) == 4 and shape[-1] > LARGE else BATCHES[place % len(BATCHES)]
            if len(shape) == 2:
                batch = max(batch, FEATURES)
            found: dict[str, Any] = {"failed": ONE_VALUE}
            while _asks_for_more(found) and batch <= BATCHES[-1]:
                found = apart(partial(verify, batch=batch, folder=folder), case, given.limit)
                batch *= 4
            model |= {name: found[name] for name in ("batch", "errors", "noisy") if name in found}
            model["verified"] = found.get("verified", False)
            if "failed" in found:
                model["errors"] = found["failed"]
            print(f"{case.name}: {'as torch' if model['verified'] else found}", file=sys.stderr)
            text = json.dumps({"versions": versions(), "models": models}, indent=1) + "\n"
            given.out.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="shell pattern of models, timm:* for instance")
    parser.add_argument("--verify", action="store_true", help="train every family's smallest model beside torch, too")
    parser.add_argument("--fresh", action="store_true", help="ask again what is known already")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for a model")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    packages()
    import timm  # noqa: F401  # before processes are made
    import tvm.relax.frontend.torch  # noqa: F401

    held = json.loads(given.out.read_text()) if given.out.exists() else {}
    if held.get("versions") != versions():
        held = {"versions": versions(), "models": {}}
    for case in cases():
        if fnmatch(case.name, given.only) and (given.fresh or case.name not in held["models"]):
            held["models"][case.name] = found = apart(examine, case, given.limit)
            words = found.get("failed") or ", ".join(found.get("refused", ())) or "taken"
            print(f"{case.name}: {words}", file=sys.stderr)
            given.out.write_text(json.dumps(held, indent=1) + "\n")
    models = held["models"]
    smallest: dict[str, str] = {}
    for name in sorted(models, key=lambda name: models[name].get("parameters", 0)):
        if models[name]["taken"]:
            smallest.setdefault(models[name]["family"], name)
    if given.verify:
        verify_all([case for case in cases() if smallest.get(case.family) == case.name], models, given)
    print(summary(models))
    if given.out == RESULT and {case.name for case in cases()} <= models.keys():
        write_table({case.name: models[case.name] for case in cases()})


if __name__ == "__main__":
    main()

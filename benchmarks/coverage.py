"""Which of 160 models that people use are taken, and what the others are refused for.

    benchmarks/environments.sh coverage
    python benchmarks/coverage.py [--only PATTERN] [--verify]

writes benchmarks/results/coverage.json and the table in docs/models.md: 30 classifiers and 3 segmentation nets of
torchvision, 82 models of timm, 14 of transformers from small random configs, 31 nets of benchmarks/boards.py, with
random weights and 10 classes. Every model is imported in a process of its own; a run goes on where one of the same
versions was stopped.
--verify also trains the smallest model of every family that is taken for three steps beside torch, in float32 and in
float64, with the same masks and without dropping: as far as torch in float64 says, one is as good as the other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from surveyed import OPTIONS, Case, cases

HERE = Path(__file__).parent
PACKAGES = HERE / "environments" / "coverage"
RESULT, DOCUMENT = HERE / "results" / "coverage.json", HERE.parent / "docs" / "models.md"
LIMIT_SECONDS = 600.0
STEPS, SCHEMES, SPARSITY = 3, ("unstructured", "block"), 0.5
AS_GOOD, TOLERANCE = 10.0, 1e-3  # times torch's own error in float32, and an error that is none


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


def verify(case: Case) -> dict[str, Any]:
    """{"verified": whether three steps of every scheme are as good as torch's, "errors": {scheme: [ours, torch's]}};
    errors of all weights and statistics together, relative to those of torch in float64."""
    import torch

    torch.manual_seed(0)
    net, shape = case.make()
    for part in net.modules():  # torch would draw other elements
        for name in ("p", "drop_prob"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    errors = {scheme: _errors(net.train(), shape, scheme, OPTIONS.get(case.name, {})) for scheme in SCHEMES}
    good = all(ours <= max(TOLERANCE, AS_GOOD * theirs) for ours, theirs in errors.values())
    return {"verified": good, "errors": errors}


def _errors(net: Any, shape: tuple[Any, ...], scheme: str, options: dict[str, Any]) -> list[float]:
    import copy

    import numpy as np
    import torch

    import mest_compile as mest

    rule = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3}
    step = mest.compile(net, shape, scheme, SPARSITY, optimizer=mest.SGD(**rule), threads=1, **options)
    masks = {name: torch.from_numpy(mask) for name, mask in step.masks().items()}
    twins = [copy.deepcopy(net).to(kind) for kind in (torch.float32, torch.float64)]
    optimizers = [torch.optim.SGD(twin.parameters(), **rule) for twin in twins]
    for twin in twins:
        twin.load_state_dict({name: torch.from_numpy(array) for name, array in step.state_dict().items()})
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        several = shape if isinstance(shape[0], tuple) else (shape,)
        inputs = tuple(rng.standard_normal(one, dtype=np.float32) for one in several)
        if any(isinstance(part, torch.nn.Embedding) for part in net.modules()):
            inputs = tuple(np.abs(one) for one in inputs)  # of which it takes the whole part
        labels = rng.integers(0, step.classes, (several[0][0], *step.output_shape[2:]))
        step(inputs if len(inputs) > 1 else inputs[0], labels)
        for twin, optimizer in zip(twins, optimizers):
            optimizer.zero_grad()
            output = twin(*(torch.from_numpy(one).to(next(twin.parameters()).dtype) for one in inputs))
            output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
            torch.nn.functional.cross_entropy(output, torch.from_numpy(labels)).backward()
            optimizer.step()
            with torch.no_grad():
                for name, parameter in twin.named_parameters():
                    if name in masks:
                        parameter *= masks[name]
    theirs, exact = ({name: value.double().numpy() for name, value in twin.state_dict().items()} for twin in twins)
    size = sum(float((value**2).sum()) for value in exact.values()) ** 0.5
    return [
        sum(float(((one[name] - value) ** 2).sum()) for name, value in exact.items()) ** 0.5 / size
        for one in (step.state_dict(), theirs)
    ]


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
    return "\n".join([summary(models).partition("\n")[0].capitalize() + ".", "", *lines])


def write_table(models: dict[str, dict[str, Any]]) -> None:
    before, after = "<!-- coverage table: begin -->\n", "<!-- coverage table: end -->"
    text = DOCUMENT.read_text()
    start, end = text.index(before) + len(before), text.index(after)
    DOCUMENT.write_text(f"{text[:start]}\n{table(models)}\n\n{text[end:]}")


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
    for case in cases() if given.verify else ():
        if (
            smallest.get(case.family) == case.name
            and fnmatch(case.name, given.only)
            and "verified" not in models[case.name]
        ):
            found = {"verified": False} | apart(verify, case, given.limit)
            models[case.name] |= {name: found[name] for name in ("verified", "errors", "failed") if name in found}
            print(f"{case.name}: {'as torch' if found['verified'] else found}", file=sys.stderr)
            given.out.write_text(json.dumps(held, indent=1) + "\n")
    print(summary(models))
    if given.out == RESULT and {case.name for case in cases()} <= models.keys():
        write_table({case.name: models[case.name] for case in cases()})


if __name__ == "__main__":
    main()

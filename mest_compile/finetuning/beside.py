"""Fine-tuning beside torch's: one contestant in a process of its own, whose time and memory are what it alone takes.

python -m mest_compile.finetuning.beside CONTESTANT EXAMPLES EPOCHS SEED FOLDER   # on drawn digits, told as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from mest_compile.base.errors import MestError
from mest_compile.data.drawn import drawn_digits

NET, SIZE, BATCH, RATE, TESTED = "efficientnet-lite0", 96, 16, 0.003, 50  # tests of a class
OURS, SPARSER, BUDGET, DENSE, ALL, LAST, KEPT = (
    "ours",
    "ours, 90%",
    "ours, by budget",
    "ours, dense",
    "torch, all",
    "torch, last blocks",
    "torch, last blocks, features kept",
)
CONTESTANTS = (OURS, SPARSER, BUDGET, DENSE, ALL, LAST, KEPT)
OURS_ALL: dict[str, dict[str, Any]] = {  # what `mest.finetune` is asked
    OURS: {},
    SPARSER: {"sparsity": 0.9},
    BUDGET: {"trainable": None, "update_budget": 0.35},  # of a full step's time
    DENSE: {"scheme": "dense"},
}

Labelled = tuple[np.ndarray, np.ndarray]  # images (n, 96, 96, 3) uint8, labels (n,) int64


def digits(count: int, seed: int) -> tuple[Labelled, Labelled]:
    """(training part of `count` images of each digit, test part of others)."""
    return drawn_digits(count, SIZE, seed), drawn_digits(TESTED, SIZE, 10_000 + seed)


def measured(
    contestant: str, data: tuple[Labelled, Labelled], epochs: int, seed: int, out: Path, rate: float = RATE
) -> dict[str, Any]:
    """JSON-able: what one of CONTESTANTS reaches, in this process, and what it takes. out: ours leaves its files there;
    rate: AdamW's, the highest of a cosine.

    seconds  beside "compiling_seconds"; processor_seconds  of all of it
    peak_bytes  of memory, beyond what the process had with libraries and images in it: process_bytes
    """
    import resource

    import torch  # noqa: F401
    from tvm.relax.frontend.torch import from_exported_program  # noqa: F401

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, process_time()
    if contestant in OURS_ALL:
        found = _ours(data, epochs, seed, OURS_ALL[contestant], out, rate)
    else:
        found = _torchs(data, epochs, seed, contestant != ALL, contestant == KEPT, rate)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = {"peak_bytes": 1024.0 * (after - before), "process_bytes": 1024.0 * before}
    return {**found, "rate": rate, "processor_seconds": process_time() - began, **peak}


def asked(contestant: str, count: int, epochs: int, seed: int, out: Path) -> dict[str, Any]:
    """`measured` on drawn digits, in a process of its own. Raises MestError with what it said where it fails."""
    said = (contestant, str(count), str(epochs), str(seed), str(out))
    done = subprocess.run([sys.executable, "-m", __name__, *said], capture_output=True, text=True)
    if done.returncode:
        raise MestError(f"{contestant} failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _ours(
    data: tuple[Labelled, Labelled], epochs: int, seed: int, asked: dict[str, Any], out: Path, rate: float
) -> dict[str, Any]:
    from mest_compile.finetuning.tuning import finetune
    from mest_compile.models.pretrained import PRETRAINED

    tuned = finetune(
        NET,
        data[0],
        test=data[1],
        val=data[1],  # as torch's best epoch is chosen
        out=out,
        inputs=replace(PRETRAINED[NET].inputs, size=(SIZE, SIZE), crop=1.0),  # the whole image, as torch sees it
        batch=BATCH,
        epochs=epochs,
        optimizer=f"adamw:lr={rate}",
        patience=None,
        threads=1,
        seed=seed,
        **asked,
    )
    return {
        "accuracy": tuned.accuracy,
        "seconds": tuned.seconds["total"] - tuned.seconds["compiling"],
        "compiling_seconds": tuned.seconds["compiling"],
        "classifier_accuracy": tuned.head_accuracy,
        "step_bytes": tuned.step.memory()["total"],
    }


def _torchs(
    data: tuple[Labelled, Labelled], epochs: int, seed: int, last: bool, keep: bool, rate: float
) -> dict[str, Any]:
    """The same with torch in channels_last. last: all but the last three blocks is frozen, in evaluation mode; keep:
    what that gives is computed once."""
    import torch

    from mest_compile.models.pretrained import pretrained_model

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    began = perf_counter()
    net, inputs = pretrained_model(NET, (BATCH, 3, SIZE, SIZE))
    model: Any = net
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
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], rate)
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
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            parts = tx.split(BATCH) if tested is None else tested.split(BATCH)
            logits = torch.cat([back(front(given(part)) if tested is None else part) for part in parts])
        best = max(best, (logits.argmax(1) == ty).float().mean().item())
    return {"accuracy": best, "seconds": perf_counter() - began, "compiling_seconds": 0.0}


if __name__ == "__main__":
    contestant, count, epochs, seed, out = sys.argv[1:]
    print(json.dumps(measured(contestant, digits(int(count), int(seed)), int(epochs), int(seed), Path(out))))

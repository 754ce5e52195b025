"""What was meant by a name that there is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# What others call it: name as it may be given, without "_" and "-" -> ours.
ALIASES = {
    "learningrate": "lr",
    "maxlr": "lr",
    "baselr": "lr",
    "minlr": "lr_final",
    "scheduler": "lr_schedule",
    "lrscheduler": "lr_schedule",
    "batchsize": "batch",
    "maxepochs": "epochs",
    "numepochs": "epochs",
    "warmup": "warmup_epochs",
    "earlystopping": "patience",
    "gradclip": "clip_norm",
    "maxgradnorm": "clip_norm",
    "smoothing": "label_smoothing",
    "l2": "weight_decay",
    "wd": "weight_decay",
    "arch": "model",
    "dataset": "data",
    "device": "target",
    "output": "out",
}


def near(name: str, there: Iterable[str]) -> str | None:
    """The name of those there are that was meant; None where none is near."""
    known = list(there)
    alias = ALIASES.get(name.lower().replace("_", "").replace("-", ""))
    if alias in known:
        return alias
    lower = {one.lower(): one for one in reversed(known)}
    found = get_close_matches(name.lower(), lower, 1)
    return lower[found[0]] if found else None


def meant(name: str, there: Iterable[str]) -> str:
    """ "; did you mean ...?" where a name is near, else ""."""
    found = near(name, there)
    return "" if found is None else f"; did you mean {found!r}?"

"""What a personal model gets right and wrong: by class, as a matrix, with the worst pictures, on one page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.files import write_atomically
from mest_compile.base.pages import page, table
from mest_compile.training import exhibits


def write_page(
    path: Path,
    title: str,
    rows: Sequence[tuple[str, str]],
    verdict: Mapping[str, Any],
    pictures: Sequence[tuple[np.ndarray, str]],
) -> None:
    """One HTML page that needs nothing else.

    rows      what is told of the run, name and value
    verdict   as `training.verdict.judged` gives it
    pictures  uint8 images (C, H, W) that were called something else, and what is said of each
    """
    parts = [f"<h1>{html.escape(title)}</h1>", table(rows), *exhibits.by_class(verdict)]
    parts += exhibits.worst_pictures([(exhibits.png_of(image), said) for image, said in pictures])
    write_atomically(path, page(title, parts))

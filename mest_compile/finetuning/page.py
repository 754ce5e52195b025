"""What a personal model gets right and wrong: by class, as a matrix, with the worst pictures, on one page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mest_compile.base.files import write_atomically
from mest_compile.base.pages import STYLE, table

SHOWN_PIXELS = 128  # of a picture's longer side

OWN_STYLE = (
    "figure{display:inline-block;margin:.5em;font-size:small;max-width:12em} td.right{background:#e0f0e0} "
    "th{text-align:left}"
)


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
    by_class = [
        (name, f"{one['examples']} examples", f"found {_shown(one['recall'])}", f"right {_shown(one['precision'])}")
        for name, one in verdict["classes"].items()
    ]
    parts = [f"<h1>{html.escape(title)}</h1>", table(rows), "<h2>By class</h2>", table(by_class)]
    parts += ["<h2>What classes were called</h2>", _matrix(verdict["confusion"], list(verdict["classes"]))]
    if pictures:
        parts.append("<h2>The surest wrong answers</h2><div>")
        parts += [_figure(image, said) for image, said in pictures]
        parts.append("</div>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE} {OWN_STYLE}</style>'
    body = "\n".join(parts)
    write_atomically(path, f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n')


def _shown(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _matrix(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    columns = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = [f"<tr><th></th>{columns}</tr>"]
    for place, (name, counts) in enumerate(zip(names, confusion)):
        cells = "".join(
            f"<td{' class=right' if place == column else ''}>{count or ''}</td>" for column, count in enumerate(counts)
        )
        lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _figure(image: np.ndarray, said: str) -> str:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0).squeeze()))
    picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    file = io.BytesIO()
    picture.save(file, format="png")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img alt="" src="data:image/png;base64,{data}"><figcaption>{html.escape(said)}</figcaption></figure>'
    )

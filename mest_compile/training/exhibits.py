"""What a model gets right and wrong, as HTML: by class, as a matrix, with the worst pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mest_compile.base.pages import table

SHOWN_PIXELS = 128  # of a picture's longer side
MOST_CLASSES = 40  # whose matrix is shown; of more it would not be read


def of_verdict(verdict: Mapping[str, Any]) -> list[str]:
    """Of what `verdict.verdict_of` gives."""
    part = "test" if verdict["part"] == "test" else "validation"
    about = verdict["calibration"]
    bins = [
        (f"from {one['from']:.1f}", one["examples"], f"{one['probability']:.3f}", f"{one['accuracy']:.3f}")
        for one in about["bins"]
    ]
    worst = [
        (base64.b64decode(one["png"]), f"{one['example']}: {one['class']}, called {one['called']}, {one['sure']:.0%}")
        for one in verdict["worst"]
        if one["png"]
    ]
    return [
        f"<p>What follows is of {verdict['examples']} {part} examples after epoch {verdict['epoch']}.</p>",
        *by_class(verdict),
        f"<h2>How sure, how right</h2><p>Answers are off by {about['error']:.3f} from how sure they are.</p>",
        table(bins, ("probability", "examples", "mean", "right")),
        *worst_pictures(worst),
    ]


def by_class(verdict: Mapping[str, Any]) -> list[str]:
    """verdict: as `verdict.judged` has it."""
    names = list(verdict["classes"])
    rows = [
        (name, one["examples"], _shown(one["recall"]), _shown(one["precision"]))
        for name, one in verdict["classes"].items()
    ]
    parts = ["<h2>By class</h2>", table(rows, ("class", "examples", "found", "of its answers right"))]
    if len(names) <= MOST_CLASSES:
        parts += ["<h2>What classes were called</h2>", _matrix(verdict["confusion"], names)]
    return parts


def worst_pictures(pictures: Sequence[tuple[bytes, str]]) -> list[str]:
    """pictures: (PNG, what is said of it)."""
    shown = [
        f'<figure><img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{html.escape(said)}</figcaption></figure>"
        for png, said in pictures
    ]
    return ["<h2>The surest wrong answers</h2><div>", *shown, "</div>"] if shown else []


def png_of(image: np.ndarray) -> bytes:
    """Of uint8 pixels (C, H, W), C 1 or 3, no larger than SHOWN_PIXELS."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0).squeeze()))
    picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    file = io.BytesIO()
    picture.save(file, format="png")
    return file.getvalue()


def _shown(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _matrix(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    columns = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = [f"<tr><th></th>{columns}</tr>"]
    for place, (name, counts) in enumerate(zip(names, confusion)):
        cells = "".join(
            f"<td{' style=background:var(--right)' if place == column else ''}>{count or ''}</td>"
            for column, count in enumerate(counts)
        )
        lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'

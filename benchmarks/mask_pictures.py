"""The picture of masks in docs/schemes.md, drawn by the schemes themselves: `python benchmarks/mask_pictures.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mest_compile.base.files import write_atomically
from mest_compile.ir.graph import LayerSpec
from mest_compile.sparsity import parse_scheme

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "masks.svg"
SHOWN = ("unstructured", "block:4x1", "block:4x4", "pattern", "2:4", "filter", "channel", "dense")
SPARSITY = 0.8  # where a scheme has no other
LAYER = LayerSpec("layer", (16, 16, 3, 3), (1, 16, 8, 8), padding=(1, 1), padding_end=(1, 1))
CELL, GAP, COLUMNS = 4, 1, 4  # pixels of a weight, pixels between kernels, masks in a row
KERNEL = 3 * CELL + GAP
PANEL, CAPTION, MARGIN = 16 * KERNEL, 24, 16
STYLE = """
.page { fill: #ffffff } .dead { fill: #e3e8ee } .live { fill: #1f6fb4 } text { fill: #1b1f24; font: 13px sans-serif }
@media (prefers-color-scheme: dark) {
.page { fill: #131416 } .dead { fill: #2c3138 } .live { fill: #6cb6ff } text { fill: #dfe3e8 }
}
"""


def mask_of(name: str) -> np.ndarray:
    """(out, in, 3, 3) bool: the mask that the scheme starts with on normally distributed weights."""
    scheme, rng = parse_scheme(name), np.random.default_rng(0)
    sparsity = 0.0 if name == "dense" else scheme.asked(scheme.fixed or SPARSITY)
    energy = scheme.energy(LAYER, rng.normal(size=LAYER.weight_shape))
    return scheme.expand(LAYER, scheme.start(LAYER, energy, scheme.live_units(LAYER, sparsity), rng))


def draw() -> str:
    """SVG for light and dark pages: a row of 3x3 kernels a filter, a column an input channel, live weights coloured."""
    panels = []
    for number, name in enumerate(SHOWN):
        mask = mask_of(name)
        left = MARGIN + number % COLUMNS * (PANEL + MARGIN)
        top = CAPTION + number // COLUMNS * (PANEL + CAPTION + MARGIN)
        panels.append(f'<g transform="translate({left} {top})"><text y="-6">{name}: {1 - mask.mean():.0%} zero</text>')
        panels.append(f'<rect width="{PANEL}" height="{PANEL}" fill="url(#kernels)"/>')
        panels.append(f'<path class="live" d="{squares(mask)}"/></g>')
    width = MARGIN + COLUMNS * (PANEL + MARGIN)
    height = -(-len(SHOWN) // COLUMNS) * (PANEL + CAPTION + MARGIN)
    kernels = f'<pattern id="kernels" width="{KERNEL}" height="{KERNEL}" patternUnits="userSpaceOnUse">'
    kernels += f'<rect class="dead" width="{3 * CELL}" height="{3 * CELL}"/></pattern>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f'<style>{STYLE}</style>\n{kernels}\n<rect class="page" width="{width}" height="{height}"/>\n'
        + "\n".join(panels)
        + "\n"
        "</svg>\n"
    )


def squares(chosen: np.ndarray) -> str:
    """A path around each chosen weight; neighbours in a row of their kernel are one rectangle."""
    parts = []
    for out, source, y in np.ndindex(chosen.shape[:3]):
        row, x = chosen[out, source, y], 0
        while x < len(row):
            run = 0
            while x + run < len(row) and row[x + run]:
                run += 1
            if run:
                place = f"M{source * KERNEL + x * CELL} {out * KERNEL + y * CELL}"
                parts.append(f"{place}h{run * CELL}v{CELL}h-{run * CELL}z")
            x += run + 1
    return "".join(parts)


def main() -> int:
    write_atomically(PICTURE, draw())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The README's picture, how much faster than dense torch a step is, out of benchmarks/results/full.json:
`python benchmarks/readme_picture.py` draws it anew.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence

import matplotlib
import readme_table
from matplotlib.figure import Figure

from mest_compile.base.files import write_atomically
from mest_compile.measuring.table import Row, SpeedTable

PICTURE = readme_table.ROOT / "docs" / "pictures" / "speed.svg"
COLOURS = {0.8: "#9ecae1", 0.9: "#4292c6", 0.95: "#084594"}


def draw(table: SpeedTable) -> str:
    """SVG on white: a group of bars a scheme, a bar a sparsity, its interval, its figure beside it."""
    rows: Sequence[Row] = [row for row in table.rows if row.speedup is not None]
    schemes = list(dict.fromkeys(row.scheme for row in rows))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "speed"}):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for row in rows:
            place = schemes.index(row.scheme) + 0.27 * (list(COLOURS).index(row.sparsity) - 1)
            reach = [[row.speedup - row.speedup_low], [row.speedup_high - row.speedup]]
            grey = {"ecolor": "#555555", "capsize": 2, "error_kw": {"linewidth": 0.8}}
            label = f"{row.sparsity:.0%} of the weights are zero" if row.scheme == schemes[0] else None
            axes.barh(place, row.speedup, 0.25, xerr=reach, color=COLOURS[row.sparsity], label=label, **grey)
            axes.text(row.speedup_high + 0.12, place, f"{row.speedup:.2f}", va="center", fontsize=8)
        axes.axvline(1, color="#d62728", linewidth=1, label="dense torch, channels_last")
        axes.set_yticks(range(len(schemes)), schemes)
        axes.invert_yaxis()
        axes.set(xlabel="times as fast as dense torch: a whole training step", xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper right")
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def main() -> int:
    results = json.loads((readme_table.FOLDER / "full.json").read_text())
    write_atomically(PICTURE, draw(readme_table.speeds(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

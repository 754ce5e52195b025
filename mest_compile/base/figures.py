"""Plots as SVG that stands in a page: its text and axes are of the page's colour, in the light and in the dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#0a0b0c"  # what is drawn in it takes the colour of the text around it
SIZE = (5.2, 3.0)  # inches; narrow, so that the text of a plot that fills a phone's screen is still read


def svg(draw: Callable[[Figure], None], size: tuple[float, float] = SIZE) -> str:
    """The SVG element of a figure, the same for the same drawing. size: inches, width and height."""
    import matplotlib
    from matplotlib.figure import Figure

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    looks = {"svg.fonttype": "none", "svg.hashsalt": "mest-compile", "legend.frameon": False}
    with matplotlib.rc_context(dict.fromkeys(inks, INK) | looks):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :].rstrip().replace(INK, "currentColor")
    # Ids of groups are counted anew in every figure, and a page has several.
    return re.sub(r'<g id="[^"]*_\d+">', "<g>", text).replace("<svg ", '<svg class="plot" ', 1)


def shown(figure: Figure) -> Figure:
    """The same, which a notebook shows as a picture whether or not pyplot was imported there."""

    def png() -> bytes:
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        return drawn.getvalue()

    figure._repr_png_ = png  # type: ignore[attr-defined]  # what IPython asks an object for
    return figure

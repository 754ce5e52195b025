"""What was meant by a name that there is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def meant(name: str, there: Iterable[str]) -> str:
    """ "; did you mean ...?" where a name is near, else ""."""
    near = get_close_matches(name.lower(), {one.lower(): one for one in there}, 1)
    return f"; did you mean {next(one for one in there if one.lower() == near[0])!r}?" if near else ""

"""Tables that scripts here put into pages of the documentation."""

from __future__ import annotations

from mest_compile.base.errors import StateError


def embed(page: str, text: str, what: str) -> str:
    """`page` with `text` between its lines <!-- WHAT: begin --> and <!-- WHAT: end -->. Raises StateError when it has
    none."""
    begin, end = f"<!-- {what}: begin -->", f"<!-- {what}: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise StateError(f"the page has no {begin} ... {end}; put the two lines where the table belongs")
    return f"{before}{begin}\n{text}{end}{after}"

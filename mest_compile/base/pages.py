"""HTML pages that need nothing else: readable on phones and in the dark, tables that sort where a column's name is
clicked."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from mest_compile.base.errors import UsageError
from mest_compile.base.files import write_atomically

STYLE = (
    ":root{color-scheme:light dark;--line:#ccc;--shade:#f4f4f4;--right:#e0f0e0}"
    "@media(prefers-color-scheme:dark){:root{--line:#555;--shade:#2a2a2a;--right:#1d3a24}}"
    "body{font-family:sans-serif;margin:2em auto;max-width:60em;padding:0 1em}"
    "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid var(--line)}"
    "td:first-child,th:first-child,.said td{text-align:left} th[data-sorts]{cursor:pointer;background:var(--shade)}"
    "figure{display:inline-block;margin:.5em;font-size:small;max-width:12em}"
    "figure img{min-width:6em;image-rendering:pixelated}"
    "img{max-width:100%;height:auto} .wide{overflow-x:auto}"
    ".plots{display:grid;gap:0 2em;grid-template-columns:repeat(auto-fit,minmax(min(100%,26em),1fr))}"
    ".plot{width:100%;max-width:36em;height:auto}"
)
# Sorts by numbers where cells begin with one, else by text; again: the other way round.
SORT = (
    "<script>for(const th of document.querySelectorAll('th[data-sorts]'))th.onclick=()=>{"
    "const t=th.closest('table'),i=th.cellIndex,up=th.dataset.sorts=th.dataset.sorts==='up'?'down':'up',"
    "k=r=>r.cells[i].textContent,n=s=>parseFloat(s),d=(a,b)=>isNaN(n(a)-n(b))?a.localeCompare(b):n(a)-n(b);"
    "[...t.rows].filter(r=>!r.querySelector('th')).sort((a,b)=>(up==='up'?1:-1)*d(k(a),k(b)))"
    ".forEach(r=>r.parentNode.append(r))}</script>"
)


def page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A whole page. title: text; parts: HTML."""
    name = html.escape(title)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    lines = [
        "<!doctype html>",
        f'<html lang="en"><head>{head}<title>{name}</title>',
        f"<style>{STYLE}{style}</style>",
        "</head><body>",
        *parts,
    ]
    return "\n".join([*lines, *([SORT] if any("data-sorts" in part for part in parts) else []), "</body></html>", ""])


def table(rows: Sequence[Sequence[object]], columns: Sequence[object] = ()) -> str:
    """As HTML, whatever the cells hold. columns: names by which it sorts; none: it has no head."""
    head = "".join(f'<th data-sorts="">{html.escape(str(name))}</th>' for name in columns)
    lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    kind = "" if columns else ' class="said"'
    body = f"{f'<tr>{head}</tr>' if columns else ''}{''.join(f'<tr>{line}</tr>' for line in lines)}"
    return f'<div class="wide"><table{kind}>{body}</table></div>'


def plots(drawn: Mapping[str, str]) -> str:
    """As HTML, two beside each other where there is room. drawn: {title: SVG}, see `figures.svg`."""
    parts = (f"<section><h2>{html.escape(title)}</h2>{svg}</section>" for title, svg in drawn.items())
    return f'<div class="plots">{"".join(parts)}</div>'


def write_page(path: str | Path, text: str) -> None:
    """Whole or not at all. Raises UsageError."""
    try:
        write_atomically(Path(path), text)
    except OSError as problem:
        raise UsageError(f"cannot write {path}: {problem.strerror}") from problem

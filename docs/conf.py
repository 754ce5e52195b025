"""The site: `make docs` builds it into build/site of the README, the pages in docs/ and the docstrings of what is
public.

Its folder of sources is the repository, so that pages link to each other and to files as they do on a git host.
"""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import mest_compile
from mest_compile.base import errors

ROOT = Path(__file__).resolve().parents[1]

# Every page, by the captions of the contents beside it; the README is the first one.
PAGES = {
    "Start": ("docs/getting-started", "docs/my-data", "docs/own-model", "docs/personalise", "docs/models"),
    "Training": ("docs/method", "docs/schemes", "docs/finetuning", "docs/sweeps", "examples/flower/README"),
    "Devices": ("docs/devices", "docs/arm", "docs/opencl", "docs/memory", "docs/planning", "docs/tuning"),
    "Examples": ("docs/keyword-spotting", "docs/wearable-activity"),
    "Figures": ("docs/results", "docs/leaderboard", "docs/benchmarks"),
    "Reference": ("docs/api", "docs/errors", "docs/architecture", "CONTRIBUTING", "SECURITY", "CHANGELOG"),
}

project = "mest-compile"
version = release = mest_compile.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
include_patterns = ["*.md", "docs/*.md", "examples/*/*.md"]
root_doc = "README"
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
smartquotes = False  # what stands in quotes is to be typed so
myst_heading_anchors = 4
autodoc_typehints = "none"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100

# Docstrings here are plain text: paragraphs, and lines "name  what it is", whose further lines are indented.
TERM = re.compile(r"([\w.*]+(?:, [\w.*]+)*) {2,}(\S.*)")


def as_rst(lines: list[str]) -> Iterator[str]:
    """A docstring's lines as reStructuredText: terms become a list of definitions, what is indented otherwise stays as
    it is written."""
    defining = written = False
    for line in lines:
        indented, text = line.startswith(" "), plain(line.strip())
        if term := TERM.fullmatch(line):
            yield from ("", f"``{term[1]}``", f"    {plain(term[2])}")
            defining, written = True, False
        elif not text:
            yield ""
            defining = written = False
        elif indented and defining:
            yield f"    {text}"
        elif indented:
            yield from () if written else ("", "::", "")
            yield f"    {line}"
            written = True
        else:
            yield from ("",) if defining or written else ()
            yield text
            defining = written = False


def plain(text: str) -> str:
    """Text of a docstring with what reStructuredText would take for markup escaped; `code` stays code."""
    parts = re.split(r"(`[^`]+`)", text)
    escaped = (re.sub(r"([\\*_|`])", r"\\\1", part) for part in parts[::2])
    code = [f"`{part}`" for part in parts[1::2]]
    # A backslash and a space are nothing, but part code from the letters around it.
    return "".join(f"{part}\\ {one}\\ " for part, one in zip(escaped, code, strict=False)) + re.sub(
        r"([\\*_|`])", r"\\\1", parts[-1]
    )


def messages() -> dict[str, list[str]]:
    """{class of error: the messages with which the package raises it, sorted, with ... for what they name}."""
    found: dict[str, set[str]] = {}
    for path in [*(ROOT / "mest_compile").rglob("*.py"), *(ROOT / "schedules").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(call := node.exc, ast.Call) and call.args:
                name, text = ast.unparse(call.func), literal(call.args[0])
                if hasattr(errors, name) and len(text.replace("...", "")) > 10:
                    found.setdefault(name, set()).add(text)
    return {name: sorted(found[name], key=str.lower) for name in sorted(found)}


def literal(node: ast.expr) -> str:
    """What an expression of text says, with ... for what is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(literal, node.values))
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "..."


def contents() -> str:
    """The tables of contents that stand beside every page."""
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n" + "\n".join(pages) + "\n```\n"
        for caption, pages in PAGES.items()
    )


def setup(app):
    from docutils import nodes
    from sphinx.util.docutils import SphinxDirective

    class Messages(SphinxDirective):
        """Every message of every error, by class."""

        def run(self):
            parts = []
            for name, texts in messages().items():
                section = nodes.section("", nodes.title(name, name), ids=[f"messages-of-{name.lower()}"])
                items = [nodes.list_item("", nodes.paragraph(text, text)) for text in texts]
                section += nodes.bullet_list("", *items)
                parts.append(section)
            return parts

    def read(app, name, source):
        if name == root_doc:
            source[0] += contents()

    def document(app, kind, name, item, options, lines):
        lines[:] = as_rst(dedent("\n".join(lines)).splitlines())

    def finish(app, problem):
        if problem is None:
            shutil.copy(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))

    app.add_directive("messages", Messages)
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", document)
    app.connect("build-finished", finish)

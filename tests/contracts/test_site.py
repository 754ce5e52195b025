"""What `make docs` builds: every page is in it, every public name, every error, and no warning."""

import ast
import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import mask_pictures
import pytest

import mest_compile as mest
from mest_compile.base.errors import MestError
from mest_compile.devices import emulation
from mest_compile.sparsity import parse_scheme
from mest_compile.sparsity.scheme import SCHEMES

ROOT = Path(__file__).resolve().parents[2]
SITE = runpy.run_path(str(ROOT / "docs" / "conf.py"))


def shipped(kind) -> bool:
    """What no other test plugged in."""
    return (ROOT / "mest_compile") in Path(inspect.getfile(kind)).parents


def test_every_page_is_in_the_contents():
    listed = [page for pages in SITE["PAGES"].values() for page in pages]
    found = {
        path.relative_to(ROOT).with_suffix("").as_posix()
        for part in SITE["include_patterns"]
        for path in ROOT.glob(part)
    }
    assert sorted([*listed, SITE["root_doc"]]) == sorted(found), "docs/conf.py: PAGES"


def test_the_page_on_python_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    named = [line.split("mest_compile.")[1] for line in page.splitlines() if line.startswith(".. auto")]
    public = {name for name in dir(mest) if not name.startswith("_") and shipped(getattr(mest, name))}
    classes = {"runtime.step.TrainStep", "measuring.table.SpeedTable"}
    assert sorted(named) == sorted(public | classes)


def test_the_page_on_errors_has_every_kind():
    page = (ROOT / "docs" / "errors.md").read_text()
    kinds, known = {MestError, emulation.EmulationTimeout}, set()
    while kinds:
        kind = kinds.pop()
        known.add(kind.__name__)
        kinds |= set(filter(shipped, kind.__subclasses__()))
        what = kind.__doc__.partition(" `")[0]
        assert f"| `{kind.__name__}` | {kind.exit_code} | {what}" in page.replace("\n", " "), kind
    assert known == {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert any("..." in text for text in SITE["messages"]()["UsageError"])


def test_docstrings_are_shown_as_they_are_meant():
    written = "\n".join(
        SITE["as_rst"](["Takes *any* a_ of `x`.", "a, b  one", "      two", "Raises E.", "", "  s = 1"])
    )
    assert written == (
        "Takes \\*any\\* a\\_ of \\ ``x``\\ .\n\n``a, b``\n    one\n    two\n\nRaises E.\n\n\n::\n\n      s = 1"
    )


def test_messages_say_what_is_named_with_dots():
    call = ast.parse('f"{name}: no " + "such file" + why').body[0].value
    assert SITE["literal"](call) == "...: no such file..."


def test_the_page_on_schemes_has_a_picture_of_each():
    assert {type(parse_scheme(name)) for name in mask_pictures.SHOWN} == set(filter(shipped, SCHEMES.load().values()))
    assert mask_pictures.PICTURE.read_text() == mask_pictures.draw(), "run python benchmarks/mask_pictures.py"
    assert f"](pictures/{mask_pictures.PICTURE.name})" in (ROOT / "docs" / "schemes.md").read_text()


@pytest.mark.docs
def test_the_site_builds_without_a_warning(tmp_path):
    asked = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "trees", "-c", "docs", "."]
    done = subprocess.run([*asked, tmp_path / "site"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "index.html").read_text() == (tmp_path / "site" / "README.html").read_text()
    shown = (tmp_path / "site" / "docs" / "api.html").read_text()
    for name in ("mest_compile.compile", "TrainStep.set_masks", "Trainer.fit", "mest_compile.BCE"):
        assert f'{name}"' in shown, name
    assert "takes no arguments, got" in (tmp_path / "site" / "docs" / "errors.html").read_text()

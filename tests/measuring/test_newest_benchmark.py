"""benchmarks/newest.py: what is asked of other versions, and what is allowed of what came of it."""

import json
import tomllib

import newest
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((newest.ROOT / "pyproject.toml").read_text())["project"]


def test_everything_is_installed_but_torch_which_comes_first():
    names = [Requirement(text).name for text in newest.requirements(PROJECT)]
    assert "torch" not in names and {"apache-tvm", "pytest", "sphinx", "onnx"} <= set(names)
    assert PROJECT["name"] not in names


def test_what_failed_and_what_was_skipped_is_told_apart(tmp_path):
    cases = '<testcase classname="a" name="b"/><testcase classname="a" name="c"><skipped/></testcase>'
    wrong = '<testcase classname="a" name="d"><failure/></testcase><testcase classname="" name="e"><error/></testcase>'
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}{wrong}</testsuite></testsuites>")
    assert newest.outcome(tmp_path / "tests.xml") == {"passed": 1, "skipped": 1, "failed": ["a::d", "::e"]}


def test_what_pyproject_allows_has_been_tried():
    tried = json.loads(newest.RESULTS.read_text())["entries"].values()
    good = [entry["versions"] for entry in tried if not entry["failed"] and entry["passed"] > 100]
    (torch,) = (Requirement(text) for text in PROJECT["dependencies"] if text.startswith("torch"))
    (bound,) = (Version(one.version) for one in torch.specifier if one.operator == "<")
    latest = max(Version(versions["torch"]) for versions in good)
    assert latest in torch.specifier and (latest.major, latest.minor + 1) == (bound.major, bound.minor)
    pythons = {".".join(versions["python"].split(".")[:2]) for versions in good}
    named = {
        text.rpartition(" ")[2]
        for text in PROJECT["classifiers"]
        if text.startswith("Programming Language :: Python :: 3.")
    }
    assert named - {"3.11"} <= pythons, "CI runs 3.11; others are named when they have been tried"

"""Misspelt names say what was meant; sizes and shares are read as they are written."""

import os
import re
import shutil
from pathlib import Path

import pytest

import mest_compile as mest
from mest_compile.base import checks, plugins
from mest_compile.base.errors import TargetError, UnknownName, UsageError
from mest_compile.base.names import meant, near
from mest_compile.cli import _plugins_first
from mest_compile.hardware import target
from mest_compile.hardware.target import boards_of_targets, find_target, target_names
from mest_compile.options import StepOptions
from mest_compile.training.recipe import Recipe


def test_the_nearest_name_is_offered_and_none_where_none_is_near():
    there = ["lr", "label_smoothing", "epochs", "Block"]
    assert near("epoch", there) == "epochs" and near("BLOK", there) == "Block" and near("xyz", there) is None
    assert near("learning_rate", there) == near("Learning-Rate", there) == "lr" and near("wd", there) is None
    assert meant("epoch", there) == "; did you mean 'epochs'?" and meant("xyz", there) == ""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: StepOptions(sparsity=90), "did you mean 0.9?"),
        (lambda: mest.check("mobilenet-v2", (1, 3, 32, 32)), "did you mean 'mobilenetv2'"),
        (lambda: find_target("rasberry-pi-4"), "did you mean 'raspberrypi4'?"),
        (lambda: Recipe.from_dict({"epochs": 2, "learning_rate": 0.1}), "did you mean 'lr'?"),
        (lambda: Recipe.from_dict({"epochs": 2, "momentum": 0.9}), "it belongs to the optimizer"),
        (lambda: Recipe(2, method="ems"), "did you mean 'em_s'?"),
    ],
)
def test_what_was_meant_is_said(call, said):
    with pytest.raises(mest.MestError) as caught:
        call()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("value", "wanted"), [(7, 7), ("7", 7), ("64MiB", 64 * 2**20), ("1.5 kb", 1500), (".5GiB", 2**29)]
)
def test_sizes(value, wanted):
    assert checks.size("memory", value) == wanted
    assert StepOptions(memory_budget=value).memory_budget == wanted


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1.5", "many", "3 XiB", None])
def test_what_is_no_size(value):
    with pytest.raises(UsageError, match='memory is .*; wanted bytes, a whole number or a text such as "64MiB"'):
        checks.size("memory", value)


def test_boards_are_targets_by_any_spelling_and_no_two_share_one():
    assert find_target("raspberry-pi-4") == find_target("Raspberry Pi 4") == find_target("cortex-a72")
    assert find_target("pi5").name == "cortex-a76" and find_target("zero-2w").name == "cortex-a53"
    boards = boards_of_targets()
    assert len(boards) > 10 and set(boards.values()) <= set(target_names()) and not set(boards) & set(target_names())


def test_a_targets_file_with_an_error_names_itself(tmp_path, monkeypatch, mest_compile_command):
    file = tmp_path / "mine.toml"
    good = "device = 'cpu'\nvector = 4\nregisters = 32\nl1_bytes = '32KiB'\nl2_bytes = 262144\ncores = 4\n"
    tail = "[llvm]\nkind = 'llvm'\n"
    file.write_text(good + "memory_bytes = '1GiB'\nboards = ['mine']\n" + tail)
    found = find_target(file)
    assert (found.l1_bytes, found.memory_bytes) == (32768, 2**30)
    for text, said in (
        (good + "vectr = 4\n" + tail, "mine.toml has no key 'vectr'; did you mean 'vector'?"),
        (good.replace("vector = 4", "vector = 3") + tail, "'mine': vector is 3 floats"),
        (good.replace("32KiB", "32Kilo") + tail, "mine.toml: l1_bytes is '32Kilo'"),
        (good, "mine.toml lacks 'llvm'"),
        ("device = ", "mine.toml is not a target: Invalid value"),
    ):
        file.write_text(text)
        with pytest.raises(TargetError) as caught:
            find_target(file)
        assert said in str(caught.value)
    shipped = tmp_path / "shipped"
    shutil.copytree(Path(mest.__file__).parent.parent / "targets", shipped, ignore=shutil.ignore_patterns("*.py*"))
    (shipped / "broken.toml").write_text("device = ")
    with monkeypatch.context() as patch:
        patch.setattr(target.resources, "files", lambda package: shipped)
        ran = mest_compile_command("targets", "--json")
        listed = {one["name"] for one in ran.document}
        assert ran.code == 1 and "broken.toml is not a target" in ran.err and ran.err.count("\n") == 1
        assert listed == set(target_names()) - {"broken"} and "cortex-a72" in listed
    with pytest.raises(UnknownName, match="boards as `mest-compile targets` lists them"):
        find_target("nothing-like-it")


def test_a_target_that_is_plugged_in_has_a_name_and_what_is_no_plug_in_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_targets", {})
    monkeypatch.setenv(plugins.GIVEN, "")
    mine = tmp_path / "mine.toml"
    shipped = (Path(mest.__file__).parent.parent / "targets" / "cortex-a72.toml").read_text()
    mine.write_text(re.sub("^boards = .*$", "boards = ['My Board']", shipped, flags=re.MULTILINE))
    mest.plug_in(mine)
    mest.plug_in(mine)  # nothing more
    assert os.environ[plugins.GIVEN] == str(mine)  # what processes that are started read
    assert find_target("mine").name == find_target("my-board").name == "mine" and "mine" in target_names()
    monkeypatch.setattr(plugins, "_targets", {})
    assert find_target("mine").registers == find_target("cortex-a72").registers  # as in one that was started
    (tmp_path / "bad.py").write_text("import nothing_like_it")
    for name, said in (("bad.py", "cannot be imported: ModuleNotFoundError"), ("no.py", "is no Python file and no")):
        with pytest.raises(UsageError, match=said):
            mest.plug_in(tmp_path / name)
    assert _plugins_first(["train", "--plugin", "a.py", "--lr", "1", "--plugin=b.toml", "--plugin"]) == [
        "--plugin", "a.py", "--plugin=b.toml", "--plugin", "train", "--lr", "1",
    ]  # fmt: skip

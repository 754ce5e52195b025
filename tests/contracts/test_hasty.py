"""Which files and tests a mark is for or are hasty, by their names; and what haste leaves out."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import HASTY, MARKS, READ_ANEW, SAMPLED, THOROUGH
from hasty import compile_hastily, remember_own_nets
from torch import nn

from mest_compile.frontend.remembered import key_of
from mest_compile.hardware.target import find_target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import kernel_source
from mest_compile.models.catalog import build_model
from mest_compile.operators.add import AddForward

TESTS = Path(__file__).parents[1]


def test_every_name_in_the_lists_of_files_is_one():
    missing = [name for name in HASTY if not list(TESTS.glob(f"{name}.py"))]
    missing += [name for names in MARKS.values() for name in names if not list(TESTS.glob(f"*/{name}.py"))]
    missing += [name for name in THOROUGH if not (TESTS / name.partition("::")[0]).exists()]
    missing += [name for name in READ_ANEW if not (TESTS / name).is_dir()]
    assert not missing


def test_thorough_tests_are_there():
    sampled = [f"{file}.py::test_{name}[" for file, families in SAMPLED.items() for name in families]
    for name in (*THOROUGH, *sampled):
        file, _, test = name.partition("::")
        function = test.partition("[")[0]
        texts = [path.read_text() for path in (TESTS / file).parent.glob("*.py")]  # a file may take on another's
        assert any(re.search(rf"^def {function}", text, re.MULTILINE) for text in texts), name


def test_hasty_code_has_the_usual_names_and_computes_the_same_by_other_instructions(tmp_path, monkeypatch):
    import tvm

    image = Image(3, 4, 5, 8)
    source = kernel_source("add.forward", AddForward(image, image, image), find_target("local"))
    ones, code = np.ones(image.elems, np.float32), []
    for kind in ("usual", "hasty"):
        if kind == "hasty":
            compile_hastily(monkeypatch, tmp_path)
        builder, tensors = Builder(tmp_path / kind), [tvm.runtime.tensor(ones * value) for value in (1, 2, 0)]
        builder.function(source)(*tensors)
        np.testing.assert_array_equal(tensors[2].numpy(), 3 * ones)
        code.append(builder.objects([source]))
    usual, hasty = code
    assert usual.keys() == hasty.keys() and usual != hasty
    assert objects_of_a_process(tmp_path / "other") == hasty


PROCESS = """
import sys
from pathlib import Path
from mest_compile.frontend.remembered import key_of
from mest_compile.hardware.target import find_target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import kernel_source
from mest_compile.operators.add import AddForward

image = Image(3, 4, 5, 8)
source = kernel_source("add.forward", AddForward(image, image, image), find_target("local"))
print(Builder(Path(sys.argv[1])).objects([source]))
"""


def objects_of_a_process(folder):
    command = [sys.executable, "-c", PROCESS, folder]
    return ast.literal_eval(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Net(nn.Sequential):
    pass


class Other(nn.Sequential):
    pass


def test_nets_of_tests_have_keys_of_their_own_and_those_made_in_functions_none(monkeypatch, tmp_path):
    class Local(nn.Sequential):
        pass

    nets = [kind(nn.Linear(3, 2)) for kind in (Net, Net, Other, Local, type("Net", (Net,), {}))]
    assert {key_of(net, (4, 3)) for net in nets} == {None}
    remember_own_nets(monkeypatch, tmp_path)
    one, same, other, *unknown = (key_of(net, (4, 3)) for net in nets)
    assert one == same and None not in (one, other) and one != other and unknown == [None, None]


def test_nets_of_packages_keep_their_keys(monkeypatch, tmp_path):
    """Built-in ones have classes that are made in functions."""
    net = build_model("resnet20", (1, 3, 8, 8))
    usual = key_of(net, (1, 3, 8, 8))
    remember_own_nets(monkeypatch, tmp_path)
    there = key_of(net, (1, 3, 8, 8))
    assert None not in (usual, there) and there == key_of(build_model("resnet20", (1, 3, 8, 8)), (1, 3, 8, 8))

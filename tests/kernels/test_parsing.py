"""Kernel text is read as TVM itself reads it."""

import ast
import threading
import time
from contextlib import suppress

import pytest
import torch

from mest_compile.frontend import import_model
from mest_compile.hardware.target import find_target
from mest_compile.kernels import choosing
from mest_compile.kernels.reader import parse
from mest_compile.kernels.source import SCHEDULES
from mest_compile.models.catalog import build_model
from mest_compile.operators.activation import ACTIVATIONS
from mest_compile.operators.losses.cross_entropy import CrossEntropy
from mest_compile.operators.losses.mse import MSE
from mest_compile.operators.optimizers.adamw import AdamW
from mest_compile.operators.optimizers.sgd import SGD
from mest_compile.planning.facts import Facts
from mest_compile.planning.layers import plan_layers
from mest_compile.records.log import Records
from mest_compile.sparsity import parse_scheme

SHAPE = (8, 3, 32, 32)
CASES = [
    ("odd", "channel", MSE(), AdamW()),
    ("resnet20", "pattern", CrossEntropy(), SGD()),
    ("vgg11", "block", CrossEntropy(), SGD()),
]


class Odd(torch.nn.Module):
    """What the built-in models have not: average pooling, a sum without normalisation, every activation, an image that
    is flattened."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (torch.nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8))
        self.last = torch.nn.Linear(8 * 256, 10)

    def forward(self, images):
        found = torch.nn.functional.avg_pool2d(torch.relu(self.one(images)), 2)
        found = torch.relu(self.two(found) + found)
        for name in ACTIVATIONS.load():
            found = getattr(torch.nn.functional, name)(found)
        return self.last(torch.flatten(found, 1))


def sources(model, scheme, loss, optimizer, target):
    """One of every kind of kernel in the steps of a model."""
    graph, _ = import_model(Odd() if model == "odd" else build_model(model, SHAPE, 10, 8), SHAPE)
    layers = plan_layers(graph, parse_scheme(scheme), 0.8, "uniform", None, target)
    programs = Facts(graph, layers, frozenset(), optimizer, target, 1, 0, loss).lower()
    calls = choosing.sources(
        programs, target, choosing.choose_knobs(programs, layers, target, Records(target))
    ).values()
    return {source.kernel: source for each in calls for source in each.values()}


@pytest.mark.parametrize("name", ["local", "opencl"])
def test_every_kind_of_kernel_is_the_function_that_tvm_reads(name):
    import tvm
    import tvm_ffi
    from tvm.script import tirx

    target, read = find_target(name).for_batch(SHAPE[0]), set()
    for case in CASES:
        for kernel, source in sources(*case, target).items():
            if f"{target.device}/{kernel}" in read:
                continue
            theirs = tvm.script.from_source(source.text, extra_vars={"T": tirx}).with_attr(
                "global_symbol", source.symbol
            )
            assert tvm_ffi.structural_equal(parse(source.text, source.symbol), theirs), kernel
            read.add(f"{target.device}/{kernel}")
    assert {schedule for schedule in SCHEDULES if schedule.startswith(target.device)} == read


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("while True: y[0] = x[0]", "SyntaxError: line 4: a kernel has no While"),
        ("y[0] = z[0]", "NameError: line 4: nothing has the name z"),
        ("z = y[0] + x[0]", "SyntaxError: line 4: a name of a value is written `name: T.let = value`"),
    ],
)
def test_what_is_not_of_a_kernel_is_refused_with_its_line(line, said):
    text = (
        "@T.prim_func\ndef kernel(x: T.Buffer((4,), 'float32'), y: T.Buffer((4,), 'float32')):\n    "
        "T.func_attr({})\n    "
    )
    with pytest.raises((SyntaxError, NameError)) as error:
        parse(text + line, "kernel")
    assert f"{error.type.__name__}: {error.value}" == said


def test_threads_read_syntax_one_after_another(monkeypatch):
    """Two syntax trees made at once are a SystemError of CPython before 3.11.8."""
    inside, most = [], []

    def slow(text):
        inside.append(text)
        time.sleep(0.05)
        most.append(len(inside))
        inside.pop()
        raise SyntaxError

    def read():
        with suppress(SyntaxError):
            parse("", "kernel")

    monkeypatch.setattr(ast, "parse", slow)
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4

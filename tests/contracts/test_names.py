"""What buffers and calls are of is said by them: nobody takes their names apart."""

import ast
import re
from pathlib import Path

import pytest

from mest_compile.frontend import import_model
from mest_compile.models.catalog import build_model
from mest_compile.options import StepOptions
from mest_compile.planning.plan import plan_step

ROOT = Path(__file__).resolve().parents[2]
APART = {"partition", "rpartition", "removeprefix", "removesuffix", "split", "rsplit", "startswith", "endswith"}
FOLDERS = (
    "operators",
    "lowering",
    "planning",
    "kernels",
    "backends",
    "runtime",
    "devices",
    "measuring",
    "tuning",
    "training",
)


def taken_apart(code: str) -> list[str]:
    """Expressions that take apart what is called "name" of a call or a buffer."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in APART
        and isinstance(named := node.func.value, ast.Attribute)
        and named.attr == "name"
        and re.search(r"(\bcall|\bbuffer|\bplace|\btask|buffers\[.*\])$", ast.unparse(named.value))
    ]


def test_no_module_takes_names_apart():
    paths = [path for folder in FOLDERS for path in (ROOT / "mest_compile" / folder).rglob("*.py")]
    paths += [*(ROOT / "schedules").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert len(paths) > 100
    assert not {str(path): found for path in paths if (found := taken_apart(path.read_text()))}


@pytest.mark.parametrize(
    "line", ['call.name.rpartition(".")[2]', 'call.buffers[0].name.partition(":")[0]', 'buffer.name.endswith(":x")']
)
def test_a_name_that_is_taken_apart_is_noticed(line):
    assert taken_apart(line) and not taken_apart("call.name + path.name.removesuffix('.toml')")


@pytest.mark.parametrize("scheme", ["block", "channel", "filter", "pattern", "unstructured"])
def test_buffers_and_calls_say_what_they_are_of(scheme):
    shape = (2, 3, 8, 8)
    graph, _ = import_model(build_model("resnet20", shape, 10, 16), shape)
    plan = plan_step(graph, StepOptions(scheme, 0.6, target="arm_cpu"))
    program, layers = plan.train, plan.layers
    held = [buffer for buffer in program.held() if buffer.layer]
    assert {buffer.layer for buffer in held} == layers.keys() and {"", "gradient", "momentum"} <= {
        buffer.role for buffer in held
    }
    assert all(buffer.name == f"{buffer.layer}:{buffer.role}".removesuffix(":") for buffer in held)
    convolutions = [call for call in program.calls if call.phase in ("forward", "grad_weight", "grad_input")]
    assert all(call.name.endswith(f".{call.phase}") for call in program.calls if call.phase)
    assert all(
        call.layer and call.kernel.endswith(".grad" if call.phase == "grad_weight" else ".conv")
        for call in convolutions
    )
    first = next(iter(layers))  # nobody asks for the gradient of its input
    assert {(call.layer, call.phase) for call in convolutions} == {
        (name, phase)
        for name in layers
        for phase in ("forward", "grad_weight", "grad_input")
        if (name, phase) != (first, "grad_input")
    }

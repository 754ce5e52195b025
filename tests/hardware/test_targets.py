"""Every target file says what a device is, and LLVM knows the CPU it names."""

from dataclasses import replace

import pytest

import mest_compile as mest
from mest_compile.base.errors import TargetError
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.target import find_target, target_names
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.source import kernel_source
from mest_compile.operators.layers.gather import GatherConv, Pass

ARM = [
    name for name in target_names() if find_target(name).tvm_fields.get("mtriple", "").startswith(("aarch64", "arm"))
]


def test_the_arm_targets_are_there():
    assert set(ARM) >= {"arm_cpu", "cortex-a53", "cortex-a72", "cortex-a76", "cortex-x1", "android-arm64"}


@pytest.mark.parametrize("name", target_names())
def test_llvm_knows_the_cpu_of_every_target(name, capfd):
    target = find_target(name)
    assert str(target.to_tvm().kind.name) == target.tvm_fields["kind"]
    assert capfd.readouterr().err == ""  # where LLVM says that it does not


@pytest.mark.parametrize("name", ARM)
def test_arm_targets_have_neon_and_say_how_much_memory_there_is(name):
    target = find_target(name)
    assert target.vector == 4 and target.registers == (32 if "aarch64" in target.tvm_fields["mtriple"] else 16)
    assert target.l1_bytes < target.l2_bytes < (target.memory_bytes or 0)


@pytest.mark.slow
def test_a_step_beyond_the_memory_of_its_target_is_said(caplog):
    """At its densest: with room to grow it needs more than it starts with."""

    def said():
        """Torch's own log has records too, once another test has raised its level."""
        return [record for record in caplog.records if record.name.startswith("mest_compile")]

    target, shape = find_target("arm_cpu"), (8, 1, 8, 8)
    need = mest.compile("mlp", shape, target=target).memory()["total"]
    at_capacity = mest.compile("mlp", shape, target=target, grow_to=0.5).memory(at_capacity=True)["total"]
    assert need < at_capacity and not said()
    for limit, options in ((need, {}), (at_capacity, {"grow_to": 0.5})):
        mest.compile("mlp", shape, target=replace(target, memory_bytes=limit), **options)
        assert not said()
        mest.compile("mlp", shape, target=replace(target, memory_bytes=limit - 1), **options)
        (record,) = said()
        assert "the smallest device of target 'arm_cpu' has" in record.getMessage()
        caplog.clear()


@pytest.mark.parametrize(
    ("target", "device", "said"),
    [("arm_cpu", "opencl", "'opencl', which has a table .gpu."), ("mali", "cpu", "'cpu', which has no table .gpu.")],
)
def test_a_target_that_is_not_what_its_kind_of_device_needs_is_refused(target, device, said):
    with pytest.raises(TargetError, match=said):
        backend_of(replace(find_target(target), device=device))


def test_a_cpu_that_llvm_does_not_know_is_refused_with_those_it_does(tmp_path):
    fields = dict(find_target("cortex-a76").llvm) | {"mcpu": "cortex-a760"}
    target = replace(find_target("cortex-a76"), llvm=tuple(sorted(fields.items())))
    image = Image(4, 4, 4, 4, (0, 0, 0, 0), 4)
    source = kernel_source("gather.conv", GatherConv(image, image, 1, 1, (1, 1), (Pass((4, 4)),), 4), target)
    with pytest.raises(TargetError, match="no CPU 'cortex-a760' for aarch64-linux-gnu; it has: .*cortex-a76,"):
        Builder(folder=tmp_path).function(source)

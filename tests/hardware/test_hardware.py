"""What the machine at hand tells about itself, and what a batch makes of it."""

from dataclasses import replace
from importlib import resources

import numpy as np
import pytest

import mest_compile as mest
from mest_compile.base.errors import TargetError
from mest_compile.devices import probe
from mest_compile.hardware import cpu as processor
from mest_compile.hardware import host
from mest_compile.hardware import target as targets
from mest_compile.hardware.cpu import host_cpu, host_machine, host_model, lacking_features
from mest_compile.hardware.target import find_target, needed_features
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.linkers import linkers
from mest_compile.models.catalog import build_model

SSE = "cmov cx8 cx16 popcnt sse sse2 pni ssse3 sse4_1 sse4_2"
AVX2 = f"{SSE} avx avx2 f16c fma bmi1 bmi2 abm movbe"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl avx512cd"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (f"flags\t\t: {AVX512} avx512_vp2intersect avx_vnni", ("x86-64-v4", 16)),  # Zen 5
        (f"flags\t\t: {AVX512} avx_vnni amx_tile", ("x86-64-v4", 16)),  # Sapphire Rapids
        (f"flags\t\t: {AVX512} avx512_vp2intersect", ("x86-64-v4", 8)),  # Tiger Lake
        (f"flags\t\t: {AVX512}", ("x86-64-v4", 8)),
        (f"flags\t\t: {AVX2}", ("x86-64-v3", 8)),
        ("flags\t\t: sse4_2", ("x86-64-v2", 4)),
        ("Features\t: fp asimd", ("generic", 4)),
    ],
)
def test_feature_flags_decide_cpu_and_vector(tmp_path, monkeypatch, line, found):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    assert host_cpu() == found


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes this machine an x86 with those flags."""
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    for module in (processor, targets):
        monkeypatch.setattr(module, "host_machine", lambda: "x86_64")
    return lambda flags: (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")


def x86(**llvm):
    return replace(
        find_target("avx2"), llvm=tuple(sorted({"kind": "llvm", "mtriple": "x86_64-linux-gnu", **llvm}.items()))
    )


def test_avx512_code_needs_no_more_than_avx512(machine):
    machine(AVX512)
    needed = needed_features(x86(mcpu="x86-64-v4"))
    assert lacking_features(needed) == []
    machine(AVX2)
    assert lacking_features(needed) == ["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"]


@pytest.mark.parametrize(("cpu", "flags"), [("x86-64-v2", SSE), ("x86-64-v3", AVX2), ("x86-64-v4", AVX512)])
def test_llvm_uses_no_more_of_a_cpu_that_was_detected_than_the_flags_that_told_it(cpu, flags, machine):
    machine(flags)
    assert host_cpu()[0] == cpu
    assert lacking_features(needed_features(x86(mcpu=cpu))) == []
    for flag in ("movbe", "abm", "avx512cd"):
        machine(" ".join(word for word in flags.split() if word != flag))  # a hypervisor hides it
        assert lacking_features(needed_features(x86(mcpu=host_cpu()[0]))) == []


@pytest.mark.parametrize(
    ("llvm", "lacks"),
    [
        ({"mcpu": "bdver1"}, ["fma4", "sse4a", "xop"]),
        ({"mcpu": "bdver4"}, ["fma4", "sse4a", "tbm", "xop"]),
        ({"mcpu": "x86-64-v3", "mattr": ("+xop", "-sse4a", "-fma4")}, []),
        ({"mcpu": "x86-64-v3", "mattr": ("+avx512f",)}, ["avx512f"]),
        ({"mattr": ("+avx2",)}, []),
        ({"mcpu": "znver3"}, ["sse4a"]),
        ({"mcpu": "haswell"}, []),
        ({}, []),
    ],
)
def test_what_a_cpu_has_is_asked_of_llvm_whatever_cpu_it_is(llvm, lacks, machine):
    """And what only a program would ask for by name, which these flags have none of, does not matter."""
    machine(AVX2)
    assert lacking_features(needed_features(x86(**llvm))) == lacks


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("cortex-a53", {"asimd"}),
        ("cortex-a76", {"asimd", "atomics", "fphp", "asimdhp", "asimddp"}),
        ("armv7", {"neon", "vfpv4"}),
        ("android-arm64", {"asimd"}),
        ("mali", set()),
        ("avx2", None),
    ],
)
def test_features_of_the_shipped_targets(name, needs):
    found = needed_features(find_target(name))
    assert found == needs if needs is not None else {"avx2", "fma", "bmi2"} <= found


@pytest.fixture
def foreign_file(tmp_path):
    """A target file for an x86 that is not made any more."""
    text = (resources.files("mest_compile.targets") / "avx2.toml").read_text()
    (tmp_path / "other.toml").write_text(text.replace('mcpu = "x86-64-v3"', 'mcpu = "bdver1"'))
    return tmp_path / "other.toml"


@pytest.mark.skipif(
    host_machine() != "x86_64" or "xop" in host.told(host.CPUINFO), reason="this machine has what the file asks for"
)
def test_a_target_file_for_another_cpu_is_refused_before_anything_runs(foreign_file, mest_compile_command, tmp_path):
    step = mest.compile("mlp", (8, 64), scheme="unstructured", target=foreign_file, builder=Builder(tmp_path / "cache"))
    with pytest.raises(
        mest.MestError, match="cannot run what is compiled for other .this machine's CPU lacks .*xop.; give device="
    ):
        step(np.ones((8, 64), np.float32), np.arange(8) % 4)
    assert not list((tmp_path / "cache").glob("*"))
    for command in (
        ["train", "--data", "digits", "--out", tmp_path / "run"],
        ["tune", "--log", tmp_path / "log"],
        ["table"],
    ):
        ran = mest_compile_command(*command, "--model", "mlp", "--target", foreign_file)
        assert ran.code == 2 and "xop" in ran.err and "tracker and" in ran.err.replace("--", ""), command
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.toml"]


def test_lists_of_features_work_wherever_targets_do(tmp_path):
    text = (resources.files("mest_compile.targets") / "avx2.toml").read_text()
    llvm = 'mtriple = "x86_64-linux-gnu"\nmcpu = "x86-64-v2"\nmattr = ["+avx2", "+fma"]'
    (tmp_path / "more.toml").write_text(text.replace('mcpu = "x86-64-v3"', llvm))
    target = find_target(tmp_path / "more.toml")
    assert {"avx2", "fma"} <= needed_features(target) and target.tvm_fields["mattr"] == ["+avx2", "+fma"]
    if linkers("x86_64"):
        assert probe._reader(target)[1].startswith(b"\x7fELF")  # what a device is asked with
    if host_machine() == "x86_64" and not lacking_features(needed_features(target)):
        step = mest.compile("mlp", (8, 64), scheme="unstructured", target=target, threads=1)
        loss = step(np.ones((8, 64), np.float32), np.arange(8) % 4, lr=0.0).loss
        step.save(tmp_path / "step")
        again = mest.load(tmp_path / "step")
        assert (
            again._compiled.facts.target == target
            and again(np.ones((8, 64), np.float32), np.arange(8) % 4).loss == loss
        )


def test_a_system_that_tells_nothing_of_its_cpu_costs_a_message(tmp_path, monkeypatch):
    """As on macOS, which has neither /proc nor getauxval."""
    for name in ("CPUINFO", "BOARD", "CACHES", "STATUS"):
        monkeypatch.setattr(host, name, tmp_path / "none")
    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: object())
    host_model.cache_clear()
    assert host_model() == "" and processor.cache_bytes(1) is None and host.resident_bytes() is None
    host_model.cache_clear()
    monkeypatch.setattr(processor, "host_machine", lambda: "aarch64")
    assert host.hardware_bits() is None and lacking_features(["asimd"]) == ["asimd"]
    with pytest.raises(TargetError, match="write a TOML target"):
        host_cpu()


def test_a_cpu_without_vectors_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu sse\n")
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    with pytest.raises(TargetError, match="none of AVX2"):
        host_cpu()


@pytest.mark.parametrize(
    ("vector", "batch", "used"),
    [(16, 64, 16), (16, 16, 16), (16, 15, 16), (16, 8, 8), (16, 24, 8), (16, 3, 8), (8, 3, 8), (4, 1, 4)],
)
def test_vectors_wider_than_eight_floats_are_used_where_the_batch_fills_them(vector, batch, used):
    assert replace(find_target("avx2"), vector=vector).for_batch(batch).vector == used


@pytest.mark.parametrize(("batch", "used"), [(1, 1), (2, 2), (3, 1), (4, 4), (6, 4)])
def test_threads_of_a_gpu_take_fewer_examples_where_there_are_fewer(batch, used):
    assert find_target("mali").for_batch(batch).vector == used


def test_tuning_compares_widths_where_registers_may_be_wider_than_multipliers():
    narrow = find_target("avx2")
    wide = replace(narrow, llvm=(("kind", "llvm"), ("mcpu", "x86-64-v4")))
    assert narrow.vectors == (8,) and wide.vectors == (8, 16) == replace(wide, vector=16).vectors
    assert find_target("cortex-a76").vectors == (4,)


@pytest.mark.parametrize(("batch", "vector"), [(16, 16), (24, 8)])
def test_a_step_takes_the_vector_that_its_batch_fills(batch, vector):
    shape = (batch, 3, 8, 8)
    target = replace(find_target("avx2"), vector=16)  # AVX2 code for two registers a vector: right, if slow
    step = mest.compile(build_model("mlp", shape, width=16), shape, scheme="block", sparsity=0.5, target=target)
    assert {image.vector for call in step.program.calls for buffer in call.buffers if (image := buffer.image)} == {
        vector
    }
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal(shape, dtype=np.float32), rng.integers(0, 10, batch)
    eight = mest.compile(build_model("mlp", shape, width=16), shape, scheme="block", sparsity=0.5, target="avx2")
    assert step(images, labels).loss == pytest.approx(eight(images, labels).loss, rel=1e-5)

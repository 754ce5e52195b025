"""What the machine at hand tells about itself, and what a batch makes of it."""

from dataclasses import replace

import numpy as np
import pytest

import mest_compile as mest
from mest_compile import hardware
from mest_compile.errors import TargetError
from mest_compile.hardware import find_target, host_cpu
from mest_compile.models import build_model

AVX2 = "avx avx2 f16c fma bmi1 bmi2 sse4_2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl"


@pytest.mark.parametrize("line, found", [
    (f"flags\t\t: {AVX512} avx512_vp2intersect avx_vnni", ("x86-64-v4", 16)),  # Zen 5
    (f"flags\t\t: {AVX512} avx_vnni amx_tile", ("x86-64-v4", 16)),             # Sapphire Rapids
    (f"flags\t\t: {AVX512} avx512_vp2intersect", ("x86-64-v4", 8)),            # Tiger Lake
    (f"flags\t\t: {AVX512}", ("x86-64-v4", 8)),
    (f"flags\t\t: {AVX2}", ("x86-64-v3", 8)),
    ("flags\t\t: sse4_2", ("x86-64-v2", 4)),
    ("Features\t: fp asimd", ("generic", 4)),
])
def test_feature_flags_decide_cpu_and_vector(tmp_path, monkeypatch, line, found):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    assert host_cpu() == found


def test_avx512_code_needs_no_more_than_avx512(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {AVX512}\n")
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(hardware, "host_machine", lambda: "x86_64")
    wide = replace(find_target("avx2"), llvm=(("kind", "llvm"), ("mcpu", "x86-64-v4")))
    assert hardware.lacking_features(wide) == []
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {AVX2}\n")
    assert hardware.lacking_features(wide) == ["avx512bw", "avx512dq", "avx512f", "avx512vl"]


def test_a_cpu_without_vectors_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu sse\n")
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    with pytest.raises(TargetError, match="none of AVX2"):
        host_cpu()


@pytest.mark.parametrize("vector, batch, used", [(16, 64, 16), (16, 16, 16), (16, 15, 16), (16, 8, 8), (16, 24, 8), (16, 3, 8), (8, 3, 8),
                                                 (4, 1, 4)])
def test_vectors_wider_than_eight_floats_are_used_where_the_batch_fills_them(vector, batch, used):
    assert replace(find_target("avx2"), vector=vector).for_batch(batch).vector == used


def test_tuning_compares_widths_where_registers_may_be_wider_than_multipliers():
    narrow = find_target("avx2")
    wide = replace(narrow, llvm=(("kind", "llvm"), ("mcpu", "x86-64-v4")))
    assert narrow.vectors == (8,) and wide.vectors == (8, 16) == replace(wide, vector=16).vectors
    assert find_target("cortex-a76").vectors == (4,)


@pytest.mark.parametrize("batch, vector", [(16, 16), (24, 8)])
def test_a_step_takes_the_vector_that_its_batch_fills(batch, vector):
    shape = (batch, 3, 8, 8)
    target = replace(find_target("avx2"), vector=16)  # AVX2 code for two registers a vector: right, if slow
    step = mest.compile(build_model("mlp", shape, width=16), shape, scheme="block", sparsity=0.5, target=target)
    assert {image.vector for call in step.program.calls for buffer in call.buffers if (image := buffer.image)} == {vector}
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal(shape, dtype=np.float32), rng.integers(0, 10, batch)
    eight = mest.compile(build_model("mlp", shape, width=16), shape, scheme="block", sparsity=0.5, target="avx2")
    assert step(images, labels).loss == pytest.approx(eight(images, labels).loss, rel=1e-5)

"""The kernel cache."""

import logging
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mest_compile.base import programs
from mest_compile.base.errors import BuildError, UnknownName
from mest_compile.hardware.target import Target, find_target
from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.cache import Builder
from mest_compile.kernels.reader import parse
from mest_compile.kernels.source import KernelSource, kernel_source
from mest_compile.operators.conversion import ImageImport

TARGET = find_target("local")
SOURCE = kernel_source("image.import", ImageImport(Image(2, 3, 3, 5)), TARGET)


def imports(function) -> bool:
    import tvm

    images = np.arange(5 * 2 * 9, dtype=np.float32)
    result = tvm.runtime.tensor(np.full(Image(2, 3, 3, 5).elems, 9, np.float32))
    function(tvm.runtime.tensor(images), result)
    return np.array_equal(result.numpy().reshape(2, 3, 3, 8)[..., :5], images.reshape(5, 2, 3, 3).transpose(1, 2, 3, 0))


def test_a_kernel_is_compiled_once_and_comes_from_disk_next_time(tmp_path):
    first, second = Builder(tmp_path), Builder(tmp_path)
    assert len(first.build([SOURCE, SOURCE])) == 1
    first.function(SOURCE)
    assert imports(second.function(SOURCE))
    assert (first.compiled, first.loaded, second.compiled, second.loaded) == (1, 0, 0, 1)


def test_a_damaged_entry_is_compiled_again_and_said_so(tmp_path, caplog):
    Builder(tmp_path).function(SOURCE)
    library = next(tmp_path.rglob("*.so"))
    library.write_bytes(library.read_bytes()[:1000])
    again = Builder(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert imports(again.function(SOURCE))
    assert again.compiled == 1 and "damaged" in caplog.text


def test_the_key_changes_with_the_text_and_with_the_target():
    other = Target("other", "cpu", (("kind", "llvm"), ("mcpu", "haswell")), 8, 16, 32768, 262144, 2)
    sources = [
        SOURCE,
        KernelSource(SOURCE.kernel, SOURCE.text + "\n", TARGET),
        KernelSource(SOURCE.kernel, SOURCE.text, other),
        kernel_source("image.import", ImageImport(Image(2, 3, 3, 6)), TARGET),
    ]
    assert len({source.key for source in sources}) == 4


def test_text_that_does_not_compile_is_a_build_error_that_starts_with_the_cause(tmp_path, caplog):
    text = SOURCE.text.replace("T.", "Abacus.", 1)
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(BuildError, match=r"^NameError: line 1: .* Abacus: kernel image.import ") as error,
    ):
        Builder(tmp_path).function(KernelSource("image.import", text, TARGET))
    assert "\n" not in str(error.value) and text not in str(error.value) and text in caplog.text


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    builder = Builder(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        assert imports(builder.function(SOURCE))
    assert "cannot be written" in caplog.text


def refuse(*arguments, **options):
    raise OSError(30, "Read-only file system")


def test_a_cache_that_can_only_be_read_is_hit(tmp_path, monkeypatch):
    Builder(tmp_path).build(sources(3))
    again = Builder(tmp_path, most_bytes=0)

    def below(real):
        return lambda path, *rest, **options: (
            refuse() if str(path).startswith(str(tmp_path)) else real(path, *rest, **options)
        )

    for name in ("utime", "mkdir", "unlink", "replace"):
        monkeypatch.setattr(os, name, below(getattr(os, name)))
    assert imports(again.build(sources(3))[sources(1)[0].key]) and (again.compiled, again.loaded) == (0, 3)
    assert (
        len(again.build(sources(4))) == 4 and again.compiled == 1
    )  # what there is no room for is not evicted, and nothing is raised


def test_a_damaged_entry_that_cannot_be_removed_is_compiled_again(tmp_path, monkeypatch):
    Builder(tmp_path).function(SOURCE)
    library = next(tmp_path.rglob("*.so"))
    library.write_bytes(library.read_bytes()[:1000])
    monkeypatch.setattr(Path, "unlink", refuse)
    assert imports(Builder(tmp_path).function(SOURCE))


def full(monkeypatch, folder):
    """Every file that is written below `folder` finds the disk full."""

    def write(path, content, real=Path.write_bytes):
        if path.is_relative_to(folder):
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)


def test_a_full_disk_costs_the_cache_and_one_line(tmp_path, monkeypatch, caplog):
    full(monkeypatch, tmp_path)
    builder = Builder(tmp_path)
    assert all(builder.build(sources(3)).values()) and imports(builder.function(SOURCE))
    assert caplog.text.count("cannot be written") == 1
    with pytest.raises(BuildError, match="cannot be written, through which another process"):
        builder.store(sources(4)[3])


def test_a_cache_without_execution_is_read_and_its_kernels_run_from_elsewhere(tmp_path, monkeypatch):
    import tvm_ffi

    def load(path, real=tvm_ffi.load_module, **options):
        if Path(path).is_relative_to(tmp_path):
            raise RuntimeError("failed to map segment from shared object")
        return real(path, **options)

    monkeypatch.setattr(tvm_ffi, "load_module", load)
    Builder(tmp_path).function(SOURCE)
    again = Builder(tmp_path)
    assert imports(again.function(SOURCE)) and again.compiled == 0
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))  # and nowhere is left
    with pytest.raises(BuildError, match="cannot be loaded, neither from"):
        Builder(tmp_path / "other").function(SOURCE)


def test_a_folder_that_nobody_may_look_into_is_an_empty_one(tmp_path, monkeypatch):
    Builder(tmp_path).function(SOURCE)
    monkeypatch.setattr(Path, "glob", refuse)
    builder = Builder(tmp_path)
    assert not builder.has(SOURCE) and builder.find(SOURCE) is None and imports(builder.function(SOURCE))


def test_a_full_temporary_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(BuildError, match="temporary folder cannot be used .*make room there, or set TMPDIR"):
        Builder(tmp_path).function(SOURCE)


def test_a_kernel_that_no_schedule_makes_is_named():
    with pytest.raises(UnknownName, match="cpu/image.nothing"):
        kernel_source("image.nothing", None, TARGET)


def sources(count):
    return [kernel_source("image.import", ImageImport(Image(2, 3, 3, 5 + number)), TARGET) for number in range(count)]


def test_a_full_cache_loses_what_was_used_longest_ago(tmp_path):
    first, second, third = sources(3)
    builder = Builder(tmp_path)
    builder.build([first, second])
    old = {path: path.stat() for path in tmp_path.rglob("*.so")}
    for place, source in enumerate((first, second)):
        path = next(path for path in old if path.name.startswith(source.key))
        os.utime(path, ns=(10**18 + place, 10**18 + place))
    Builder(tmp_path).build([second])  # a use
    room = sum(facts.st_size for facts in old.values())
    last = Builder(tmp_path, most_bytes=room)
    last.build([third])
    assert {path.name.partition(".")[0] for path in tmp_path.rglob("*.so")} == {second.key, third.key}
    assert imports(builder.function(first))  # who has loaded it has it
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.so")) <= room


PROCESS = """
import sys
sys.path.insert(0, sys.argv[2])
from test_building import Builder, imports, sources
builder = Builder(__import__("pathlib").Path(sys.argv[1]), most_bytes=40_000)
for _ in range(3):
    functions = builder.build(sources(6))
    assert imports(functions[sources(1)[0].key])
    builder._ready.clear()
print("fine")
"""


def test_several_processes_share_a_folder_that_is_too_small_for_them(tmp_path):
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in running:
        out, said = process.communicate(timeout=300)
        assert out == "fine\n", said
        assert "damaged" not in said


def test_kernels_can_be_parsed_by_many_threads_at_once():
    with ThreadPoolExecutor(8) as workers:
        found = list(workers.map(lambda source: parse(source.text, source.symbol), sources(8) * 12))
    assert [str(function.attrs["global_symbol"]) for function in found] == [source.symbol for source in sources(8) * 12]


def test_a_program_that_does_not_end_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(programs, "LIMIT_SECONDS", 0.1)
    with pytest.raises(BuildError, match="sleep has not ended within 0.1 s, and was killed"):
        programs.run_program(["sleep", "60"])
    assert programs.run_program(["cat"], "text").stdout == "text" and programs.run_program(["cat"]).stdout == ""

"""Where files are kept, whatever HOME is, and files that are believed only while they are what was made."""

import os
import tempfile
from pathlib import Path

import pytest

from mest_compile.base.errors import BuildError
from mest_compile.hardware import folders, host
from mest_compile.hardware.folders import Kept, cache_folder, kept_file


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A HOME and a temporary folder of the test's own."""
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    return tmp_path / "home"


def spare() -> Path:
    return Path(tempfile.gettempdir()) / f"mest-compile-{os.getuid()}"


def test_the_cache_is_where_the_variables_say(home, tmp_path, monkeypatch):
    assert cache_folder() == home / ".cache" / "mest-compile"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine" / "mest-compile"


@pytest.mark.parametrize("name", ["file", "nothing"])
def test_a_home_that_is_no_folder_counts_as_none_and_is_not_made(name, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / name))
    assert cache_folder() == spare() and spare().stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "nothing").exists()


def test_a_cache_variable_that_leads_nowhere_counts_as_none(home, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder() == home / ".cache" / "mest-compile"


def test_a_home_that_cannot_be_read_counts_as_none(home, monkeypatch):
    def access(path, mode, real=os.access):
        return not Path(path).is_relative_to(home) and real(path, mode)

    monkeypatch.setattr(os, "access", access)
    assert cache_folder() == spare()


def test_a_temporary_folder_that_others_can_write_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "nothing"))
    spare().mkdir()
    spare().chmod(0o777)
    assert not folders._made(spare())
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="set TMPDIR"):
        kept_file(tmp_path / "file", "key", "a.so", lambda path: path.write_bytes(b"content"))


def test_a_file_is_made_once_and_again_when_it_is_damaged(tmp_path):
    made = []

    def make(path):
        made.append(path)
        path.write_bytes(b"content")

    first = kept_file(tmp_path / "kept", "key", "a.so", make)
    assert kept_file(tmp_path / "kept", "key", "a.so", make) == first and len(made) == 1
    first.write_bytes(b"something else")
    assert kept_file(tmp_path / "kept", "key", "a.so", make).read_bytes() == b"content" and len(made) == 2
    assert list((tmp_path / "kept").iterdir()) == [first]


@pytest.mark.parametrize("why", ["no folder", "no execution"])
def test_a_file_that_cannot_be_kept_there_is_kept_in_the_temporary_folder(why, tmp_path, monkeypatch):
    place = tmp_path / "kept"
    if why == "no folder":
        place.write_text("")
    else:
        monkeypatch.setattr(host, "forbids_execution", lambda folder: folder == place)
    found = kept_file(place, "key", "a.so", lambda path: path.write_bytes(b"content"))
    assert found.parent == spare() and found.read_bytes() == b"content"


def test_contents_are_kept_while_they_are_whole_and_there_is_room(tmp_path):
    kept, made = Kept(tmp_path / "kept", most_bytes=25), []

    def make(key):
        return kept.made(key, lambda: made.append(key) or key.encode() * 10)

    assert [make(key) for key in "aba"] == [b"a" * 10, b"b" * 10, b"a" * 10] and made == ["a", "b"]
    for number, path in enumerate(sorted(kept.folder.iterdir(), reverse=True)):
        os.utime(path, ns=(number, number))  # b was used longest ago
    make("c")
    assert [kept.find(key) is None for key in "abc"] == [False, True, False]
    next(kept.folder.glob("a.*")).write_bytes(b"torn")
    assert kept.find("a") is None and not list(kept.folder.glob("a.*"))
    nowhere = Kept(tmp_path / "file" / "below", 25)
    (tmp_path / "file").write_text("no folder")
    assert nowhere.made("a", lambda: b"x") == b"x" and nowhere.find("a") is None

"""Where this user's files are kept between processes, and files that are made once and believed only while they are
what was made."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mest_compile.base.errors import BuildError
from mest_compile.base.files import write_whole
from mest_compile.hardware import host

DIGEST_DIGITS = 32  # of a content's SHA-256, in the name of a file that is believed


def cache_folder() -> Path:
    """The first of `cache_folders` that is there, or can be made; the last when none can. Raises nothing: a cache may
    be lost."""
    places = list(cache_folders())
    return next((place for place in places if _made(place)), places[-1])


def cache_folders() -> Iterator[Path]:
    """Folders for what can be made again, the preferred one first: below XDG_CACHE_HOME, below HOME, in the temporary
    folder. A variable that names no folder that can be used counts as if it was absent, and no HOME is made that is not
    there.
    """
    import platformdirs  # which a device that loads an artifact need not have

    home = Path(os.path.expanduser("~"))
    for place in (platformdirs.user_cache_path("mest-compile"), home / ".cache" / "mest-compile"):
        if not place.is_relative_to(home) or os.path.isdir(home):
            yield place
    yield (
        Path(_temporary()) / f"mest-compile-{os.getuid() if hasattr(os, 'getuid') else os.environ.get('USERNAME', '')}"
    )


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # nowhere can be written
        return os.curdir


def _made(place: Path) -> bool:
    """Whether the folder is there after this call and its files can be read. A temporary one must be this user's alone:
    what lies in it is run.
    """
    shared = place.parent == Path(_temporary())
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700 if shared else 0o777)
        facts = place.lstat()
    except OSError:
        return False
    if shared and hasattr(os, "geteuid"):
        return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o022
    return os.access(place, os.R_OK | os.X_OK)


def digest(content: bytes) -> str:
    """What the name of a file says of its content."""
    return hashlib.sha256(content).hexdigest()[:DIGEST_DIGITS]


def kept_file(folder: Path, key: str, name: str, make: Callable[[Path], None]) -> Path:
    """A file that `make` writes to the path it is given, unless `folder` has it from before, whole: its name says what
    it holds.

    key   of all that decides the content
    name  that its name ends with
    Where `folder` cannot be written or forbids execution a temporary one of this user takes its place. Raises
    BuildError when no folder can be written, and what `make` does.
    """
    refused: OSError | None = None
    for place in dict.fromkeys((folder, list(cache_folders())[-1])):
        try:
            if not _made(place) or host.forbids_execution(place):
                raise PermissionError(errno.EACCES, "it is not there for this user, or forbids execution", str(place))
            for path in place.glob(f"{key}.{'?' * DIGEST_DIGITS}.{name}"):
                if path.name == f"{key}.{digest(path.read_bytes())}.{name}":
                    return path
                path.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as scratch:
                made = Path(scratch) / name
                make(made)
                path = place / f"{key}.{digest(made.read_bytes())}.{name}"
                os.replace(made, path)
                return path
        except OSError as problem:
            refused = problem
    raise BuildError(
        f"{name} cannot be kept in {folder} or the temporary folder ({refused}); make room, or set TMPDIR to a "
        "folder that "
        "can be written and executed from"
    ) from refused


@dataclass(frozen=True, slots=True)
class Kept:
    """Contents by key, each in a file of its own that is believed only while it is what its name says. Where the folder
    cannot be written nothing is kept.

    most_bytes  that the folder may hold: beyond it those go that were used longest ago
    """

    folder: Path
    most_bytes: int

    def find(self, key: str) -> bytes | None:
        """What was kept by that key, if it is there and whole."""
        with suppress(OSError):
            for path in self.folder.glob(f"{key}.{'?' * DIGEST_DIGITS}"):
                content = path.read_bytes()
                if path.name == f"{key}.{digest(content)}":
                    os.utime(path)
                    return content
                path.unlink()
        return None

    def contents(self) -> Iterator[bytes]:
        """All that is kept and whole."""
        for key in sorted({path.name.partition(".")[0] for path in self.folder.glob(f"*.{'?' * DIGEST_DIGITS}")}):
            content = self.find(key)
            if content is not None:
                yield content

    def keep(self, key: str, content: bytes) -> None:
        """key: of all that decides the content."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / f"{key}.{digest(content)}", content)
            there = [(path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.folder.iterdir()]
            total = sum(size for _, size, _ in there)
            for _, size, path in sorted(there):
                if total <= self.most_bytes:
                    return
                path.unlink(missing_ok=True)
                total -= size

    def made(self, key: str, make: Callable[[], bytes]) -> bytes:
        """What was kept by that key, or what `make` gives, which is kept then. Raises what `make` does."""
        found = self.find(key)
        if found is None:
            found = make()
            self.keep(key, found)
        return found

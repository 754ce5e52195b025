"""Kernel text to callable code, through a content-addressed cache in memory and on disk.

A kernel's key is the digest of its TVMScript text, its target and the TVM version: everything that can change the code.
Nothing with the same key is compiled twice. An entry on disk is one file, named by its key and by the digest of its
content, that comes into being by a rename: several processes can use one folder, and a file that is not what its name
says is damaged.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mest_compile.base.errors import BuildError, MestError
from mest_compile.hardware.backend import backend_of
from mest_compile.hardware.folders import cache_folder, digest
from mest_compile.hardware.host import cores
from mest_compile.hardware.tvmruntime import runtime
from mest_compile.kernels.source import KernelSource, object_code

log = logging.getLogger(__name__)


STORED_PER_EVICTION = 32  # looking through the folder takes about as long as compiling a kernel
MOST_BYTES = 2**30  # some 20,000 kernels; a wide ResNet-32 has about 150


@dataclass(slots=True)
class Builder:
    """Compiles kernels and keeps them: in memory for this process, in `folder` for the next. A folder that can only be
    read is read from; one that is full, forbids execution or is not there costs no more than the cache.

    most_bytes        that `folder` may hold: beyond it the entries go that were used longest ago
    compiled, loaded  how many kernels were compiled, and how many came from disk
    seconds           spent compiling, added up over threads
    progress          told how many kernels of how many are there, as they come
    """

    folder: Path = field(default_factory=lambda: cache_folder() / "kernels")
    most_bytes: int = MOST_BYTES
    compiled: int = 0
    loaded: int = 0
    seconds: float = 0.0
    progress: Callable[[int, int], None] | None = None
    _ready: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _refused: bool = False  # whether the log says that the folder cannot be written

    def build(self, sources: Iterable[KernelSource]) -> dict[str, Any]:
        """key -> callable, for every source, compiled side by side: LLVM and the linker run outside Python's lock.
        Raises BuildError."""
        distinct = {source.key: source for source in sources}
        return dict(zip(distinct, self._side_by_side(self.function, distinct.values())))

    def function(self, source: KernelSource) -> Any:
        """The callable of one kernel. Raises BuildError."""
        key = source.key
        if key not in self._ready:
            self._ready[key] = self._from_disk(source) or self._compile(source)
        return self._ready[key]

    def find(self, source: KernelSource) -> Any:
        """The callable of one kernel if it was loaded or stands in the folder, whole; else None. Compiles nothing."""
        key = source.key
        if key not in self._ready and (found := self._from_disk(source)):
            self._ready[key] = found
        return self._ready.get(key)

    def has(self, source: KernelSource) -> bool:
        """Whether the kernel needs no compiling: it was loaded, or stands in the folder."""
        return source.key in self._ready or any(
            path.suffix != ".o" for path in self._there(f"{source.key[:2]}/{source.key}.*")
        )

    def store(self, source: KernelSource) -> None:
        """Compiles a kernel for other processes: into the folder, if it is not there, whole. Raises BuildError, also
        where it cannot be kept.
        """
        suffix = backend_of(source.target).suffix
        if not any(self._entries(source.key, suffix)):
            if not self._keep(
                source.key, suffix, backend_of(source.target).dump(self._new_library(source), source.target)
            ):
                raise BuildError(
                    f"the kernel cache {self.folder} cannot be written, through which another process would get "
                    "the kernel"
                )
            if self.compiled % STORED_PER_EVICTION == 0:
                self._evict()

    def objects(self, sources: Iterable[KernelSource]) -> dict[str, bytes]:
        """symbol -> object code, for every source: what is linked for another machine, or into an artifact. Raises
        BuildError."""
        distinct = list({source.key: source for source in sources}.values())
        return dict(zip([source.symbol for source in distinct], self._side_by_side(self._object, distinct)))

    def keep(self, digest: str, make: Callable[[], bytes]) -> bytes:
        """What is of that digest, of all that decides it, a linked step or an imported net: from the folder, or what
        `make` gives. Raises BuildError, and MestErrors of `make`."""
        for _, content in self._entries(digest, ".lib"):
            return content
        try:
            content = make()
        except MestError:
            raise
        except Exception as problem:  # of TVM's many types
            raise BuildError(f"{_cause(problem)}: what the cache would keep cannot be made") from problem
        self._keep(digest, ".lib", content)
        self._evict()
        return content

    def _side_by_side(self, get: Callable[[KernelSource], Any], sources: Iterable[KernelSource]) -> list[Any]:
        sources, before = list(sources), self.compiled
        if not all(self.has(source) for source in sources):
            runtime()  # before tvm, which would import torch
            import tvm  # noqa: F401  # before the threads, which would all wait for it
            from tvm.script import tirx  # noqa: F401
        found = []
        with ThreadPoolExecutor(cores()) as workers:
            for one in workers.map(get, sources):
                found.append(one)
                if self.progress is not None:
                    self.progress(len(found), len(sources))
        if self.compiled > before:
            self._evict()
        return found

    def _object(self, source: KernelSource) -> bytes:
        for _, content in self._entries(source.key, ".o"):
            with self._lock:
                self.loaded += 1
            return content
        content = object_code(self._new_library(source))
        self._keep(source.key, ".o", content)
        return content

    def _entries(self, key: str, suffix: str) -> Iterator[tuple[Path, bytes]]:
        """Whole entries of the cache for that key; damaged ones are removed."""
        for path in self._there(f"{key[:2]}/{key}.{'?' * 32}{suffix}"):
            try:
                content = path.read_bytes()
            except OSError:  # another process has just removed it
                continue
            if path.suffixes[0] == f".{digest(content)}":
                with suppress(OSError):  # where it can only be read
                    os.utime(path)  # "used", for the order of eviction
                yield path, content
                continue
            log.warning("cached kernel %s is damaged; compiling it again", path.name)
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _there(self, pattern: str) -> list[Path]:
        """Files in the folder; none when it cannot be looked into."""
        try:
            return list(self.folder.glob(pattern))
        except OSError:
            return []

    def _from_disk(self, source: KernelSource) -> Any:
        for path, content in self._entries(source.key, backend_of(source.target).suffix):
            try:
                found = self._load(content, source)
            except Exception as problem:  # of TVM's many types
                log.warning("cached kernel %s cannot be loaded (%s); compiling it again", path.name, _cause(problem))
                continue
            with self._lock:
                self.loaded += 1
            return found
        return None

    def _compile(self, source: KernelSource) -> Any:
        kind = backend_of(source.target)
        content = kind.dump(self._new_library(source), source.target)
        self._keep(source.key, kind.suffix, content)
        try:
            return self._load(content, source)
        except (OSError, RuntimeError) as problem:
            raise BuildError(
                f"kernel {source.kernel} cannot be loaded, neither from {self.folder} nor from the temporary folder "
                f"({_cause(problem)}); set TMPDIR to a folder that can be written and executed from"
            ) from problem

    def _load(self, content: bytes, source: KernelSource) -> Any:
        """The kernel of a library: what was checked, whatever becomes of the cached file. It goes with its last
        user."""
        return backend_of(source.target).load(content, source.symbol, [self.folder])

    def _new_library(self, source: KernelSource) -> Any:
        start = time.perf_counter()
        try:
            library = _made(source)
        except MestError:
            raise
        except Exception as problem:  # TVM raises many types; the text is what a reader needs
            log.debug("text of kernel %s, which does not compile:\n%s", source.kernel, source.text)
            raise BuildError(
                f"{_cause(problem)}: kernel {source.kernel} does not compile for {source.target.name}; "
                "its text is in the log at level DEBUG"
            ) from problem
        with self._lock:
            self.compiled += 1
            self.seconds += time.perf_counter() - start
        return library

    def _keep(self, key: str, suffix: str, content: bytes) -> bool:
        """Writes an entry under a temporary name; whether that went well."""
        folder = self.folder / key[:2]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
                made = Path(scratch) / f"kernel{suffix}"
                made.write_bytes(content)
                os.replace(made, folder / f"{key}.{digest(content)}{suffix}")
                return True
        except OSError as problem:
            if not self._refused:
                self._refused = True
                log.warning(
                    "kernel cache %s cannot be written (%s); kernels will be compiled again next time",
                    self.folder,
                    problem,
                )
            return False

    @staticmethod
    def compile_here(source: KernelSource) -> Any:
        """The callable of one kernel for this CPU, past the cache. Raises BuildError."""
        return attempt(source, lambda: _made(source)[source.symbol])

    def _evict(self) -> None:
        """Removes the entries used longest ago until what is left fits; what this process has loaded it goes on
        using."""
        entries = []
        for path in self._there("??/*.*"):
            try:
                facts = path.stat()
            except OSError:  # another process has just removed it
                continue
            entries.append((facts.st_mtime_ns, facts.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.most_bytes:
                return
            with suppress(OSError):
                path.unlink(missing_ok=True)
            total -= size


def _made(source: KernelSource) -> Any:
    """The code of one kernel, of whatever its kind of device makes."""
    return backend_of(source.target).compile(source.text, source.symbol, source.target, source.checked)


def attempt(source: KernelSource, compiling: Callable[[], Any]) -> Any:
    """What `compiling` the kernel gives. Raises BuildError in place of whatever TVM raises."""
    try:
        return compiling()
    except MestError:
        raise
    except Exception as problem:  # of TVM's many types
        raise BuildError(
            f"{_cause(problem)}: kernel {source.kernel} does not compile for {source.target.name}"
        ) from problem


def _cause(problem: Exception) -> str:
    """What went wrong in one line. TVM writes a stack before it, or the piece of source it points at behind it."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    said = next(
        (line for line in lines if "error: " in line.lower()), lines[-1] if lines else "no message"
    ).removeprefix("error: ")
    kind = type(problem).__name__
    return said if said.startswith(kind) else f"{kind}: {said}"

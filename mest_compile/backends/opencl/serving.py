"""OpenCL for TVM's runtime on a machine that serves: TVM's wheels have none, so opencl_device.cc is compiled there,
once."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from importlib import metadata
from pathlib import Path

from mest_compile.base.errors import NotInstalled
from mest_compile.base.programs import run_program
from mest_compile.hardware.folders import cache_folder, kept_file

SOURCE = Path(__file__).with_name("opencl_device.cc")
# Debian's; libOpenCL is the loader of drivers, or a phone GPU's driver itself
PACKAGES = "g++ opencl-c-headers ocl-icd-libopencl1"
LIBRARIES = ("-lOpenCL", "-l:libOpenCL.so.1")  # the first is there with development files only


def opencl_runtime(folder: Path | None = None) -> Path:
    """The library that gives TVM's runtime OpenCL, for this machine; compiled where `folder`, the user's cache, does
    not have it yet.

    Raises NotInstalled when there is no C++ compiler, no OpenCL headers or no OpenCL library, BuildError when no folder
    can be written.
    """
    versions = [metadata.version(name) for name in ("apache-tvm", "apache-tvm-ffi")]
    key = hashlib.sha256(SOURCE.read_bytes() + repr(versions).encode()).hexdigest()[:24]
    return kept_file(folder or cache_folder(), key, "libtvm_opencl.so", _compile)


def _compile(path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NotInstalled(f"no C++ compiler, which makes OpenCL's part of TVM's runtime; run: apt install {PACKAGES}")
    tvm, ffi = _package("tvm"), _package("tvm_ffi")
    headers = [f"-I{tvm / 'include'}", f"-I{ffi / 'include'}", f"-I{ffi / '3rdparty' / 'dlpack' / 'include'}"]
    beside = [f"-L{tvm / 'lib'}", "-ltvm_runtime", f"-L{ffi / 'lib'}", "-ltvm_ffi"]
    command = [
        compiler,
        "-O2",
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        *headers,
        str(SOURCE),
        "-o",
        str(path),
        *beside,
    ]
    for library in LIBRARIES:
        done = run_program([*command, library])
        if done.returncode == 0:
            return
    said = next((line for line in done.stderr.splitlines() if "error" in line or "cannot find" in line), "no message")
    raise NotInstalled(
        f"OpenCL's part of TVM's runtime cannot be compiled: {said.strip()}; run: apt install {PACKAGES}"
    )


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise NotInstalled(
            f"no package {name}; run: pip install 'apache-tvm==0.27.0.post1' 'apache-tvm-ffi==0.1.14.post1'"
        )
    return Path(found.submodule_search_locations[0])

#!/usr/bin/env bash
# Builds the stand-in device in folder $1: an aarch64 RPC server, TVM's three libraries beside it, the emulator's instruction counter, and
# an aarch64 Python with numpy and tvm_ffi, unpacked and not installed, for artifacts.
# Takes what is missing from Debian (as root) and from the package index; half a minute on a fresh machine.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
tvm=$(sed -n 's/^ *"\(apache-tvm==[^"]*\)".*/\1/p' "$here/../../pyproject.toml")
ffi=$(sed -n 's/^ *"\(apache-tvm-ffi==[^"]*\)".*/\1/p' "$here/../../pyproject.toml")
mkdir -p "$1" && cd "$1"
if ! command -v qemu-aarch64 >/dev/null || ! command -v aarch64-linux-gnu-g++ >/dev/null; then
  if [ "$(id -u)" != 0 ]; then
    echo "no emulated device, its tests are skipped; as root: apt-get install qemu-user g++-aarch64-linux-gnu" >&2
    exit 0
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends qemu-user g++-aarch64-linux-gnu gcc libc6-dev >/dev/null
fi
"$python" -m pip download -q --no-deps -d wheels --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 --abi none \
  --platform manylinux_2_28_aarch64 "$tvm" "$ffi"
"$python" - <<'PYTHON'
import glob, pathlib, zipfile

pathlib.Path("device").mkdir(exist_ok=True)
for wheel in glob.glob("wheels/*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name in ("tvm/lib/libtvm_runtime.so", "tvm/lib/libtvm_runtime_extra.so", "tvm_ffi/lib/libtvm_ffi.so"):
                pathlib.Path("device", pathlib.Path(name).name).write_bytes(archive.read(name))
            elif name.startswith("tvm_ffi/include/"):
                archive.extract(name, "include")
PYTHON
aarch64-linux-gnu-g++ -O2 -std=c++17 -Iinclude/tvm_ffi/include "$here/rpcd.cc" -o device/rpcd -Ldevice -Wl,--no-as-needed -ltvm_ffi -ltvm_runtime \
  -Wl,-rpath,'$ORIGIN' -s
gcc -O2 -shared -fPIC "$here/icount.c" -o icount.so

# Debian's arm64 packages, without telling this machine's package manager of another architecture.
apt=(-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o "Dir::State=$PWD/state" -o Dir::State::status=/dev/null
     -o "Dir::Cache=$PWD/cache" -o APT::Sandbox::User=root)
mkdir -p state/lists/partial cache/archives/partial packages site
apt-get "${apt[@]}" update
(cd packages && apt-get "${apt[@]}" download python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libexpat1 zlib1g libgcc-s1 \
  libstdc++6 libffi8 libssl3)
for package in packages/*.deb; do dpkg -x "$package" root; done
numpy=numpy==$("$python" -c 'import numpy; print(numpy.__version__)')
"$python" -m pip download -q --no-deps -d wheels --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 --abi none \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform any "$numpy" typing_extensions
for wheel in wheels/numpy-*.whl wheels/typing_extensions-*.whl wheels/apache_tvm_ffi-*.whl; do "$python" -m zipfile -e "$wheel" site; done
rm -r wheels state cache packages
touch built

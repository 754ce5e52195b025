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

# What the tests need beside Python: the emulator and its cross compilers, a second linker, a cycle model, an OpenCL driver (the wheel's knows
# no newer processor than its LLVM) and a compiler that shows what becomes of OpenCL code.
missing=()
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
command -v aarch64-linux-gnu-g++ >/dev/null || missing+=(g++-aarch64-linux-gnu libc6-dev-arm64-cross)
command -v arm-linux-gnueabihf-gcc >/dev/null || missing+=(gcc-arm-linux-gnueabihf libc6-dev-armhf-cross)
command -v ld.lld >/dev/null || missing+=(lld)
command -v llvm-mca-19 >/dev/null || missing+=(llvm-19)
command -v clang >/dev/null || missing+=(clang)
[ -e /etc/OpenCL/vendors/pocl.icd ] || missing+=(pocl-opencl-icd)
command -v g++ >/dev/null || missing+=(g++)
[ -e /usr/include/CL/cl.h ] || missing+=(opencl-c-headers)
compgen -G "/usr/lib/*/libOpenCL.so*" >/dev/null || missing+=(ocl-icd-libopencl1)
if [ ${#missing[@]} != 0 ] && [ "$(id -u)" = 0 ]; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" gcc libc6-dev >/dev/null
elif [ ${#missing[@]} != 0 ]; then
  echo "some tests are skipped for want of Debian's packages; as root: apt-get install ${missing[*]}" >&2
fi
command -v qemu-aarch64 >/dev/null && command -v aarch64-linux-gnu-g++ >/dev/null || exit 0
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

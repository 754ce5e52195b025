#!/usr/bin/env bash
# apache-tvm-ffi 0.1.14.post1 turns KeyboardInterrupt and SystemExit that a Python callback raises into RuntimeError: Ctrl-C during a callback,
# for example of a tuning runner or a packed function of a virtual machine, is caught by any `except Exception`. Ordinary errors keep their type.
# Seen: KeyboardInterrupt('stop') arrives as RuntimeError('stop'), ValueError('bad') as ValueError('bad').
# tvm_ffi.register_error("KeyboardInterrupt", KeyboardInterrupt) makes it arrive as itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet apache-tvm-ffi==0.1.14.post1
"$folder/venv/bin/python" - <<'PYTHON'
import tvm_ffi


def outcome(error):
    def callback():
        raise error
    try:
        tvm_ffi.convert(callback)()
    except BaseException as arrived:
        return type(arrived).__name__


for error, wanted in ((ValueError("bad"), "ValueError"), (KeyboardInterrupt("stop"), "RuntimeError"), (SystemExit(3), "RuntimeError")):
    print(type(error).__name__, "arrives as", outcome(error))
    assert outcome(error) == wanted
tvm_ffi.register_error("KeyboardInterrupt", KeyboardInterrupt)
assert outcome(KeyboardInterrupt("stop")) == "KeyboardInterrupt"
PYTHON

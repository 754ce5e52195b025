"""The command line: what it prints where, and its exit codes."""

import json
import os
import subprocess
import sys

import pytest

import mest_compile.hardware
from mest_compile import __version__
from mest_compile.cli import later

HELP = """
import sys
from mest_compile.cli import main
try:
    main(["--help"])
finally:
    print(sorted({"torch", "tvm"} & set(sys.modules)))
"""


def test_help_loads_neither_torch_nor_tvm_and_takes_less_than_half_a_second():
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
        after = os.times()
        assert done.returncode == 0 and "train" in done.stdout and done.stdout.splitlines()[-1] == "[]"
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.5, seconds


def test_version(mest_compile_command):
    assert mest_compile_command("--version").out == f"mest-compile {__version__}\n"


@pytest.mark.parametrize("name", ["train", "bench", "demo", "models", "schemes", "targets", "doctor", *later._COMMANDS])
def test_every_command_is_in_the_help_and_takes_json(mest_compile_command, name):
    assert f" {name} " in mest_compile_command("--help").out
    assert "--json" in mest_compile_command(name, "--help").out


@pytest.mark.parametrize("name", later._COMMANDS)
@pytest.mark.parametrize("options", [(), ("--json",), ("--target", "arm_cpu", "runs/a")])
def test_a_command_of_a_later_version_names_itself_in_one_line(mest_compile_command, name, options):
    ran = mest_compile_command(name, *options)
    assert ran.code == 1 and ran.out == ""
    assert ran.err.startswith(f"error: mest-compile {name} is not in this version") and ran.err.count("\n") == 1


@pytest.mark.parametrize(("arguments", "said"), [
    (["nonsense"], "No such command 'nonsense'"),
    (["bench", "--batch", "0"], "--batch"),
    (["train", "--epochs", "many"], "--epochs"),
    (["train", "--colour", "blue"], "--colour"),
])
def test_misuse_is_one_line_and_exit_code_2(mest_compile_command, arguments, said):
    ran = mest_compile_command(*arguments)
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and said in ran.err


def test_an_empty_call_prints_the_help_and_no_error_line(mest_compile_command):
    ran = mest_compile_command()
    assert ran.code == 2 and "Commands" in ran.out + ran.err and "error:" not in ran.err


def test_targets_as_table_and_as_json(mest_compile_command):
    document = mest_compile_command("targets", "--json").document
    assert [target["name"] for target in document] == mest_compile.hardware.target_names()
    assert all(target["llvm"]["kind"] for target in document)
    lines = mest_compile_command("targets").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == mest_compile.hardware.target_names()


@pytest.mark.parametrize(("listing", "key", "has"), [("models", "model", "resnet20"), ("schemes", "scheme", "block")])
def test_listings(mest_compile_command, listing, key, has):
    assert has in [entry[key] for entry in mest_compile_command(listing, "--json").document]
    assert f"\n{has}" in mest_compile_command(listing).out


def test_doctor_finds_this_machine_fit(mest_compile_command):
    ran = mest_compile_command("doctor", "--json")
    status = {check["name"]: check["status"] for check in ran.document}
    assert ran.code == 0 and "fail" not in status.values()
    assert {status[name] for name in ("apache-tvm", "apache-tvm-ffi", "torch", "tvm", "target local")} == {"ok"}


def test_doctor_fails_when_a_package_has_the_wrong_version(mest_compile_command, monkeypatch):
    from mest_compile.cli import doctor

    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy<1", "no-such-package-of-mest>=2"])
    ran = mest_compile_command("doctor", "--json")
    checks = {check["name"]: check for check in ran.document}
    assert ran.code == 1
    assert checks["numpy"]["status"] == "fail" and "pip install 'numpy<1'" in checks["numpy"]["detail"]
    assert checks["no-such-package-of-mest"]["status"] == "fail"


def test_json_is_the_only_thing_on_stdout():
    done = subprocess.run([sys.executable, "-c", "from mest_compile.cli import main; main(['targets', '--json'])"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout) and done.stderr == ""

"""`mest-compile ...` in processes of their own that need not import torch and TVM: they are forked off one that has."""

import atexit
import multiprocessing
import os
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = [
    *("torch.export", "torch._dynamo", "tvm.relax", "tvm.script.tirx", "sklearn.datasets"),
    *("mest_compile.assembling", "mest_compile.cli.running", "mest_compile.training.loop", "mest_compile.runtime.step"),
]


def start(folder, *arguments):
    """The process, begun; what it writes to stderr goes to a file in `folder`."""
    CONTEXT.set_forkserver_preload(IMPORTED)
    process = CONTEXT.Process(target=_run, args=(folder, [str(argument) for argument in arguments]))
    process.folder = folder
    process.start()
    return process


def said(process):
    """What it has written to stderr."""
    return _file(process.folder, process.pid).read_text()


def _file(folder, pid):
    return Path(folder) / f"{pid}.stderr"


def _run(folder, arguments):
    for number, file in ((1, os.devnull), (2, _file(folder, os.getpid()))):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    from mest_compile.cli import main

    try:
        main(arguments)
    finally:
        atexit._run_exitfuncs()  # which processes of this kind do not

"""Kernel text to machine code for a CPU: few passes of TVM's, then LLVM.

TVM's usual 55 passes are for scheduled blocks and GPUs. Kernels here are written as the loops they are to be, and need
the few below; common expressions, which cost TVM most, LLVM finds by itself. Steps take as long as with all passes,
compiling less than half as long.
"""

from __future__ import annotations

from typing import Any

from mest_compile.backends.cpu import offsets
from mest_compile.backends.cpu.bfloat16 import helped
from mest_compile.backends.cpu.intrinsics import teach_tvm
from mest_compile.hardware.target import Target
from mest_compile.kernels.reader import parse

# In this order; they are part of a kernel's key. Unrolled loops need simplifying: without it some kernels take twice
# their time.
PASSES = (
    "s_tir.LowerOpaqueBlock",
    "tirx.FlattenBuffer",
    "tirx.NarrowDataType",
    "tirx.VectorizeLoop",
    "tirx.StorageRewrite",
    "tirx.UnrollLoop",
    "tirx.StmtSimplify",
    "s_tir.RewriteUnsafeSelect",
    "tirx.VerifyMemory",
    "tirx.AnnotateEntryFunc",
    "tirx.SplitHostDevice",
    "tirx.MakePackedAPI",
    offsets.NAME,
    "tirx.LowerTVMBuiltin",
    "tirx.LowerIntrin",
)
_ARGUMENTS = {"tirx.NarrowDataType": (32,), "tirx.VectorizeLoop": (True,)}


def compile_cpu(text: str, symbol: str, target: Target, checked: bool = True) -> Any:
    """TVM's module of one kernel. checked: whether it looks at its arguments' types and shapes when called. Raises what
    TVM does."""
    import tvm

    teach_tvm()
    device = target.to_tvm()
    device = device.with_host(device)
    passes = [tvm.tirx.transform.BindTarget(device)]
    for name in PASSES:
        family, _, each = name.partition(".")
        ours = name == offsets.NAME
        passes.append(
            offsets.made() if ours else getattr(getattr(tvm, family).transform, each)(*_ARGUMENTS.get(name, ()))
        )
    if not checked:
        passes.append(tvm.tirx.transform.SkipAssert())
    module = tvm.ir.transform.Sequential(passes)(tvm.IRModule({symbol: helped(parse(text, symbol), text, target)}))
    return tvm.get_global_func("target.build.llvm")(module, device.host)

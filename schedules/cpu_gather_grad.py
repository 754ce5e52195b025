"""The weight gradient of a sparse convolution, on a CPU: dot products of delta and source for live units only."""

from __future__ import annotations

from mest_compile.hardware import Target
from mest_compile.operators.gather import GatherGrad
from mest_compile.registry import schedule
from mest_compile.schedules.cpu_gather_conv import indent, nest, rows_at_once


@schedule("gather.grad", device="cpu")
def gather_grad(problem: GatherGrad, target: Target) -> str:
    """Several units of a group at a time, so that they share what they read of delta; a thread owns whole groups."""
    source, delta, vector = problem.source, problem.delta, problem.delta.vector
    most = max(target.registers - 4, 1)
    rows = rows_at_once(problem.row_block, most)
    parts = problem.row_block // rows
    together = max(most // rows // problem.source_block, 1)
    block = problem.source_block * problem.row_block
    lines = [
        "@T.prim_func",
        f"def kernel(pointers: T.Buffer(({problem.sections * problem.groups + 1},), 'int32'), offsets_handle: T.handle, "
        f"source: T.Buffer(({source.elems},), 'float32'), delta: T.Buffer(({delta.elems},), 'float32'), gradients_handle: T.handle):",
        "    T.func_attr({'tirx.noalias': True})",
        "    units = T.int32()",
        "    offsets = T.match_buffer(offsets_handle, (units,), 'int32')",
        f"    gradients = T.match_buffer(gradients_handle, (units * {block},), 'float32')",
        f"    for part in T.parallel({problem.groups * parts}):",
        f"        for section in T.serial({problem.sections}):",
    ]
    cell = f"(section * {problem.groups} + part // {parts})"
    count = f"(pointers[{cell} + 1] - pointers[{cell}])"

    def dots(units: int, first: str) -> list[str]:
        """The gradients of `units` units from `first` on."""
        total = f"((u * {problem.source_block} + k) * {rows} + j)"
        read = (f"source[offsets[{first} + u] + k * {source.channel_elems} + y * {problem.source_step[0] * source.row_elems}"
                f" + x * {problem.source_step[1] * source.lanes} + z * {vector} + i]")
        against = (f"delta[(part * {rows} + j) * {delta.channel_elems} + {delta.origin} + y * {delta.row_elems} + x * {delta.lanes}"
                   f" + z * {vector} + i]")
        loops = [("u", units), ("k", problem.source_block), ("j", rows)]
        lanes = " + ".join(f"sums[{total} * {vector} + {lane}]" for lane in range(vector))
        return [f"sums = T.alloc_buffer(({units * problem.source_block * rows * vector},), 'float32')",
                *nest(loops, vector, f"sums[{total} * {vector} + i] = T.float32(0)"),
                f"for y in T.serial({delta.height}):",
                f"    for x in T.serial({delta.width}):",
                f"        for z in T.serial({delta.lanes // vector}):",
                *indent(3, nest(loops, vector, f"sums[{total} * {vector} + i] = sums[{total} * {vector} + i] + {against} * {read}")),
                *[line for line in nest(loops, 1, f"gradients[({first} + u) * {block} + k * {problem.row_block}"
                                        f" + part % {parts} * {rows} + j] = {lanes}")]]

    lines += indent(3, [f"for several in T.serial({count} // {together}):",
                        *indent(1, dots(together, f"(pointers[{cell}] + several * {together})"))])
    if together > 1:
        lines += indent(3, [f"for one in T.serial({count} % {together}):", *indent(1, dots(1, f"(pointers[{cell} + 1] - 1 - one)"))])
    return "\n".join(lines)

"""Gradients of several passes on a CPU, for any number of parameters."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.adding import Add, Scale, Zero
from mest_compile.schedules.cpu.optimizer import CHUNK_ELEMS


def _each(text: Text, line: str, vector: int) -> str:
    """The kernel that has the line for every element [i] of n."""
    with text.nest(
        f"for chunk in T.parallel(n // {CHUNK_ELEMS})",
        f"for t in T.serial({CHUNK_ELEMS // vector})",
        f"for lane in T.vectorized({vector})",
    ):
        text(line.replace("[i]", f"[chunk * {CHUNK_ELEMS} + t * {vector} + lane]"))
    with text.nest(f"for rest in T.serial(n % {CHUNK_ELEMS})"):
        text(line.replace("[i]", f"[n // {CHUNK_ELEMS} * {CHUNK_ELEMS} + rest]"))
    return str(text)


def _begun(*names: str) -> Text:
    text = Text(*(f"{name}_handle: T.handle" for name in names))
    text.symbolic("n", {name: ("n", "float32") for name in names if name != "share"})
    if "share" in names:
        text('share = T.match_buffer(share_handle, (1,), "float32")')
    return text


@schedule("gradients.zero", device="cpu")
def zero(problem: Zero, target: Target) -> str:
    return _each(_begun("gradients"), "gradients[i] = T.float32(0)", target.vector)


@schedule("gradients.add", device="cpu")
def add(problem: Add, target: Target) -> str:
    return _each(_begun("part", "gradients"), "gradients[i] = gradients[i] + part[i]", target.vector)


@schedule("gradients.scale", device="cpu")
def scale(problem: Scale, target: Target) -> str:
    text = _begun("gradients", "share")
    text("factor: T.let = share[0]")
    return _each(text, "gradients[i] = gradients[i] * factor", target.vector)

"""Parameter updates on a CPU, for any number of parameters."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.expressions import Variable
from mest_compile.ir.infix import written
from mest_compile.kernels.source import schedule
from mest_compile.kernels.text import Text
from mest_compile.operators.optimizers.optimizer import Bound, Norm, Update, UpdatePart, rule_of
from mest_compile.schedules.cpu.rows import UNROLL, buffer, number

CHUNK_ELEMS = 4096  # of each array, 16 KiB: what a thread takes at a time
NORM_PARTS = 64  # that a sum of squares is cut into, so that it is the same on any number of threads


def _update(text: Text, rule: str, at: str) -> None:
    """The formula at one place. What it names itself stands where it is used, or is read from the state that it was
    stored as."""
    kind = rule_of(rule)
    arrays = {name: f"{name}[{at}]" for name in ("values", "gradients", *kind.state)}
    names = {**arrays, **{name: name for name in kind.scalars}}
    own = {}
    for name, expression in kind.formula.items():
        if name not in arrays:
            own[name] = written(expression, names, number)
            names[name] = f"({own[name]})"
        elif isinstance(expression, Variable) and expression.name in own:
            text(f"{arrays[name]} = {own[expression.name]}")
            names[expression.name] = arrays[name]
        else:
            text(f"{arrays[name]} = {written(expression, names, number)}")


def _update_chunk(text: Text, rule: str, vector: int, elems: int) -> None:
    """Elements `chunk * elems` up to the next chunk's; elems is a multiple of vector."""
    unroll = UNROLL if elems % (UNROLL * vector) == 0 else 1
    with text.nest(
        f"for t in T.serial({elems // (unroll * vector)})",
        f"for j in T.unroll({unroll})",
        f"for i in T.vectorized({vector})",
    ):
        _update(text, rule, f"chunk * {elems} + t * {unroll * vector} + j * {vector} + i")


@schedule("optimizer.update", device="cpu")
def update(problem: Update, target: Target) -> str:
    kind = rule_of(problem.rule)
    handles = dict.fromkeys(("values", "gradients", *kind.state), ("n", "float32"))
    handles |= {"hyper": (str(len(kind.scalars)), "float32")}
    text = Text(*(f"{name}_handle: T.handle" for name in handles))
    text.symbolic("n", handles)
    text(*(f"{name}: T.let = hyper[{place}]" for place, name in enumerate(kind.scalars)))
    with text.nest(f"if n >= {CHUNK_ELEMS}", f"for chunk in T.parallel(n // {CHUNK_ELEMS})"):
        _update_chunk(text, problem.rule, target.vector, CHUNK_ELEMS)
    with text.nest(f"for e in T.serial(n % {CHUNK_ELEMS})"):
        text(f"at: T.let = n // {CHUNK_ELEMS} * {CHUNK_ELEMS} + e")
        _update(text, problem.rule, "at")
    return str(text)


@schedule("optimizer.update_part", device="cpu")
def update_part(problem: UpdatePart, target: Target) -> str:
    """Biases and the like: a few numbers."""
    kind = rule_of(problem.rule)
    arrays = dict.fromkeys(("values", "gradients", *kind.state), problem.whole) | {"hyper": len(kind.scalars)}
    text = Text(*(buffer(name, elems) for name, elems in arrays.items()))
    text(*(f"{name}: T.let = hyper[{place}]" for place, name in enumerate(kind.scalars)))
    with text.nest(f"for e in T.serial({problem.elems})"):
        text(f"at: T.let = {problem.start} + e")
        _update(text, problem.rule, "at")
    return str(text)


@schedule("optimizer.norm", device="cpu")
def norm(problem: Norm, target: Target) -> str:
    """In float64, in which no square of a float32 overflows."""
    vector = target.vector
    sizes = {"gradients": "n", **({"places": "m"} if problem.listed else {})}
    text = Text(*(f"{name}_handle: T.handle" for name in (*sizes, "norm")))
    text(*(f"{symbol} = T.int32()" for symbol in sizes.values()))
    for name, size in sizes.items():
        dtype = "int32" if name == "places" else "float32"
        text(f'{name} = T.match_buffer({name}_handle, ({size},), "{dtype}")')
    text('norm = T.match_buffer(norm_handle, (1,), "float32")')
    count = sizes["places"] if problem.listed else sizes["gradients"]

    def square(at: str) -> str:
        element = f'T.cast(gradients[{f"places[{at}]" if problem.listed else at}], "float64")'
        return f"{element} * {element}"

    text(f'parts = T.alloc_buffer(({NORM_PARTS},), "float64")', f"each: T.let = {count} // {NORM_PARTS * vector}")
    with text.nest(f"for part in T.parallel({NORM_PARTS})"):
        text.local("sums", vector, "float64")
        with text.nest(f"for i in T.vectorized({vector})"):
            text("sums[i] = T.float64(0)")
        with text.nest("for t in T.serial(each)", f"for i in T.vectorized({vector})"):
            text(f"sums[i] = sums[i] + {square(f'(part * each + t) * {vector} + i')}")
        text("parts[part] = T.float64(0)")
        with text.nest(f"for i in T.serial({vector})"):
            text("parts[part] = parts[part] + sums[i]")
    text.local("total", 1, "float64")
    before = "T.float64(0)" if problem.first else 'T.cast(norm[0], "float64") * T.cast(norm[0], "float64")'
    text(f"total[0] = {before}")
    with text.nest(f"for part in T.serial({NORM_PARTS})"):
        text("total[0] = total[0] + parts[part]")
    with text.nest(f"for e in T.serial({count} - each * {NORM_PARTS * vector})"):
        text(f"total[0] = total[0] + {square(f'each * {NORM_PARTS * vector} + e')}")
    text('norm[0] = T.cast(T.sqrt(total[0]), "float32")')
    return str(text)


@schedule("optimizer.bound", device="cpu")
def bound(problem: Bound, target: Target) -> str:
    text = Text(*(f"{name}_handle: T.handle" for name in ("gradients", "norm", "bound")))
    text("n = T.int32()", 'gradients = T.match_buffer(gradients_handle, (n,), "float32")')
    text(*(f'{name} = T.match_buffer({name}_handle, (1,), "float32")' for name in ("norm", "bound")))
    text("within: T.let = T.if_then_else(norm[0] <= bound[0], 1, 0)", "factor: T.let = bound[0] / norm[0]")
    with text.nest("if within == 0", "for i in T.serial(n)"):
        text("gradients[i] = gradients[i] * factor")
    return str(text)

"""Parameter updates on OpenCL, for any number of parameters."""

from __future__ import annotations

from mest_compile.hardware.target import Target
from mest_compile.ir.infix import written
from mest_compile.kernels.source import schedule
from mest_compile.operators.optimizers.optimizer import Bound, Norm, Update, UpdatePart, rule_of
from mest_compile.schedules.opencl.sums import ENOUGH_GROUPS, tree
from mest_compile.schedules.opencl.text import DeviceText, number, scalars, whole_groups


def _update(text: DeviceText, rule: str, at: str = "n") -> None:
    """Parameter `at`. What the formula names itself is private."""
    kind = rule_of(rule)
    text(*(f"{name}: T.let = hyper[{place}]" for place, name in enumerate(kind.scalars)))
    arrays = {name: f"{name}[{at}]" for name in ("values", "gradients", *kind.state)}
    own = {name: f"{name}[0]" for name in kind.formula if name not in arrays}
    for name in own:
        text.private(name, 1)
    names = {**arrays, **own, **{name: name for name in kind.scalars}}
    text(*(f"{names[name]} = {written(expression, names, number)}" for name, expression in kind.formula.items()))


@schedule("optimizer.update", device="opencl")
def update(problem: Update, target: Target) -> str:
    kind = rule_of(problem.rule)
    sizes = dict.fromkeys(("values", "gradients", *kind.state), ("n_values", "float32"))
    sizes |= {"hyper": (str(len(kind.scalars)), "float32")}
    text = DeviceText(*(f"{name}_handle: T.handle" for name in sizes))
    text.symbolic("n_values", sizes)
    with text.each_of("n_values", ENOUGH_GROUPS, target.limits.threads):
        _update(text, problem.rule)
    return str(text)


@schedule("optimizer.update_part", device="opencl")
def update_part(problem: UpdatePart, target: Target) -> str:
    kind = rule_of(problem.rule)
    arrays = dict.fromkeys(("values", "gradients", *kind.state), problem.whole) | {"hyper": len(kind.scalars)}
    text = DeviceText(*(scalars(name, elems) for name, elems in arrays.items()))
    with text.each(problem.elems, target.limits.threads):
        _update(text, problem.rule, f"({problem.start} + n)")
    return str(text)


@schedule("optimizer.norm", device="opencl")
def norm(problem: Norm, target: Target) -> str:
    """Work-groups add squares up, then one adds their sums. In float32, as torch: a norm beyond 1.8e19 is infinite."""
    names = {"gradients": ("n_gradients", "float32"), **({"places": ("n_places", "int32")} if problem.listed else {})}
    text = DeviceText(*(f"{name}_handle: T.handle" for name in names), scalars("norm", 1))
    for name, (symbol, dtype) in names.items():
        text.symbolic(symbol, {name: (symbol, dtype)})
    count, element = ("n_places", "gradients[places[n]]") if problem.listed else ("n_gradients", "gradients[n]")
    size = whole_groups(target.limits.threads, target.limits.threads)
    threads = ENOUGH_GROUPS * size
    text.scratch("parts", ENOUGH_GROUPS)
    with text.groups(size, ENOUGH_GROUPS):
        text.shared(1, size, "float32")
        text("shared_0[lane] = T.float32(0)")
        with text.nest(f"for turn in T.serial(({count} + {threads - 1}) // {threads})"):
            text(f"n: T.let = turn * {threads} + block * {size} + lane")
            with text.nest(f"if n < {count}"):
                text(f"shared_0[lane] = shared_0[lane] + {element} * {element}")
        tree(text, 1, size)
        with text.nest("if lane == 0"):
            text("parts[block] = shared_0[0]")
    group = whole_groups(ENOUGH_GROUPS, target.limits.threads)
    with text.groups(group, 1):
        text.shared(1, group, "float32")
        text("shared_0[lane] = T.float32(0)")
        with text.nest(f"for turn in T.serial({-(-ENOUGH_GROUPS // group)})"):
            text(f"shared_0[lane] = shared_0[lane] + parts[turn * {group} + lane]")
        tree(text, 1, group)
        with text.nest("if lane == 0"):
            before = "" if problem.first else " + norm[0] * norm[0]"
            text(f"norm[0] = T.sqrt(shared_0[0]{before})")
    return str(text)


@schedule("optimizer.bound", device="opencl")
def bound(problem: Bound, target: Target) -> str:
    text = DeviceText("gradients_handle: T.handle", scalars("norm", 1), scalars("bound", 1))
    text.symbolic("n_gradients", {"gradients": ("n_gradients", "float32")})
    with text.each_of("n_gradients", ENOUGH_GROUPS, target.limits.threads):
        factor = "T.Select(norm[0] <= bound[0], T.float32(1), bound[0] / norm[0])"
        text(f"gradients[n] = gradients[n] * {factor}")
    return str(text)

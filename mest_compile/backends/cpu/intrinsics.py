"""exp, tanh and erf as CPUs compute them here: by polynomials, whole vectors at a time. TVM would call the C library
once a lane, and computes tanh so that small numbers lose all their digits.

Largest errors over all float32, in units of the last place: exp 0.98, tanh 2.5, erf 1.1; NaN, infinities and subnormal
results are right. Coefficients: fits of ours, of least largest error.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

from mest_compile.backends.cpu import bfloat16

# exp(r) - 1 - r over r * r, for |r| up to half of ln 2, lowest power first.
EXP = (0.4999999403953552, 0.1666652113199234, 0.04166838899254799, 0.00836874544620514, 0.001381453825160861)
# ln 2 in two parts, so that a product of a whole number and the first is exact.
LN2 = (0.693145751953125, 1.428606765330187e-06)
LOG2_E = 1.4426950408889634
# Numbers near it have no digits behind the point, and the last bits of theirs count whole numbers: adding it rounds,
# also where no instruction does, and unlike a cast is defined for NaN.
ROUNDS, ROUNDS_BITS = 1.5 * 2**23, 0x4B400000
# erf(x) is x + x * p(x * x) below NEAR, else 1 - exp(-q(|x|)), and 1 beyond FAR.
NEAR, FAR = 0.921875, 3.95
ERF_NEAR = (
    0.12837916612625122,
    -0.37612634897232056,
    0.11283695697784424,
    -0.026859398931264877,
    0.005201032385230064,
    -0.0008142703445628285,
    8.370097202714533e-05,
)
ERF_FAR = (
    0.00020991379278711975,
    1.1276154518127441,
    0.6372857689857483,
    0.10383891314268112,
    -0.022181401029229164,
    0.003031601430848241,
    -0.00019473458814900368,
)
KEY = (EXP, LN2, ROUNDS, ERF_NEAR, ERF_FAR)  # what a kernel's key holds of this
BEFORE_TVMS = 120  # priority of a rule; TVM's own have 100 at most


_TEACHING = threading.Lock()


class _Lanes:
    """Vectors of one width, and the names that a formula gives to what it uses more than once."""

    def __init__(self, like: Any):
        from tvm import tirx

        self._tirx = tirx
        self._named: list[tuple[Any, Any]] = []
        self.floats = str(like.ty.dtype)
        self.integers = self.floats.replace("float32", "int32")

    def number(self, value: float, dtype: str = "") -> Any:
        kind, _, lanes = (dtype or self.floats).partition("x")
        one = self._tirx.const(value, kind)
        return self._tirx.Broadcast(one, int(lanes)) if lanes else one

    def name(self, value: Any) -> Any:
        variable = self._tirx.Var("", str(value.ty.dtype))
        self._named.append((variable, value))
        return variable

    def within(self, value: Any) -> Any:
        """The value, around which the names mean what they were given."""
        for variable, named in reversed(self._named):
            value = self._tirx.Let(variable, named, value)
        return value

    def clamped(self, value: Any, low: float, high: float) -> Any:
        """Constants first: NaN stays."""
        return self.name(self._tirx.Max(self.number(low), self._tirx.Min(self.number(high), value)))

    def polynomial(self, x: Any, coefficients: tuple[float, ...]) -> Any:
        total = self.number(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            total = total * x + self.number(coefficient)
        return total

    def power(self, exponent: Any) -> Any:
        """2 to a whole number between -126 and 127."""
        bits = (exponent + self.number(127, self.integers)) << self.number(23, self.integers)
        return self._tirx.reinterpret(self.floats, bits)

    def split(self, x: Any) -> tuple[Any, Any]:
        """(m, n) of which exp(x) is (1 + m) * 2**n, for x between -104 and 89."""
        near = self.name(x * self.number(LOG2_E) + self.number(ROUNDS))
        whole = self.name(near - self.number(ROUNDS))
        upper = self.name(x - whole * self.number(LN2[0]))
        rest = self.name(upper - whole * self.number(LN2[1]))
        beyond = self.name(rest + rest * rest * self.polynomial(rest, EXP))
        bits = self._tirx.reinterpret(self.integers, near)
        return beyond, self.name(bits - self.number(ROUNDS_BITS, self.integers))

    def exp(self, x: Any) -> Any:
        beyond, exponent = self.split(self.clamped(x, -104.0, 89.0))
        half = self.name(exponent >> self.number(1, self.integers))  # neither 2**128 nor 2**-149 is one scale
        return (self.number(1.0) + beyond) * self.power(half) * self.power(exponent - half)

    def tanh(self, x: Any) -> Any:
        beyond, exponent = self.split(self.clamped(x + x, -20.0, 20.0))
        scale = self.name(self.power(exponent))
        less = self.name(beyond * scale + (scale - self.number(1.0)))  # exp(2 x) - 1
        return less / (less + self.number(2.0))

    def erf(self, x: Any) -> Any:
        x = self.name(x)
        size = self.name(self._tirx.Min(self.number(FAR), self._tirx.abs(x)))
        near = x + x * self.polynomial(self.name(x * x), ERF_NEAR)
        far = self.name(self.number(1.0) - self.exp(self.number(0.0) - self.polynomial(size, ERF_FAR)))
        signed = self._tirx.Select(x < self.number(0.0), self.number(0.0) - far, far)
        return self._tirx.Select(self._tirx.abs(x) < self.number(NEAR), near, signed)


def _rule(name: str) -> Any:
    def lowered(call: Any) -> Any:
        (x,) = call.args
        if not str(x.ty.dtype).startswith("float32"):
            return call
        lanes = _Lanes(x)
        return lanes.within(getattr(lanes, name)(x))

    return lowered


def teach_tvm() -> None:
    """Lets TVM lower them so in code for CPUs, and treat erf as it does the others: as one that vectors have. Once, by
    whichever thread comes first."""
    with _TEACHING:
        _teach()


@cache
def _teach() -> None:
    import tvm

    tvm.ir.register_op_attr("tirx.erf", "TVectorizable", True)
    bfloat16.teach_tvm()
    for name in ("exp", "tanh", "erf"):
        tvm.tirx.register_intrin_lowering(f"tirx.{name}", target="llvm", f=_rule(name), level=BEFORE_TVMS)

"""Text of a normalisation, for the kernels that are one on a CPU and for those that take one in.

of  what the names of one normalisation end with, where a kernel has several
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mest_compile.ir.layouts.batch import Image
from mest_compile.kernels.text import Text
from mest_compile.operators.activation import Activation
from mest_compile.schedules.cpu.rows import UNROLL, Chunks, buffer, fold, number, spelled, walk_row, widened, zero


def facts(channels: int, of: str = "") -> list[str]:
    """Arguments that say how channels are normalised."""
    return [buffer(f"moments{of}", 3 * channels), buffer(f"affine{of}", 2 * channels)]


def set_facts(text: Text, channels: int, of: str = "") -> None:
    """Sets what `normalised` names, for channel `c`."""
    text(
        f"mean{of}: T.let = moments{of}[c]",
        f"scale{of}: T.let = affine{of}[{channels} + c] * moments{of}[{channels} + c]",
        f"shift{of}: T.let = affine{of}[c]",
    )


def normalised(z: str, of: str = "") -> str:
    """Before residual and activation; forward and backward use this one form, so that they agree on where a ReLU is
    positive."""
    return f"(({z} - mean{of}) * scale{of} + shift{of})"


def activated(z: str, row: Activation | None, of: str = "") -> str:
    """With the activation behind it."""
    return spelled(row.formula, x=normalised(z, of)) if row else normalised(z, of)


def finite(value: str) -> str:
    """0 in the place of NaN and infinity: distances from these would be NaN where the sum of the values is infinite."""
    return f'T.Select(T.abs({value}) < T.float32("inf"), {value}, T.float32(0))'


class NormGradient:
    """Text of a channel's gradient on its way back through a normalisation and the activation behind it: its sums, then
    itself.

    Sums are float32 vectors within a slice, float64 over slices; that of dy itself over UNROLL vectors already.
    row     the activation; None: none, or dy is already what it is before it
    arrays  (of dy, of z): their names
    """

    def __init__(
        self,
        text: Text,
        dy: Image,
        z: Image,
        row: Activation | None,
        arrays: tuple[str, str] = ("dy", "z"),
        of: str = "",
    ):
        self.text, self.dy, self.z, self.row, self.of = text, dy, z, row, of
        self.dy_name, self.z_name = arrays
        self.rows = Chunks(dy)

    def dy_at(self, at: str) -> str:
        return widened(self.dy, f"{self.dy_name}[{self.dy_name}_row + {at}]")

    def z_at(self, at: str) -> str:
        return widened(self.z, f"{self.z_name}[{self.z_name}_row + {at}]")

    def gradient(self, at: str, z: str) -> str:
        """dy before the activation."""
        dy = self.dy_at(at)
        return spelled(self.row.gradient, x=normalised(z, self.of), dy=dy) if self.row else dy

    def begin(self) -> None:
        """Sums of nothing."""
        of, vector = self.of, self.dy.floats
        self.text.local(f"partial{of}", UNROLL * vector)
        self.text.local(f"joined{of}", 3, "float64")
        for name, dtype in ("few", "float32"), ("whole", "float64"), ("total", "float64"):
            self.text.local(f"{name}{of}", vector, dtype)
            zero(self.text, f"{name}{of}", vector, vector, dtype)

    def begin_slice(self) -> None:
        zero(self.text, f"partial{self.of}", UNROLL * self.dy.floats, self.dy.floats)

    def end_slice(self) -> None:
        fold(self.text, 1, self.dy.floats, self.of)

    def add_tile(self, places: Sequence[tuple[str, str, str]]) -> list[str]:
        """Statements on a vector of lanes `i`: sets elements of dy to what they are before the activation, and adds
        them up. places: (element of dy, of z, the gradient behind the activation as float32) of each."""
        of, lines = self.of, [f"few{self.of}[i] = T.float32(0)"]
        for place, (dy, z, value) in enumerate(places):
            part = f"partial{of}[{place % UNROLL * self.dy.floats} + i]"
            lines += [f"z_{place}: T.let = {widened(self.z, z)}", f"value_{place}: T.let = {value}"]
            gradient = f"value_{place}"
            if self.row:
                gradient = spelled(self.row.gradient, x=normalised(f"z_{place}", of), dy=gradient)
            lines += [
                f"gradient_{place}: T.let = {gradient}",
                f"{dy} = gradient_{place}",
                f"few{of}[i] = few{of}[i] + gradient_{place}",
                f"{part} = {part} + gradient_{place} * (z_{place} - mean{of})",
            ]
        return [*lines, f'whole{of}[i] = whole{of}[i] + T.cast(few{of}[i], "float64")']

    def add_up(
        self,
        images: Mapping[str, Image],
        first: Callable[[str], list[str]] = lambda at: [],
        fetched: Sequence[str] = (),
        there: bool = True,
    ) -> None:
        """Adds up the channel `c`. images: what is read, by name; first: statements before an element is; there:
        whether z is, else it is 0."""
        of = self.of

        def add(at: str, slot: str, live: str | None) -> list[str]:
            z = self.z_at(at) if there else "T.float32(0)"
            part = f"partial{of}[{slot}]"
            product = f"{part} = {part} + {self.gradient(at, z)} * ({z} - mean{of})"
            return [
                *first(at),
                f"few{of}[i] = few{of}[i] + {self.gradient(at, z)}",
                *([product] if there else []),
            ]

        add_few = [f'whole{of}[i] = whole{of}[i] + T.cast(few{of}[i], "float64")', f"few{of}[i] = T.float32(0)"]
        with self.text.nest(f"for s in T.serial({self.dy.slices})"):
            self.begin_slice()
            with self.text.nest(f"for r in T.serial({self.dy.height})"):
                self.rows.set_row(self.text, f"s * {self.dy.height} + r", dict(images))
                walk_row(self.text, self.dy, add, fetched, add_few)
            self.end_slice()

    def join(self) -> None:
        """Stores the channel's sums."""
        of, channels = self.of, self.dy.channels
        # the last is hardly below any dy
        for s, part in enumerate((f"whole{of}[i]", f"total{of}[i]", f"T.abs(whole{of}[i])")):
            self.text(f"joined{of}[{s}] = T.float64(0)")
            with self.text.nest(f"for i in T.serial({self.dy.floats})"):
                self.text(f"joined{of}[{s}] = joined{of}[{s}] + {part}")
        deviation = f'T.cast(moments{of}[{channels} + c], "float64")'
        self.text(
            f'sums{of}[c] = T.cast(joined{of}[0], "float32")',
            f'sums{of}[{channels} + c] = T.cast(joined{of}[1] * {deviation}, "float32")',
        )

    def set_spread(self) -> None:
        """Sets what `spread` takes of the channel: scale * (dy - near) - (distance * slope + rest).

        Before a constant z, only what all elements of dz have in common counts, and the mean of dy, as one float32 or
        two subtracted in turn, rounds alike in all. `near`, in steps as coarse as the largest dy's, is subtracted
        exactly, and `rest` where the product with scale is rounded, otherwise in each element."""
        of, image, channels = self.of, self.dy, self.dy.channels
        share, size = 1 / (image.batch * image.height * image.width), f'T.cast(joined{of}[2], "float32")'
        mean = f"(joined{of}[0] * {number(share, 'float64')})"
        near, rest = f"near{of}[0]", f"rest{of}[0]"
        for name in "near", "rest", "slope":
            self.text.local(f"{name}{of}", 1)
        self.text(
            f'{near} = T.cast({mean}, "float32")',
            f"{rest} = {near} + {size}",
            f'{near} = T.Select(T.abs({rest}) < T.float32("inf"), {rest} - {size}, {near})',
            f'{rest} = T.cast(T.cast(scale{of}, "float64") * ({mean} - T.cast({near}, "float64")), "float32")',
            f"{rest} = {finite(rest)}",
            f"slope{of}[0] = scale{of} * (sums{of}[{channels} + c] * {number(share)} * moments{of}[{channels} + c])",
        )

    def spread(self, at: str, told: bool = False) -> str:
        """An element of dz. told: whether dy is already what it is before the activation."""
        of, z = self.of, self.z_at(at)
        gradient = self.dy_at(at) if told else self.gradient(at, z)
        return f"(scale{of} * ({gradient} - near{of}[0]) - (({z} - mean{of}) * slope{of}[0] + rest{of}[0]))"

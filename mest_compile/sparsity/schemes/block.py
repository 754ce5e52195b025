"""Blocks of consecutive output and input channels that live or die together at one tap."""

import re
from dataclasses import dataclass

from mest_compile.base import checks
from mest_compile.base.errors import UsageError
from mest_compile.ir.graph import LayerSpec
from mest_compile.sparsity.scheme import Scheme, scheme


@scheme("block")
@dataclass(frozen=True, slots=True)
class Block(Scheme):
    """A unit is `rows` consecutive output channels times `columns` consecutive input channels at one kernel position.

    4x1 is MEST's block; its score is the L2 norm of the four, all blocks of a layer ranked together.
    """

    rows: int = 4
    columns: int = 1
    name = "block"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", checks.whole("Block: rows", self.rows, 1))
        object.__setattr__(self, "columns", checks.whole("Block: columns", self.columns, 1))
        if self.rows * self.columns > 16:
            raise UsageError(f"a block of {self.rows}x{self.columns} weights; wanted 1x1 to 16 weights, such as 4x1")

    @classmethod
    def parse(cls, arguments: str) -> Scheme:
        if not arguments:
            return cls()
        found = re.fullmatch(r"(\d+)x(\d+)", arguments)
        if not found:
            raise UsageError(f"block arguments are ROWSxCOLUMNS as in block:4x1, got {arguments!r}")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def variants(cls) -> list[Scheme]:
        sides = (1, 2, 4, 8, 16)
        return [cls(rows, columns) for rows in sides for columns in sides if 1 < rows * columns <= 16]

    def block(self, layer: LayerSpec) -> tuple[int, int]:
        return self.rows, self.columns

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.columns}"

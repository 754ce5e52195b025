"""Reads a kernel's text with what is known of its index: loops over units get known lengths, pointers become sums.

A text says that by a line above it: `@baked(counts=(6, 6, 4), groups=8, live=0)`. Nothing is rewritten; the walk gives
other values for the few expressions that the structure decides, and what follows from them it computes as it goes.
Kernels are cached under their text: should that line come to mean something else, it needs another name.
"""

from __future__ import annotations

import ast
import itertools
from typing import Any

from mest_compile.kernels.walker import Walker


class BakingWalker(Walker):
    """counts: units of every group, one number a section; groups: of a section; live: those that have units where rows
    are listed, else 0.

    Neighbouring sections of equal length share one loop over them, so a layer whose last section alone is shorter has
    two. Loops that never turn go. Where one over rounds of several units was followed by one over those that remain,
    one over all units is left: LLVM unrolls it as far as that pays.
    """

    def __init__(self, counts: tuple[int, ...], groups: int, live: int):
        super().__init__()
        self._counts, self._groups, self._live = counts, groups, live
        self._count: int | None = None  # of the sections that are read now, and what unit 0 of their section 0 would be
        self._base = 0
        self._loops = 0

    def function(self, definition: ast.FunctionDef) -> Any:
        found = super().function(definition)
        if self._loops != 1:
            raise SyntaxError(f"a structure is baked into one loop over sections, and there are {self._loops}")
        return found

    def _loop(self, loop: ast.For) -> None:
        match loop:
            case ast.For(ast.Name("section"), body=body):
                self._over_sections([], [], body)
            case ast.For(ast.Tuple([ast.Name("section"), *names]), ast.Call(args=[_, *extents]), body):
                self._over_sections(names, extents, body)
            case ast.For(ast.Name("round")) if self._count is not None:
                pass  # its units are in the loop behind it
            case ast.For(ast.Name("unit"), body=body) if self._count is not None:
                self._turn(self._script.serial(self._count), loop.target, body)
            case ast.For(ast.Name("several"), ast.Call(args=[turns])) if self.value(turns) == 0:
                pass
            case _:
                super()._loop(loop)

    def _over_sections(self, names: list[ast.expr], extents: list[ast.expr], body: list[ast.stmt]) -> None:
        """A loop for every run of sections of equal length, around one over the other `names` where there are any."""
        self._loops += 1
        live = self._live or self._groups
        first = begun = 0  # the section and the unit that the next loop begins at
        for count, run in itertools.groupby(self._counts):
            many = len(list(run))
            self._count, self._base = count, begun - first * live * count
            with self._script.serial(first, first + many) as section:
                self._bind(ast.Name("section"), section)
                if len(names) > 1:
                    self._turn(self._script.grid(*map(self.value, extents)), ast.Tuple(names), body)
                elif names:
                    self._turn(self._script.serial(self.value(extents[0])), names[0], body)
                else:
                    self._body(body)
            first, begun = first + many, begun + many * live * count
        self._count = None

    def _binary(self, node: ast.BinOp) -> Any:
        match node.left, node.op, node.right:
            case ast.Subscript(ast.Name("pointers")), ast.Sub(), ast.Subscript(ast.Name("pointers")):
                return self._count
            case ast.BinOp() as full, ast.Add(), ast.Name("unit") if isinstance(self.value(full), int):
                return self.value(node.right)  # the rounds before it are not there
        return super()._binary(node)

    def _subscript(self, node: ast.Subscript) -> Any:
        match node:
            case ast.Subscript(ast.Name("live_groups")) if self._live:
                return self._live
            case ast.Subscript(ast.Name("pointers"), cell):
                if self._count is None:
                    raise SyntaxError(f"line {node.lineno}: pointers are read outside the loop over sections")
                # Units of a section's live groups stand without a gap.
                at = self._combined(ast.Mult, self.value(cell), self._count)
                if self._base:
                    at = self._combined(ast.Add, self._base, at)
                if self._live and (gap := (self._groups - self._live) * self._count):
                    at = self._combined(ast.Sub, at, self._combined(ast.Mult, self.names["section"], gap))
                return at
        return super()._subscript(node)

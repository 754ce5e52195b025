"""What every schedule writes its kernel's text with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Text:
    """The lines of one kernel. Call it with statements; `nest` opens a loop or a condition. `str` of it is TVMScript of
    one function.

    arguments  of the function: 'x: T.Buffer((8,), "float32")', or 'x_handle: T.handle' of what `symbolic` names
    """

    def __init__(self, *arguments: str):
        self._arguments = arguments
        self._symbols: list[str] = []
        self._declared: list[str] = []
        self._lines: list[str] = []
        self._depth = 1

    def __call__(self, *statements: str) -> None:
        self._lines += ["    " * self._depth + statement for statement in statements]

    @contextmanager
    def nest(self, *headers: str) -> Iterator[None]:
        """Opens one block inside the other; each header lacks its colon."""
        for header in headers:
            self(header + ":")
            self._depth += 1
        yield
        self._depth -= len(headers)

    def local(self, name: str, elems: int, dtype: str = "float32") -> None:
        """An array of this place: on a CPU's stack, where scope "local" would be heap workspace."""
        self(f'{name} = T.alloc_buffer(({elems},), "{dtype}")')

    def symbolic(self, symbol: str, sizes: Mapping[str, tuple[str, str]]) -> None:
        """Arguments `<name>_handle: T.handle` whose size is known when the kernel runs: name -> (size in terms of
        symbol, dtype)."""
        self._symbols.append(f"{symbol} = T.int32()")
        self._declared += [
            f'{name} = T.match_buffer({name}_handle, ({size},), "{dtype}")' for name, (size, dtype) in sizes.items()
        ]

    def head(self) -> tuple[str, str]:
        """(the line above the function, its attributes)"""
        return "@T.prim_func", '"tirx.noalias": True'

    def __str__(self) -> str:
        above, attributes = self.head()
        first = [f"T.func_attr({{{attributes}}})", *self._symbols, *self._declared]
        definition = f"def kernel({', '.join(self._arguments)}):"
        return "\n".join([above, definition, *("    " + line for line in first), *self._lines]) + "\n"

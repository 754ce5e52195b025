"""TVMScript text of one kernel to TVM's function.

The text is Python: Python parses it, and TVM's builder makes the function. TVM's own parser does that too, but
evaluates every expression as a program of its own (docs/architecture.md has both times). Kernels need a small part of
the language, and one walk over the tree (kernels/walker.py) gives the same function, which a test asks of every kernel
there is. What it does not know it refuses.
"""

from __future__ import annotations

import ast
import threading
from typing import Any

from mest_compile.kernels.baking import BakingWalker
from mest_compile.kernels.walker import Walker

# CPython before 3.11.8 counts the depth of all threads' syntax trees in one place and raises SystemError when two are
# made at once (python/cpython issue 106905).
_LOCK = threading.Lock()


def parse(text: str, symbol: str) -> Any:
    """The PrimFunc of a kernel's text under the name `symbol`. Raises SyntaxError, NameError, and what TVM does."""
    with _LOCK:
        (definition,) = ast.parse(text).body
    if not isinstance(definition, ast.FunctionDef):
        raise SyntaxError("a kernel's text is one function")
    return _walker_of(definition).function(definition).with_attr("global_symbol", symbol)


def _walker_of(definition: ast.FunctionDef) -> Walker:
    """Takes the line away that says what is baked in."""
    match definition.decorator_list:
        case [ast.Call(ast.Name("baked"), keywords=facts), *rest]:
            definition.decorator_list = rest
            return BakingWalker(**{str(fact.arg): ast.literal_eval(fact.value) for fact in facts})
    return Walker()

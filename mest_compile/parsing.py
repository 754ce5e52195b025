"""TVMScript text to a function, one at a time."""

from __future__ import annotations

import threading
from typing import Any

# CPython before 3.11.8 counts the depth of all threads' syntax trees in one place and raises SystemError when two are made at once
# (python/cpython issue 106905). Parsing holds Python's lock anyway.
_LOCK = threading.Lock()


def parse(text: str, symbol: str) -> Any:
    """The PrimFunc of a kernel's text under the name `symbol`. Raises what TVM does."""
    import tvm
    from tvm.script import tirx

    with _LOCK:
        return tvm.script.from_source(text, extra_vars={"T": tirx}).with_attr("global_symbol", symbol)

"""Sparsity schemes, distributions of sparsity over layers, and packing of masks into index arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mest_compile.base.errors import UsageError
from mest_compile.sparsity.scheme import SCHEMES, Scheme


def parse_scheme(scheme: str | Scheme) -> Scheme:
    """A Scheme from itself or from "name" or "name:arguments" ("block", "block:4x1", "2:4"). Raises UnknownName,
    UsageError."""
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise UsageError(
            f"a scheme is a name or a mest.Scheme, not {type(scheme).__name__}; names: {', '.join(SCHEMES.names())}"
        )
    for kind in SCHEMES.load().values():
        if kind.spelling and re.fullmatch(kind.spelling, scheme):
            return kind.parse(scheme)
    name, _, arguments = scheme.partition(":")
    return SCHEMES.find(name).parse(arguments)


def parse_schemes(scheme: str | Scheme | Mapping[str, str | Scheme]) -> Scheme | dict[str, Scheme]:
    """The same, or {layer name or pattern: scheme} of a mapping. Raises UnknownName, UsageError."""
    if not isinstance(scheme, Mapping):
        return parse_scheme(scheme)
    if not scheme:
        raise UsageError("scheme is {}; wanted a scheme, or {layer name or pattern: scheme}")
    return {name: parse_scheme(one) for name, one in scheme.items()}

"""What an operator is, and what it may ask of the step that is being lowered."""

from __future__ import annotations

from mest_compile.base.registry import Registry

OPERATORS = Registry("operator", "mest_compile.operators")


def operator(name: str):
    """Class decorator: registers a training operator (one instance serves all layers)."""

    def register(cls):
        OPERATORS.add(name, cls())
        return cls

    return register

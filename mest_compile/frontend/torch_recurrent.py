"""nn.GRU, nn.LSTM and nn.RNN as calls of one function a layer and direction, which a reader knows: torch's own
decomposition writes every step of a series down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax

from mest_compile.frontend.recurrent_calls import call_directions, states

ZEROS = ("zeros", "full", "zeros_like", "new_zeros")


def _is_zero(state: Any) -> bool:
    """Of a state before the first step, or two, as torch.fx has them."""
    if isinstance(state, list | tuple):
        return all(map(_is_zero, state))
    name = getattr(state.target, "__name__", "").split(".")[0]
    return name in ZEROS and (name != "full" or state.args[1] == 0)


def recurrent(kind: str) -> Callable[[Any, Any], Any]:
    def convert(node: Any, importer: Any) -> Any:
        """Gives (values, hidden states after the last step, None in the place of an LSTM's other state)."""
        given, before, weights, biased, layers, dropout, _, both, batch_first = node.args
        if not _is_zero(before):
            raise NotImplementedError("a state to begin with, leave it out: it is 0 then")
        if dropout and layers > 1:
            raise NotImplementedError(f"dropout={dropout} between its layers, make them apart, with nn.Dropout between")
        each = 4 if biased else 2
        directions = ("forward", "reverse")[: 1 + both]
        if len(weights) != each * layers * len(directions):
            raise NotImplementedError("proj_size, which is not supported")
        emit, env = importer.block_builder.emit, importer.env
        value = env[given] if batch_first else emit(relax.op.permute_dims(env[given], (1, 0, 2)))
        pending, last = [env[one] for one in weights], []
        for _ in range(layers):
            own = {one: pending[each * place : each * (place + 1)] for place, one in enumerate(directions)}
            pending = pending[each * len(directions) :]
            value, ended = call_directions(emit, kind, value, own)
            last += ended
        state = states(emit, last)
        value = value if batch_first else emit(relax.op.permute_dims(value, (1, 0, 2)))
        return (value, state, None) if kind == "lstm" else (value, state)

    return convert

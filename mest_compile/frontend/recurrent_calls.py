"""Recurrent layers as Relax calls that a reader of our own knows (`operators/recurrent.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import relax


def call_directions(
    emit: Callable[[Any], Any], kind: str, value: Any, weights: Mapping[str, Sequence[Any]]
) -> tuple[Any, list[Any]]:
    """((N, T, directions * H), [(N, H) after the last step of every direction]) of (N, T, inputs).

    emit     of a block builder
    kind     "gru", "lstm", "rnn_tanh" or "rnn_relu"; with ".gates" behind it a value is of what the gates take already
    weights  of "forward", of "reverse" or of both, as torch has them: input weight, hidden weight, two biases or none;
             of gates hidden weight, bias or none
    """
    batch, steps, _ = (int(size) for size in value.ty.shape)
    found, last = [], []
    for direction, own in weights.items():
        hidden = int(own[0 if kind.endswith(".gates") else 1].ty.shape[1])
        made = relax.op.call_pure_packed(
            f"mest.{kind}.{direction}", value, *own, ty_args=relax.TensorType([batch, steps, hidden], "float32")
        )
        found.append(emit(made))
        end = 0 if direction == "reverse" else steps - 1
        part = emit(relax.op.strided_slice(found[-1], axes=[1], begin=[end], end=[end + 1], strides=[1]))
        last.append(emit(relax.op.reshape(part, (batch, hidden))))
    return found[0] if len(found) == 1 else emit(relax.op.concat(found, axis=-1)), last


def states(emit: Callable[[Any], Any], last: Sequence[Any]) -> Any:
    """(layers and directions, N, H) of what `call_directions` gave of each."""
    batch, hidden = (int(size) for size in last[0].ty.shape)
    state = last[0] if len(last) == 1 else emit(relax.op.concat(list(last), axis=1))
    return emit(relax.op.permute_dims(emit(relax.op.reshape(state, (batch, len(last), hidden))), (1, 0, 2)))

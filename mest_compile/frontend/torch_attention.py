"""nn.MultiheadAttention that drops shares while it trains, written out: dropout is then a call of its own, of shares
that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn import functional as F


@contextmanager
def written_out(module: torch.nn.Module) -> Iterator[None]:
    """While it lasts, the module's parts that drop shares call torch's functions one by one."""
    changed = []
    try:
        for part in module.modules():
            if type(part) is torch.nn.MultiheadAttention and part.dropout and "forward" not in vars(part):
                part.forward = partial(_forward, part)  # type: ignore[method-assign]
                changed.append(part)
        yield
    finally:
        for part in changed:
            del part.forward


def _forward(
    part: torch.nn.MultiheadAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of one value that attends to itself; anything else goes torch's way."""
    alone = query is key and key is value and query.dim() == 3 and key_padding_mask is None and not need_weights
    masked = not is_causal if attn_mask is None else attn_mask.dim() == 2
    if not (alone and masked) or not part._qkv_same_embed_dim or part.bias_k is not None or part.add_zero_attn:
        asked = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        return type(part).forward(part, query, key, value, *asked)
    x = query if part.batch_first else query.transpose(0, 1)
    joined = F.linear(x, part.in_proj_weight, part.in_proj_bias).chunk(3, -1)
    q, k, v = (one.unflatten(-1, (part.num_heads, part.head_dim)).transpose(1, 2) for one in joined)
    scores = q @ k.transpose(-1, -2) * part.head_dim**-0.5
    if attn_mask is not None:
        hides = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(attn_mask, -torch.inf) if hides else scores + attn_mask
    shares = F.dropout(scores.softmax(-1), part.dropout, part.training)
    x = part.out_proj((shares @ v).transpose(1, 2).flatten(2))
    return x if part.batch_first else x.transpose(0, 1), None

"""Blocks: one of open_clip's plain transformer blocks, and rows that its queries read besides their own.

Deep prompts are such rows: O(x) = MHA(q = LN(x), k = v = LN([P ; x])). The sequence does not grow, and nothing of them
goes on to the next block (Huang, Pedapati, Chen, Gao: Differentiable Prompt Learning for Vision Language Models, 2025).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Deep:
    """What the queries of one block read besides their own rows."""

    rows: Tensor
    """(t, w)"""
    shares: Tensor | None = None
    """(k,) where there are candidates: how much of each one's attention is taken, 1 in all; None: all rows are read."""
    members: Tensor | None = None
    """(k, t) the rows that each candidate reads, as 0 and 1."""

    def candidates(self) -> Iterator[tuple[Tensor | float, Tensor]]:
        """Each share with its rows."""
        if self.shares is None or self.members is None:
            yield 1.0, self.rows
        else:
            for share, its in zip(self.shares, self.members, strict=True):
                yield share, self.rows[its.bool()]


def supports_block(block: Any) -> bool:
    """Whether this is open_clip's plain block, whose parts the engine computes itself."""
    return (
        type(block).__name__ == "ResidualAttentionBlock"
        and isinstance(block.attn, nn.MultiheadAttention)
        and block.attn.in_proj_weight is not None
        and block.attn.in_proj_bias is not None
        and not hasattr(block, "ln_1_kv")
        and all(isinstance(norm, nn.LayerNorm) for norm in (block.ln_1, block.ln_2))
        and (type(block.mlp.gelu).__name__ == "QuickGELU" or getattr(block.mlp.gelu, "approximate", "") == "none")
    )


def attention_weights(scores: Tensor, deep: Deep | None) -> Tensor:
    """Scores (..., t + j) of deep rows and then of its own -> what is taken of each one's value (..., t + j).

    Candidates cost no attention of their own: the exponentials are the same for all, and only what they are divided by
    differs.
    """
    if deep is None or deep.shares is None or deep.members is None:
        return scores.softmax(dim=-1)
    shares, members = deep.shares.to(scores.dtype), deep.members.to(scores.dtype)
    exponentials = (scores - scores.amax(dim=-1, keepdim=True).detach()).exp()
    read, own = exponentials.tensor_split([members.shape[1]], dim=-1)
    parts = shares / (read @ members.T + own.sum(dim=-1, keepdim=True))           # (..., k)
    return torch.cat([read * (parts @ members), own * parts.sum(dim=-1, keepdim=True)], dim=-1)


def through_block(block: Any, x: Tensor, *, mask: Tensor | None = None, deep: Deep | None = None) -> Tensor:
    """Rows (n, l, w) through a block of open_clip's by its own parts, one attention a candidate."""
    if deep is None:
        return block(x, attn_mask=mask)
    asking, found = block.ln_1(x), torch.zeros_like(x)
    for share, rows in deep.candidates():
        keys = block.ln_1(torch.cat([rows.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1))
        seen = None if mask is None else F.pad(mask, (len(rows), 0))
        found = found + share * block.attn(asking, keys, keys, need_weights=False, attn_mask=seen)[0]
    x = x + block.ls_1(found)
    return x + block.ls_2(block.mlp(block.ln_2(x)))

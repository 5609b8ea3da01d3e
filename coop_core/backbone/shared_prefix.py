"""Exact encoding of many prompts that begin alike: the prefix once, then only each prompt's own rows.

In a causal tower a row depends on the rows before it. Prompts that share their first rows share everything
computed for them, at every layer; and rows after EOT are never read. So the prefix runs once as one sequence,
each prompt's tail attends to the prefix's keys and values and to its own rows, the ragged tails are packed
without padding through every matrix product, and the last block computes only what is read: the EOT rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coop_core.backbone.towers import CausalTextTower

KeysValues = list[tuple[Tensor, Tensor]]
"""One pair a block, each (heads, prefix rows, head width)."""


@dataclass(frozen=True)
class TailPlan:
    """Where each packed tail row belongs; t is the longest tail, T the number of all tail rows."""

    packed: Tensor
    """(T,) flat positions in a padded (c, t) grid."""
    end: Tensor
    """(c,) the packed index of each prompt's EOT."""
    mask: Tensor
    """(c, 1, t, t) additive: own earlier rows are visible."""
    end_mask: Tensor
    """(c, 1, 1, t) additive: what the EOT row sees."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[0], self.mask.shape[-1]


def supports_shared_prefix(tower: object) -> bool:
    """Whether every block is open_clip's plain one, whose parts this module calls itself."""
    if not isinstance(tower, CausalTextTower):
        return False
    blocks = tower.module.transformer.resblocks
    return all(
        type(block).__name__ == "ResidualAttentionBlock"
        and isinstance(block.attn, torch.nn.MultiheadAttention)
        and block.attn.in_proj_weight is not None
        and not hasattr(block, "ln_1_kv")
        for block in blocks
    )


def plan_tails(lengths: Tensor, *, shared_rows: int) -> TailPlan:
    """Plan the packing for prompts of `lengths` rows whose first `shared_rows` rows are the prefix."""
    tails = lengths - shared_rows                                                 # (c,)
    t = int(tails.max())
    slot = torch.arange(t, device=lengths.device)
    valid = slot < tails[:, None]                                                 # (c, t)
    visible = (slot[None, :] <= slot[:, None]) & valid[:, None, :]                # (c, t, t)
    visible |= torch.eye(t, dtype=torch.bool, device=lengths.device)              # a padded row sees itself: no NaN
    mask = torch.zeros(visible.shape, device=lengths.device).masked_fill(~visible, float("-inf"))[:, None]
    end = tails.cumsum(0) - 1
    return TailPlan(
        packed=valid.flatten().nonzero().squeeze(1),
        end=end,
        mask=mask,
        end_mask=mask[torch.arange(len(tails), device=lengths.device), :, tails - 1][:, :, None],
    )


def encode_prefix(tower: CausalTextTower, prefix: Tensor) -> KeysValues:
    """The shared rows (prefix rows, w), without positions -> every block's keys and values."""
    x = tower.add_positions(prefix)
    found: KeysValues = []
    blocks = tower.module.transformer.resblocks
    for block in blocks:
        q, k, v = _heads(block, _project_qkv(block, x))
        found.append((k, v))
        if block is not blocks[-1]:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = _after_attention(block, x, attended.transpose(0, 1).flatten(1))
    return found


def encode_tails(
    tower: CausalTextTower, tails: Tensor, positions: Tensor, plan: TailPlan, prefix: KeysValues
) -> Tensor:
    """Packed tail rows (T, w) with their token positions (T,) -> features (c, d), not normalised."""
    dtype = tower.module.transformer.get_cast_dtype()
    x = tails.to(dtype) + tower.module.positional_embedding[positions].to(dtype)
    blocks = tower.module.transformer.resblocks
    for block, keys_values in zip(blocks, prefix, strict=True):
        last = block is blocks[-1]
        q, k, v = _project_qkv(block, x).unbind(1)                                # (T, w) each
        k, v = _grid(block, k, plan), _grid(block, v, plan)                       # (c, heads, t, head width)
        if last:
            q = _split(block, q.index_select(0, plan.end))[:, :, None]            # (c, heads, 1, head width)
            x = x.index_select(0, plan.end)                                       # (c, w)
            attended = _attend(q, k, v, keys_values, plan.end_mask)
            x = _after_attention(block, x, attended.flatten(1))
        else:
            attended = _attend(_grid(block, q, plan), k, v, keys_values, plan.mask)
            rows = attended.transpose(1, 2).flatten(2).flatten(0, 1)              # (c t, w)
            x = _after_attention(block, x, rows.index_select(0, plan.packed))
    return tower.project(x)


def _attend(q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """Queries (c, heads, t', .) over the shared prefix and their own prompt's rows -> (c, heads, t', .)."""
    prefix_k, prefix_v = prefix                                                   # (heads, p, head width)
    q = q * q.shape[-1] ** -0.5
    over_prefix = _per_head(q, prefix_k.transpose(-1, -2))                        # (c, heads, t', p)
    over_own = q @ k.transpose(-1, -2) + mask.to(q.dtype)                         # (c, heads, t', t)
    weights = torch.cat([over_prefix, over_own], dim=-1).softmax(dim=-1).to(v.dtype)
    p = prefix_k.shape[-2]
    return _per_head(weights[..., :p], prefix_v) + weights[..., p:] @ v


def _per_head(x: Tensor, shared: Tensor) -> Tensor:
    """(c, heads, t, i) @ (heads, i, j) as one product a head; left to broadcasting it would be c small ones."""
    c, heads, t, _ = x.shape
    return (x.transpose(0, 1).reshape(heads, c * t, -1) @ shared).view(heads, c, t, -1).transpose(0, 1)


def _project_qkv(block: Any, x: Tensor) -> Tensor:
    """(rows, w) -> (rows, 3, w)."""
    projected = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    return projected.unflatten(-1, (3, -1))


def _heads(block: Any, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_split(block, part).transpose(0, 1) for part in qkv.unbind(1))
    return q, k, v


def _split(block: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (block.attn.num_heads, -1))


def _grid(block: Any, rows: Tensor, plan: TailPlan) -> Tensor:
    """Packed rows (T, w) -> the padded grid by heads (c, heads, t, head width)."""
    c, t = plan.shape
    grid = rows.new_zeros(c * t, rows.shape[-1]).index_copy(0, plan.packed, rows)
    return _split(block, grid.view(c, t, -1)).transpose(1, 2)


def _after_attention(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block: output projection, residuals and the MLP."""
    x = x + block.ls_1(block.attn.out_proj(attended))
    return x + block.ls_2(block.mlp(block.ln_2(x)))

"""Packed block: one frozen transformer block over the rows of a prefix tree.

Autograd differentiates it, through products with frozen matrices (`backbone.frozen_linear`).

Dimensions: g sets of context vectors, r = b s rows of a tree of b stripes with s slots, which read p rows of trunk
and u rows before them besides their own; e ends in the fullest stripe, h heads of width a = w / h, n = g b h; i
queries and j keys a stripe. Residual rows and layer norms are float32, matrix products of the type the block is
packed in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coop_core.backbone.blocks import Deep, attention_weights
from coop_core.backbone.frozen_linear import FrozenLinear
from coop_core.prompts.prefix_tree import PrefixTree


@dataclass(frozen=True)
class Shape:
    """A tree on the tower's device, as every block uses it."""

    trunk: int
    reach: int
    mask: Tensor
    """(b, 1, s, p + u + s) additive."""
    end_mask: Tensor
    """(b, 1, e, p + u + s) additive."""
    ends: Tensor
    """(c,) among all rows."""
    grid: Tensor
    """(b e,) the prompts whose ends lie in each stripe; any prompt where there is no further one."""
    places: Tensor
    """(c,) where each prompt stands in the grid."""

    @classmethod
    def of(cls, tree: PrefixTree, device: torch.device, dtype: torch.dtype) -> "Shape":
        (b, s), stripes = tree.mask.shape[:2], tree.ends // tree.mask.shape[1]
        counts = stripes.bincount(minlength=b)
        found = torch.arange(int(counts.max())) < counts[:, None]                 # (b, e)
        grid = torch.zeros(found.shape, dtype=torch.long)
        grid[found] = stripes.argsort(stable=True)
        slots = torch.where(found, tree.ends[grid] % s, 0)
        places = torch.empty_like(tree.ends)
        places[grid[found]] = found.flatten().nonzero().flatten()
        mask = tree.mask.to(device, dtype)                                        # (b, s, p + u + s)
        end_mask = mask[torch.arange(b)[:, None], slots][:, None]
        its = (tree.ends, grid.flatten(), places)
        return cls(tree.trunk, tree.reach, mask[:, None], end_mask, *(one.to(device) for one in its))


class Block:
    """One frozen block, with the attention's scale and layer scale folded into its matrices."""

    def __init__(self, block: Any, dtype: torch.dtype, *, last: bool) -> None:
        attention, mlp = block.attn, block.mlp
        w, bias = attention.in_proj_weight, attention.in_proj_bias
        self.width, self.heads = attention.embed_dim, attention.num_heads
        gammas = [getattr(layer_scale, "gamma", None) for layer_scale in (block.ls_1, block.ls_2)]
        scale = torch.ones(len(w), device=w.device)
        scale[: self.width] = (self.width // self.heads) ** -0.5
        cut = [self.width, 2 * self.width] if last else [len(w)]          # the last asks for ends alone
        pieces = zip(w.split(cut), bias.split(cut), scale.split(cut), strict=True)
        self.to_qkv = [FrozenLinear(*its, dtype) for its in pieces]
        self.out = FrozenLinear(attention.out_proj.weight, attention.out_proj.bias, gammas[0], dtype)
        self.up = FrozenLinear(mlp.c_fc.weight, mlp.c_fc.bias, None, dtype)
        self.down = FrozenLinear(mlp.c_proj.weight, mlp.c_proj.bias, gammas[1], dtype)
        self.norm_1, self.norm_2, self.gelu = _norm(block.ln_1), _norm(block.ln_2), _gelu(mlp.gelu)
        self.dtype, self.last = dtype, last

    def __call__(self, x: Tensor, shape: Shape, deep: Deep | None = None) -> Tensor:
        """Residual rows (g, r, w) -> (g, r, w); in the last block -> those of the ends alone (g, c, w).

        `deep`: rows that every query of this block reads besides, and nothing else of them.
        """
        y = self.norm_1(x).to(self.dtype)
        asking, entering = y, x
        if self.last:
            asking, entering = y.index_select(1, shape.ends), x.index_select(1, shape.ends)
        middle = entering + self.out(self._attend(asking, y, shape, deep))
        hidden = self.up(self.norm_2(middle).to(self.dtype))
        return middle + self.down(self.gelu(hidden))

    def _attend(self, asking: Tensor, y: Tensor, shape: Shape, deep: Deep | None) -> Tensor:
        """Normed rows that ask (g, r or c, w), all normed rows (g, r, w) -> attended rows (g, r or c, w)."""
        b, mask = len(shape.mask), shape.end_mask if self.last else shape.mask
        if self.last:
            q, kv = self.to_qkv[0](asking).index_select(1, shape.grid), self.to_qkv[1](y)
        else:
            q, kv = self.to_qkv[0](y).tensor_split([self.width], dim=-1)
        k, v = _read(kv, shape, self.heads)                                       # (n, j, a) each
        if deep is not None:
            k, v = self._with_deep(k, v, deep.rows)
            mask = F.pad(mask, (len(deep.rows), 0))
        q = _by_heads(q, b, self.heads, parts=1)[0].flatten(0, 2)                          # (n, i, a)
        scores = torch.bmm(q, k.mT)
        scores.view(-1, b, self.heads, *scores.shape[1:]).add_(mask)
        found = torch.bmm(attention_weights(scores, deep), v)                       # (n, i, a)
        rows = found.view(len(y), b, self.heads, *found.shape[1:]).transpose(2, 3).reshape(len(y), -1, self.width)
        return rows.index_select(1, shape.places) if self.last else rows

    def _with_deep(self, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Deep rows (t, w) in front of what each stripe of each set reads (n, j, a)."""
        kv = self.to_qkv[-1](self.norm_1(rows).to(self.dtype))[:, -2 * self.width :]
        deep_k, deep_v = kv.view(len(rows), 2, self.heads, -1).permute(1, 2, 0, 3)         # (h, t, a) each
        sets = len(k) // self.heads
        return torch.cat([deep_k.repeat(sets, 1, 1), k], dim=1), torch.cat([deep_v.repeat(sets, 1, 1), v], dim=1)


def _read(rows: Tensor, shape: Shape, heads: int) -> Tensor:
    """Keys and values of all rows (g, r, 2w) -> what each stripe reads of them (2, n, p + u + s, a)."""
    kv, p, u = _by_heads(rows, len(shape.mask), heads, parts=2), shape.trunk, shape.reach          # (2, g, b, h, s, a)
    if p + u:
        trunk = kv[:, :, :1, :, :p].expand(*kv.shape[:4], p, -1)
        before = F.pad(kv[:, :, :-1, :, kv.shape[-2] - u :], (0, 0, 0, 0, 0, 0, 1, 0))            # hidden in the first
        kv = torch.cat([trunk, before, kv], dim=-2)
    return kv.flatten(1, 3)


def _by_heads(rows: Tensor, stripes: int, heads: int, *, parts: int) -> Tensor:
    """Rows (g, b s, parts w) -> a view (parts, g, b, h, s, a)."""
    return rows.view(len(rows), stripes, -1, parts, heads, rows.shape[-1] // (parts * heads)).permute(3, 0, 1, 4, 2, 5)


def _gelu(layer: Any) -> Callable[[Tensor], Tensor]:
    """GELU by the error function, or OpenAI's x sigmoid(1.702 x), written so that one tensor is kept."""
    if type(layer).__name__ == "QuickGELU":
        return lambda x: F.silu(1.702 * x).div_(1.702)
    return F.gelu


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """Layer norm over the last dimension, in float32."""
    weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
    return lambda x: F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)

"""Packed block: one frozen transformer block over the rows of a prefix tree, forward and backward by hand.

Only the gradient of the rows is wanted, never that of a weight. Written out, a block keeps what its own backward
pass reads and nothing more, and its frozen matrices lie in memory as the processor multiplies fastest, once for
each direction.

Dimensions: g sets of context vectors, r = b s rows of a tree of b stripes with s slots, which read p rows of trunk
and u rows before them besides their own; e ends in the fullest stripe, h heads of width a = w / h, n = g b h.
Residual rows and layer norms are float32, matrix products of the type the block is packed in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coop_core.prompts.prefix_tree import PrefixTree

aten = torch.ops.aten
Moments = tuple[Tensor, Tensor]
"""Mean and reciprocal standard deviation of every row."""


def supports_block(block: Any) -> bool:
    """Whether this is open_clip's plain block, whose parts this module computes itself."""
    return (
        type(block).__name__ == "ResidualAttentionBlock"
        and isinstance(block.attn, torch.nn.MultiheadAttention)
        and block.attn.in_proj_weight is not None
        and block.attn.in_proj_bias is not None
        and not hasattr(block, "ln_1_kv")
        and all(isinstance(norm, torch.nn.LayerNorm) for norm in (block.ln_1, block.ln_2))
        and (type(block.mlp.gelu).__name__ == "QuickGELU" or getattr(block.mlp.gelu, "approximate", "") == "none")
    )


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
        (b, s), stripes = tree.shape, tree.ends // tree.shape[1]
        counts = stripes.bincount(minlength=b)
        found = torch.arange(int(counts.max())) < counts[:, None]                 # (b, e)
        grid = torch.zeros(found.shape, dtype=torch.long)
        grid[found] = stripes.argsort(stable=True)
        slots = torch.where(found, tree.ends[grid] % s, 0)
        places = torch.empty_like(tree.ends)
        places[grid[found]] = found.flatten().nonzero().flatten()
        mask = tree.mask.to(device, dtype)                                        # (b, s, p + u + s)
        return cls(
            tree.trunk, tree.reach,
            mask=mask[:, None],
            end_mask=mask[torch.arange(b)[:, None], slots][:, None],
            ends=tree.ends.to(device), grid=grid.flatten().to(device), places=places.to(device),
        )  # fmt: skip


class Linear:
    """y = x W^T + b with frozen W (out, in) and b (out), both ways."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> None:
        """`scale` (out,) is multiplied into both."""
        weight, bias = weight.detach(), bias.detach()
        if scale is not None:
            weight, bias = weight * scale[:, None], bias * scale
        weight = weight.to(dtype)
        self.forward = _product(weight, bias.to(dtype))
        """(..., in) -> (..., out)"""
        self.backward = _product(weight.T, None)
        """(..., out) -> (..., in)"""


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x (..., in) -> x W^T + bias (..., out).

    On a CPU, W is kept as oneDNN multiplies it: for the few rows of a short class list, putting it in that order
    takes much of the product's time (docs/decisions/003).
    """
    if not _is_packable(weight):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _is_packable(weight: Tensor) -> bool:
    mkldnn = torch.backends.mkldnn
    if weight.device.type != "cpu" or not mkldnn.is_available() or not mkldnn.enabled:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


class Norm:
    """Layer norm over the last dimension, in float32."""

    def __init__(self, norm: Any) -> None:
        self.weight, self.bias, self.eps = norm.weight.detach().float(), norm.bias.detach().float(), norm.eps

    def forward(self, x: Tensor) -> tuple[Tensor, Moments]:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        return y, (mean, rstd)

    def backward(self, dy: Tensor, x: Tensor, moments: Moments) -> Tensor:
        only_x = [True, False, False]
        return aten.native_layer_norm_backward(dy.float(), x, x.shape[-1:], *moments, self.weight, self.bias, only_x)[0]


class Gelu:
    """GELU by the error function, or OpenAI's x sigmoid(1.702 x)."""

    def __init__(self, layer: Any) -> None:
        self.quick = type(layer).__name__ == "QuickGELU"

    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x, 1.702).sigmoid_().mul_(x) if self.quick else F.gelu(x)

    def backward_(self, gradient: Tensor, x: Tensor) -> Tensor:
        """In place, and with few temporaries: nothing in a block is wider."""
        if self.quick:
            gate = torch.mul(x, 1.702).sigmoid_()
            return gradient.mul_((1 - gate).mul_(x).mul_(1.702).add_(1).mul_(gate))
        return aten.gelu_backward.grad_input(gradient, x, grad_input=gradient)


@dataclass
class Attention:
    """What the backward pass of one attention reads."""

    q: Tensor
    """(n, i, a)"""
    kv: Tensor
    """(2, n, j, a)"""
    weights: Tensor
    """(n, i, j)"""

    @classmethod
    def forward(cls, q: Tensor, kv: Tensor, mask: Tensor, heads: int) -> tuple[Tensor, "Attention"]:
        """Queries over keys and values under an additive mask (b, 1, i, j) -> attended (n, i, a)."""
        k, v = kv
        scores = torch.bmm(q, k.mT)
        scores.view(-1, len(mask), heads, *scores.shape[1:]).add_(mask)
        weights = torch.softmax(scores, dim=-1)
        return torch.bmm(weights, v), cls(q, kv, weights)

    def backward(self, do: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the attended -> those of queries, and of keys and values."""
        k, v = self.kv
        dkv = torch.empty_like(self.kv)
        torch.bmm(self.weights.mT, do, out=dkv[1])
        dweights = torch.bmm(do, v.mT)
        dscores = aten._softmax_backward_data(dweights, self.weights, -1, dweights.dtype)
        torch.bmm(dscores.mT, self.q, out=dkv[0])
        return torch.bmm(dscores, k), dkv


@dataclass
class Saved:
    """What the backward pass of one block reads."""

    x: Tensor
    moments_1: Moments
    attention: Attention
    middle: Tensor
    moments_2: Moments
    hidden: Tensor


class Block:
    """One frozen block, with the attention's scale and layer scale folded into its matrices."""

    def __init__(self, block: Any, dtype: torch.dtype, *, last: bool) -> None:
        attention, mlp = block.attn, block.mlp
        w, self.width, self.heads = attention.in_proj_weight, attention.embed_dim, attention.num_heads
        scale = torch.ones(3 * self.width, device=w.device)
        scale[: self.width] = (self.width // self.heads) ** -0.5
        parts = (slice(0, self.width), slice(self.width, None)) if last else (slice(None),)
        self.attended = [Linear(w[part], attention.in_proj_bias[part], dtype, scale[part]) for part in parts]
        """To queries, keys and values; in the last block to queries, and to keys and values."""
        self.out = Linear(attention.out_proj.weight, attention.out_proj.bias, dtype, _gamma(block.ls_1))
        self.up = Linear(mlp.c_fc.weight, mlp.c_fc.bias, dtype)
        self.down = Linear(mlp.c_proj.weight, mlp.c_proj.bias, dtype, _gamma(block.ls_2))
        self.norm_1, self.norm_2, self.gelu = Norm(block.ln_1), Norm(block.ln_2), Gelu(mlp.gelu)
        self.dtype, self.last = dtype, last

    def forward(self, x: Tensor, shape: Shape) -> tuple[Tensor, Saved]:
        """Residual rows (g, r, w) -> (g, r, w); in the last block -> those of the ends alone (g, c, w)."""
        y, moments_1 = self.norm_1.forward(x)
        attended, attention = (self._attend_ends if self.last else self._attend)(y.to(self.dtype), shape)
        entering = x.index_select(1, shape.ends) if self.last else x
        middle = entering + self.out.forward(attended)
        y, moments_2 = self.norm_2.forward(middle)
        hidden = self.up.forward(y.to(self.dtype))
        leaving = middle + self.down.forward(self.gelu.forward(hidden))
        return leaving, Saved(x, moments_1, attention, middle, moments_2, hidden)

    def backward(self, dx: Tensor, shape: Shape, saved: Saved) -> Tensor:
        """The gradient of forward's result -> the gradient of its rows (g, r, w)."""
        dhidden = self.down.backward(dx.to(self.dtype))
        dy = self.up.backward(self.gelu.backward_(dhidden, saved.hidden))
        dx = self.norm_2.backward(dy, saved.middle, saved.moments_2).add_(dx)
        dattended = self.out.backward(dx.to(self.dtype))
        dy = (self._attend_ends_backward if self.last else self._attend_backward)(dattended, saved.attention, shape)
        found = self.norm_1.backward(dy, saved.x, saved.moments_1)
        return found.index_add_(1, shape.ends, dx) if self.last else found.add_(dx)

    def _attend(self, y: Tensor, shape: Shape) -> tuple[Tensor, Attention]:
        """Normed rows (g, r, w) -> attended rows (g, r, w)."""
        (to_qkv,) = self.attended
        qkv = self._by_heads(to_qkv.forward(y), shape)
        return self._over(qkv[0], qkv[1:], shape.mask, shape)

    def _attend_backward(self, dattended: Tensor, saved: Attention, shape: Shape) -> Tensor:
        (to_qkv,) = self.attended
        (gradient,) = self._by_heads(dattended, shape)
        dq, dkv = saved.backward(gradient.flatten(0, 2))
        dqkv = dattended.new_empty(*dattended.shape[:2], 3 * self.width)
        by_heads = self._by_heads(dqkv, shape)
        by_heads[0] = dq.view(gradient.shape)
        _split(dkv, by_heads[1:], shape)
        return to_qkv.backward(dqkv)

    def _attend_ends(self, y: Tensor, shape: Shape) -> tuple[Tensor, Attention]:
        """Normed rows (g, r, w) -> attended rows of the ends alone (g, c, w)."""
        to_q, to_kv = self.attended
        kv = self._by_heads(to_kv.forward(y), shape)
        (q,) = self._by_heads(to_q.forward(y.index_select(1, shape.ends)).index_select(1, shape.grid), shape)
        attended, saved = self._over(q, kv, shape.end_mask, shape)
        return attended.index_select(1, shape.places), saved

    def _attend_ends_backward(self, dattended: Tensor, saved: Attention, shape: Shape) -> Tensor:
        to_q, to_kv = self.attended
        g, b, s = len(dattended), len(shape.mask), shape.mask.shape[2]
        on_grid = dattended.new_zeros(g, len(shape.grid), self.width).index_copy_(1, shape.places, dattended)
        (gradient,) = self._by_heads(on_grid, shape)
        dq, dkv = saved.backward(gradient.flatten(0, 2))
        rows = dattended.new_empty(g, b * s, 2 * self.width)
        _split(dkv, self._by_heads(rows, shape), shape)
        dends = to_q.backward(self._from_heads(dq, shape).index_select(1, shape.places))
        return to_kv.backward(rows).index_add_(1, shape.ends, dends)

    def _over(self, q: Tensor, kv: Tensor, mask: Tensor, shape: Shape) -> tuple[Tensor, Attention]:
        """Queries (g, b, h, ., a) over keys and values (2, g, b, h, s, a) -> attended rows (g, b ., w)."""
        q = q.flatten(0, 2).contiguous()                                          # a view would keep keys and values
        found, saved = Attention.forward(q, _join(kv, shape), mask, self.heads)
        return self._from_heads(found, shape), saved

    def _by_heads(self, rows: Tensor, shape: Shape) -> Tensor:
        """Rows (g, b s, parts w) -> a view (parts, g, b, h, s, a)."""
        parts, a = rows.shape[-1] // self.width, self.width // self.heads
        return rows.view(len(rows), len(shape.mask), -1, parts, self.heads, a).permute(3, 0, 1, 4, 2, 5)

    def _from_heads(self, found: Tensor, shape: Shape) -> Tensor:
        """(n, s, a) -> rows (g, b s, w)."""
        _, s, a = found.shape
        b = len(shape.mask)
        return found.view(-1, b, self.heads, s, a).transpose(2, 3).reshape(-1, b * s, self.width)


def _join(kv: Tensor, shape: Shape) -> Tensor:
    """Keys and values by heads (2, g, b, h, s, a) -> what each stripe reads (2, n, p + u + s, a)."""
    *lead, s, a = kv.shape
    p, u = shape.trunk, shape.reach
    joined = kv.new_empty(*lead, p + u + s, a)
    joined[..., p + u :, :] = kv
    if p + u:
        joined[..., :p, :] = kv[:, :, :1, :, :p]
        joined[:, :, 1:, :, p : p + u] = kv[:, :, :-1, :, s - u :]
        joined[:, :, 0, :, p : p + u] = 0                                         # hidden, but never not a number
    return joined.flatten(1, 3)


def _split(gradient: Tensor, kv: Tensor, shape: Shape) -> None:
    """The gradient of what was joined (2, n, p + u + s, a) -> written into that of its rows (2, g, b, h, s, a)."""
    p, u, s = shape.trunk, shape.reach, kv.shape[-2]
    by_stripe = gradient.view(*kv.shape[:4], -1, kv.shape[-1])
    kv.copy_(by_stripe[..., p + u :, :])
    if p + u:
        kv[:, :, :-1, :, s - u :] += by_stripe[:, :, 1:, :, p : p + u]
        kv[:, :, 0, :, :p] += by_stripe[..., :p, :].sum(dim=2)


def _gamma(layer_scale: Any) -> Tensor | None:
    gamma = getattr(layer_scale, "gamma", None)
    return None if gamma is None else gamma.detach()

"""Packed block: one frozen transformer block over the rows of a prefix tree, forward and backward by hand.

Only the gradient of the rows is wanted, never that of a weight. Written out, a block keeps what its own backward
pass reads and nothing more, and its buffers serve again in the next step: on a CPU, memory that the system must
first provide costs as much as the attention does.

Dimensions: g sets of context vectors, r = b s rows of a tree of b blocks with s slots (p of them a shared trunk),
e ends a block, h heads of width a = w / h, n = g b h. Residual rows and layer norms are float32, matrix products
of the type the block is packed in.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coop_core.backbone.prefix_tree import PrefixTree

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

    blocks: int
    slots: int
    trunk: int
    mask: Tensor
    """(b, 1, s, p + s) additive."""
    end_mask: Tensor
    """(b, 1, e, p + s) additive."""
    end_rows: Tensor
    """(b e,) among all rows."""
    end_of: Tensor
    """(c,) among the ends."""

    @property
    def ends(self) -> int:
        return self.end_mask.shape[2]

    @classmethod
    def of(cls, tree: PrefixTree, device: torch.device, dtype: torch.dtype) -> "Shape":
        tree = tree.to(device)
        blocks, slots = tree.shape
        mask, ends = tree.mask.to(dtype), tree.ends                               # (b, s, p + s), (b, e)
        numbers = torch.arange(blocks, device=device)[:, None]
        return cls(
            blocks, slots, tree.trunk,
            mask=mask[:, None],
            end_mask=mask[numbers, ends][:, None],
            end_rows=(numbers * slots + ends).flatten(),
            end_of=tree.end_of,
        )  # fmt: skip


class Buffers:
    """Tensors lent by shape and type, and given back when nothing will read them again."""

    def __init__(self) -> None:
        self._free: dict[Any, list[Tensor]] = defaultdict(list)

    def take(self, *shape: int, like: Tensor) -> Tensor:
        """An uninitialised tensor."""
        free = self._free[shape, like.dtype]
        return free.pop() if free else torch.empty(shape, dtype=like.dtype, device=like.device)

    def give(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._free[tuple(tensor.shape), tensor.dtype].append(tensor)


class Linear:
    """y = x W^T + b with frozen W (out, in) and b (out).

    W is kept transposed as well: for the few rows of a short class list either pass is up to a fifth faster when it
    reads its matrix in the order in which it lies in memory.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.transposed = weight.T.contiguous()

    @classmethod
    def frozen(cls, weight: Tensor, bias: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> "Linear":
        weight, bias = weight.detach(), bias.detach()
        if scale is not None:
            weight, bias = weight * scale[:, None], bias * scale
        return cls(weight.to(dtype), bias.to(dtype))

    def __getitem__(self, outputs: slice) -> "Linear":
        return Linear(self.weight[outputs], self.bias[outputs])

    def forward(self, x: Tensor, buffers: Buffers) -> Tensor:
        """(rows, in) -> (rows, out)"""
        return torch.addmm(self.bias, x, self.transposed, out=buffers.take(len(x), len(self.weight), like=x))

    def backward(self, dy: Tensor, buffers: Buffers) -> Tensor:
        """(rows, out) -> (rows, in)"""
        return torch.mm(dy, self.weight, out=buffers.take(len(dy), self.weight.shape[1], like=dy))


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

    def forward(self, x: Tensor, buffers: Buffers) -> Tensor:
        out = buffers.take(*x.shape, like=x)
        if self.quick:
            return torch.mul(x, 1.702, out=out).sigmoid_().mul_(x)
        return aten.gelu.out(x, out=out)

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
    k: Tensor
    """(n, j, a)"""
    v: Tensor
    weights: Tensor
    """(n, i, j)"""

    @classmethod
    def forward(
        cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int, buffers: Buffers
    ) -> tuple[Tensor, "Attention"]:
        """Queries over keys and values under an additive mask (b, 1, i, j) -> attended (n, i, a)."""
        scores, weights = (buffers.take(*q.shape[:2], k.shape[1], like=q) for _ in range(2))
        torch.bmm(q, k.mT, out=scores)
        scores.view(-1, len(mask), heads, *scores.shape[1:]).add_(mask)
        torch.softmax(scores, dim=-1, out=weights)
        buffers.give(scores)
        return torch.bmm(weights, v, out=buffers.take(*q.shape, like=q)), cls(q, k, v, weights)

    def backward(self, do: Tensor, buffers: Buffers) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the attended -> those of queries, keys and values."""
        dq, dk, dv, dweights, dscores = (
            buffers.take(*t.shape, like=t) for t in (self.q, self.k, self.v, self.weights, self.weights)
        )
        torch.bmm(self.weights.mT, do, out=dv)
        torch.bmm(do, self.v.mT, out=dweights)
        aten._softmax_backward_data.out(dweights, self.weights, -1, dweights.dtype, grad_input=dscores)
        torch.bmm(dscores, self.k, out=dq)
        torch.bmm(dscores.mT, self.q, out=dk)
        buffers.give(dweights, dscores)
        return dq, dk, dv


@dataclass
class Saved:
    """What the backward pass of one block reads."""

    x: Tensor
    moments_1: Moments
    attention: Attention
    middle: Tensor
    moments_2: Moments
    hidden: Tensor

    def release(self, buffers: Buffers) -> None:
        attention = self.attention
        buffers.give(attention.q, attention.k, attention.v, attention.weights, self.middle, self.hidden)


class Block:
    """One frozen block, with the attention's scale and layer scale folded into its matrices."""

    def __init__(self, block: Any, dtype: torch.dtype, *, last: bool) -> None:
        attention, mlp = block.attn, block.mlp
        self.width, self.heads = attention.embed_dim, attention.num_heads
        scale = torch.ones(3 * self.width, device=attention.in_proj_weight.device)
        scale[: self.width] = (self.width // self.heads) ** -0.5
        self.qkv = Linear.frozen(attention.in_proj_weight, attention.in_proj_bias, dtype, scale)
        self.out = Linear.frozen(attention.out_proj.weight, attention.out_proj.bias, dtype, _gamma(block.ls_1))
        self.up = Linear.frozen(mlp.c_fc.weight, mlp.c_fc.bias, dtype)
        self.down = Linear.frozen(mlp.c_proj.weight, mlp.c_proj.bias, dtype, _gamma(block.ls_2))
        self.norm_1, self.norm_2, self.gelu = Norm(block.ln_1), Norm(block.ln_2), Gelu(mlp.gelu)
        self.dtype = dtype
        if last:
            self.q, self.kv = self.qkv[: self.width], self.qkv[self.width :]
        self.last = last

    def forward(self, x: Tensor, shape: Shape, buffers: Buffers) -> tuple[Tensor, Saved]:
        """Residual rows (g, r, w) -> (g, r, w); in the last block -> those of the ends alone (g, b e, w)."""
        y, moments_1 = self.norm_1.forward(x)
        attended, attention = (self._attend_ends if self.last else self._attend)(y.to(self.dtype), shape, buffers)
        entering = x.index_select(1, shape.end_rows) if self.last else x
        projected = self.out.forward(attended, buffers)
        middle = torch.add(entering, projected.view(entering.shape), out=buffers.take(*entering.shape, like=x))
        y, moments_2 = self.norm_2.forward(middle)
        hidden = self.up.forward(y.to(self.dtype).flatten(0, 1), buffers)
        activated = self.gelu.forward(hidden, buffers)
        buffers.give(attended, projected)
        projected = self.down.forward(activated, buffers)
        buffers.give(activated, projected)
        return middle + projected.view(middle.shape), Saved(x, moments_1, attention, middle, moments_2, hidden)

    def backward(self, dx: Tensor, shape: Shape, saved: Saved, buffers: Buffers) -> Tensor:
        """The gradient of forward's result -> the gradient of its rows (g, r, w)."""
        dhidden = self.down.backward(dx.to(self.dtype).flatten(0, 1), buffers)
        self.gelu.backward_(dhidden, saved.hidden)
        dy = self.up.backward(dhidden, buffers)
        dx = self.norm_2.backward(dy.view(dx.shape), saved.middle, saved.moments_2).add_(dx)
        buffers.give(dhidden, dy)
        dattended = self.out.backward(dx.to(self.dtype).flatten(0, 1), buffers)
        detach = self._attend_ends_backward if self.last else self._attend_backward
        dy = detach(dattended, saved.attention, shape, buffers)
        found = self.norm_1.backward(dy.view(saved.x.shape), saved.x, saved.moments_1)
        buffers.give(dattended, dy)
        return found.index_add_(1, shape.end_rows, dx) if self.last else found.add_(dx)

    def _attend(self, y: Tensor, shape: Shape, buffers: Buffers) -> tuple[Tensor, Attention]:
        """Normed rows (g, r, w) -> attended rows (g r, w)."""
        qkv = self.qkv.forward(y.flatten(0, 1), buffers)
        q, k, v = self._by_heads(qkv, shape.blocks, shape.slots)
        k, v = self._join(k, shape, buffers), self._join(v, shape, buffers)
        found, saved = Attention.forward(_copy(q, buffers), k, v, shape.mask, self.heads, buffers)
        attended = self._from_heads(found, shape.blocks, buffers)
        buffers.give(qkv, found)
        return attended, saved

    def _attend_backward(self, dattended: Tensor, saved: Attention, shape: Shape, buffers: Buffers) -> Tensor:
        (rows,) = self._by_heads(dattended, shape.blocks, shape.slots)
        gradient = _copy(rows, buffers)
        dq, dk, dv = saved.backward(gradient, buffers)
        dqkv = buffers.take(len(dattended), 3 * self.width, like=dattended)
        to_q, to_k, to_v = self._by_heads(dqkv, shape.blocks, shape.slots)
        to_q.copy_(dq.view(to_q.shape))
        _split(dk, to_k, shape)
        _split(dv, to_v, shape)
        dy = self.qkv.backward(dqkv, buffers)
        buffers.give(gradient, dq, dk, dv, dqkv)
        return dy

    def _attend_ends(self, y: Tensor, shape: Shape, buffers: Buffers) -> tuple[Tensor, Attention]:
        """Normed rows (g, r, w) -> attended rows of the ends alone (g b e, w)."""
        kv = self.kv.forward(y.flatten(0, 1), buffers)
        k, v = (self._join(rows, shape, buffers) for rows in self._by_heads(kv, shape.blocks, shape.slots))
        q = self.q.forward(y.index_select(1, shape.end_rows).flatten(0, 1), buffers)
        (queries,) = self._by_heads(q, shape.blocks, shape.ends)
        found, saved = Attention.forward(_copy(queries, buffers), k, v, shape.end_mask, self.heads, buffers)
        attended = self._from_heads(found, shape.blocks, buffers)
        buffers.give(kv, q, found)
        return attended, saved

    def _attend_ends_backward(self, dattended: Tensor, saved: Attention, shape: Shape, buffers: Buffers) -> Tensor:
        (rows,) = self._by_heads(dattended, shape.blocks, shape.ends)
        gradient = _copy(rows, buffers)
        dq, dk, dv = saved.backward(gradient, buffers)
        sets = len(dq) // (shape.blocks * self.heads)
        dkv = buffers.take(sets * shape.blocks * shape.slots, 2 * self.width, like=dattended)
        to_k, to_v = self._by_heads(dkv, shape.blocks, shape.slots)
        _split(dk, to_k, shape)
        _split(dv, to_v, shape)
        dy = self.kv.backward(dkv, buffers)
        dqueries = self._from_heads(dq, shape.blocks, buffers)
        dends = self.q.backward(dqueries, buffers)
        dy.view(sets, -1, self.width).index_add_(1, shape.end_rows, dends.view(sets, -1, self.width))
        buffers.give(gradient, dq, dk, dv, dkv, dqueries, dends)
        return dy

    def _by_heads(self, rows: Tensor, blocks: int, slots: int) -> Tensor:
        """Rows (g b s, parts w) -> a view (parts, g, b, h, s, a)."""
        a = self.width // self.heads
        return rows.view(-1, blocks, slots, rows.shape[1] // self.width, self.heads, a).permute(3, 0, 1, 4, 2, 5)

    def _from_heads(self, found: Tensor, blocks: int, buffers: Buffers) -> Tensor:
        """(n, s, a) -> rows (g b s, w)."""
        n, s, _ = found.shape
        rows = buffers.take(n // self.heads * s, self.width, like=found)
        (by_heads,) = self._by_heads(rows, blocks, s)
        by_heads.copy_(found.view(by_heads.shape))
        return rows

    def _join(self, rows: Tensor, shape: Shape, buffers: Buffers) -> Tensor:
        """Keys or values by heads (g, b, h, s, a) -> what each block reads, the trunk first (n, p + s, a)."""
        g, b, h, s, a = rows.shape
        joined = buffers.take(g * b * h, shape.trunk + s, a, like=rows)
        by_block = joined.view(g, b, h, -1, a)
        by_block[..., shape.trunk :, :] = rows
        if shape.trunk:
            by_block[..., : shape.trunk, :] = rows[:, :1, :, : shape.trunk]
        return joined


def _split(gradient: Tensor, rows: Tensor, shape: Shape) -> None:
    """The gradient of what was joined (n, p + s, a) -> written into that of its rows (g, b, h, s, a)."""
    by_block = gradient.view(*rows.shape[:3], -1, rows.shape[-1])
    rows.copy_(by_block[..., shape.trunk :, :])
    if shape.trunk:
        rows[:, 0, :, : shape.trunk] += by_block[..., : shape.trunk, :].sum(dim=1)


def _copy(by_heads: Tensor, buffers: Buffers) -> Tensor:
    """(g, b, h, s, a) -> (n, s, a), contiguous."""
    *lead, s, a = by_heads.shape
    copy = buffers.take(lead[0] * lead[1] * lead[2], s, a, like=by_heads)
    copy.view(by_heads.shape).copy_(by_heads)
    return copy


def _gamma(layer_scale: Any) -> Tensor | None:
    gamma = getattr(layer_scale, "gamma", None)
    return None if gamma is None else gamma.detach()

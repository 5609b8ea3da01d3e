"""Packed tower: the rows of a prefix tree through all blocks of a frozen causal tower, with their gradient."""

from typing import Any

import torch
from torch import Tensor

from coop_core.backbone.packed_block import Block, Buffers, Saved, Shape, supports_block
from coop_core.backbone.prefix_tree import PrefixTree
from coop_core.backbone.step_graph import Recorder, Steps
from coop_core.backbone.towers import CausalTextTower


def supports_packing(tower: object) -> bool:
    return isinstance(tower, CausalTextTower) and all(map(supports_block, tower.module.transformer.resblocks))


class PackedTower:
    """The frozen blocks of a causal tower in the type they are computed in."""

    def __init__(self, tower: CausalTextTower, dtype: torch.dtype) -> None:
        self.blocks = [Block(block, dtype) for block in tower.module.transformer.resblocks]
        self.dtype = dtype
        self.recorder = Recorder()
        self._buffers: tuple[Any, Buffers] = (None, Buffers())

    def encode(self, rows: Tensor, shape: Shape, *, recompute: bool = False) -> Tensor:
        """Residual rows, positions added (g, r, w), float32 -> every prompt's row at EOT (g, c, w), float32.

        With `recompute`, nothing is kept for the backward pass: it runs the forward pass again.
        """
        ends = _Encode.apply(rows, self, shape, torch.is_grad_enabled() and not recompute)
        return ends.index_select(1, shape.end_of)

    def forward(self, rows: Tensor, shape: Shape, buffers: Buffers, *, keep: bool) -> tuple[Tensor, list[Saved]]:
        """Rows (g, r, w) -> the ends (g, b e, w), and what backward reads."""
        saved = []
        for block in self.blocks:
            rows, one = block.forward(rows, shape, buffers, last=block is self.blocks[-1])
            saved.append(one)
            if not keep:
                saved.pop().release(buffers)
        return rows, saved

    def backward(self, gradient: Tensor, shape: Shape, saved: list[Saved], buffers: Buffers) -> Tensor:
        """The gradient of the ends -> that of the rows; `saved` is used up.

        float16 loses small numbers: its gradients are brought near 1 by a power of two, and back at the end.
        """
        scale = torch.ones((), device=gradient.device)
        if self.dtype == torch.float16:
            scale = torch.exp2(-torch.log2(gradient.abs().max().clamp(min=1e-30)).ceil())
            gradient = gradient * scale
        for block in reversed(self.blocks):
            one = saved.pop()
            gradient = block.backward(gradient, shape, one, buffers)
            one.release(buffers)
        return gradient.div_(scale)

    def kept_bytes(self, tree: PrefixTree) -> int:
        """What one set of context vectors holds between its forward and its backward pass, at its peak."""
        (b, s), w, heads, size = tree.shape, self.blocks[0].width, self.blocks[0].heads, self.dtype.itemsize
        keys, rows = tree.trunk + s, b * s
        kept = rows * w * (2 * 4 + 5 * size) + b * keys * (2 * w + heads * s) * size
        passing = rows * w * (5 * 4 + 13 * size) + b * keys * (2 * w + 3 * heads * s) * size
        return len(self.blocks) * kept + passing

    def buffers_for(self, rows: Tensor, shape: Shape) -> Buffers:
        """The same buffers as long as the same work comes again."""
        key = (rows.shape, id(shape), rows.device)
        if self._buffers[0] != key:
            self._buffers = (key, Buffers())
        return self._buffers[1]


    def steps(self, shape: Shape, buffers: Buffers) -> Steps:
        def forward(rows: Tensor, *, keep: bool = True) -> tuple[Tensor, list[Saved]]:
            return self.forward(rows, shape, buffers, keep=keep)

        def backward(gradient: Tensor, saved: list[Saved]) -> Tensor:
            return self.backward(gradient, shape, saved, buffers)

        return forward, backward


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, tower: PackedTower, shape: Shape, keep: bool) -> Tensor:
        recorder = tower.recorder
        ctx.graph = recorder.graph_for(id(shape), rows, lambda: tower.steps(shape, Buffers())) if keep else None
        ctx.rows, ctx.steps = rows, tower.steps(shape, tower.buffers_for(rows, shape))
        if ctx.graph:
            ends, ctx.saved = ctx.graph.forward(rows)
        else:
            ends, ctx.saved = ctx.steps[0](rows, keep=keep)
        return ends

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.rows is None:
            raise RuntimeError("the buffers of this encoding have served their backward pass: encode again")
        rows, saved, (forward, backward) = ctx.rows, ctx.saved, ctx.steps
        ctx.rows = ctx.saved = None
        found = ctx.graph.backward(gradient) if ctx.graph else backward(gradient, saved or forward(rows)[1])
        return found, None, None, None

"""Packed tower: the rows of a prefix tree through all blocks of a frozen causal tower, with their gradient."""

from typing import Any

import torch
from torch import Tensor

from coop_core.backbone.towers import CausalTextTower
from coop_core.prompts.packed_block import Block, Saved, Shape, supports_block
from coop_core.prompts.prefix_tree import PrefixTree
from coop_core.prompts.step_graph import Recorder, Steps


def supports_packing(tower: object) -> bool:
    return isinstance(tower, CausalTextTower) and all(map(supports_block, tower.module.transformer.resblocks))


class PackedTower:
    """The frozen blocks of a causal tower in the type they are computed in."""

    def __init__(self, tower: CausalTextTower, dtype: torch.dtype) -> None:
        blocks = tower.module.transformer.resblocks
        self.blocks = [Block(block, dtype, last=block is blocks[-1]) for block in blocks]
        self.dtype = dtype

    def encode(self, rows: Tensor, workspace: "Workspace", *, recompute: bool = False) -> Tensor:
        """Residual rows, positions added (g, r, w), float32 -> every prompt's row at EOT (g, c, w), float32.

        With `recompute`, nothing is kept for the backward pass: it runs the forward pass again.
        """
        return _Encode.apply(rows, self, workspace, recompute, torch.is_grad_enabled() and rows.requires_grad)

    def forward(self, rows: Tensor, shape: Shape, *, keep: bool) -> tuple[Tensor, list[Saved]]:
        """Rows (g, r, w) -> the ends (g, c, w), and what backward reads."""
        saved = []
        for block in self.blocks:
            rows, one = block.forward(rows, shape)
            if keep:
                saved.append(one)
        return rows, saved

    def backward(self, gradient: Tensor, shape: Shape, saved: list[Saved]) -> Tensor:
        """The gradient of the ends -> that of the rows; `saved` is used up.

        float16 loses small numbers: each set's gradients are brought near 1 by a power of two, and back at the end.
        """
        scale = torch.ones(len(gradient), 1, 1, device=gradient.device)
        if self.dtype == torch.float16:
            largest = gradient.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)
            scale = torch.exp2(-torch.log2(largest).ceil())
            gradient = gradient * scale
        for block in reversed(self.blocks):
            gradient = block.backward(gradient, shape, saved.pop())
        return gradient.div_(scale)

    def kept_bytes(self, tree: PrefixTree) -> int:
        """What one set of context vectors holds between its forward and its backward pass, at its peak."""
        (b, s), w, heads, size = tree.shape, self.blocks[0].width, self.blocks[0].heads, self.dtype.itemsize
        keys, rows = tree.mask.shape[-1], max(b * s, len(tree.ends))              # classes may share an EOT row
        kept = rows * w * (2 * 4 + 5 * size) + b * keys * (2 * w + heads * s) * size
        passing = rows * w * (5 * 4 + 14 * size) + b * keys * (2 * w + 3 * heads * s) * size
        return len(self.blocks) * kept + passing

    def steps(self, shape: Shape) -> Steps:
        """Both passes over this tree, to be recorded."""

        def forward(rows: Tensor) -> tuple[Tensor, list[Saved]]:
            return self.forward(rows, shape, keep=True)

        def backward(gradient: Tensor, saved: list[Saved]) -> Tensor:
            return self.backward(gradient, shape, saved)

        return forward, backward


def packed_tower(tower: CausalTextTower, dtype: torch.dtype) -> PackedTower:
    """One for all who ask with the same tower and type."""
    if dtype not in tower.packed:
        tower.packed[dtype] = PackedTower(tower, dtype)
    return tower.packed[dtype]


class Workspace:
    """One tree on its device, and its recorded step where there is one."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.recorder = Recorder()


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, tower: PackedTower, workspace: Workspace, recompute: bool, with_gradient: bool
    ) -> Tensor:
        keep, shape = with_gradient and not recompute, workspace.shape
        graph = workspace.recorder.graph_for(rows, lambda: tower.steps(shape)) if keep else None
        ends, saved = graph.forward(rows) if graph else tower.forward(rows, shape, keep=keep)
        ctx.work = rows, tower, shape, graph, saved
        return ends

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.work is None:
            raise RuntimeError("what this encoding kept has served its backward pass: encode again")
        (rows, tower, shape, graph, saved), ctx.work = ctx.work, None
        if graph:
            return graph.backward(gradient), None, None, None, None
        saved = saved or tower.forward(rows, shape, keep=True)[1]
        return tower.backward(gradient, shape, saved), None, None, None, None

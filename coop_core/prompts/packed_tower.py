"""Packed tower: the rows of a prefix tree through all blocks of a frozen causal tower."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coop_core.backbone.blocks import Deep, supports_block
from coop_core.backbone.towers import CausalTextTower
from coop_core.prompts.packed_block import Block, Shape
from coop_core.prompts.prefix_tree import PrefixTree


def supports_packing(tower: object) -> bool:
    return isinstance(tower, CausalTextTower) and all(map(supports_block, tower.module.transformer.resblocks))


class PackedTower:
    """The frozen blocks of a causal tower in the type they are computed in."""

    def __init__(self, tower: CausalTextTower, dtype: torch.dtype) -> None:
        blocks = tower.module.transformer.resblocks
        self.blocks = [Block(block, dtype, last=block is blocks[-1]) for block in blocks]
        self.dtype = dtype

    def encode(
        self, rows: Tensor, shape: Shape, *, deep: Sequence[Deep | None] = (), recompute: bool = False
    ) -> Tensor:
        """Residual rows, positions added (g, r, w), float32 -> every prompt's row at EOT (g, c, w), float32.

        `deep`: what each block's queries read besides, or None; empty for none at all.
        With `recompute`, nothing is kept for the backward pass: it runs the forward pass again.
        """
        if self.dtype == torch.float16 and rows.requires_grad:
            return self._scaled(rows, shape, deep, recompute)
        return self._through(rows, shape, deep, recompute)

    def _through(self, rows: Tensor, shape: Shape, deep: Sequence[Deep | None], recompute: bool) -> Tensor:
        if recompute and torch.is_grad_enabled():
            return checkpoint(self._blocks, rows, shape, *deep, use_reentrant=False, preserve_rng_state=False)
        return self._blocks(rows, shape, *deep)

    def _blocks(self, rows: Tensor, shape: Shape, *deep: Deep | None) -> Tensor:
        for i, block in enumerate(self.blocks):
            rows = block(rows, shape, deep[i] if deep else None)
        return rows

    def _scaled(self, rows: Tensor, shape: Shape, deep: Sequence[Deep | None], recompute: bool) -> Tensor:
        """float16 loses small numbers: each set's gradients are brought near 1 by a power of two, and back again."""
        if any(one is not None for one in deep):
            raise NotImplementedError("deep prompts in float16")
        scale = torch.ones(len(rows), 1, 1, device=rows.device)

        def enlarge(gradient: Tensor) -> Tensor:
            largest = gradient.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)
            scale.copy_(torch.exp2(-torch.log2(largest).ceil()))
            return gradient * scale

        entering = rows.view_as(rows)
        entering.register_hook(lambda gradient: gradient / scale)
        ends = self._through(entering, shape, deep, recompute)
        leaving = ends.view_as(ends)
        ends.register_hook(enlarge)
        return leaving

    def kept_bytes(self, tree: PrefixTree) -> int:
        """What one set of context vectors holds between its forward and its backward pass, at its peak."""
        (b, s), keys = tree.mask.shape[:2], tree.mask.shape[-1]
        return kept_bytes(self.blocks, rows=max(b * s, len(tree.ends)), asking=s, keys=b * keys)  # ends may be shared


def kept_bytes(blocks: Sequence[Block], *, rows: int, asking: int, keys: int) -> int:
    """What rows hold between their forward and backward pass, at its peak, where `asking` rows each read `keys`."""
    w, heads, size = blocks[0].width, blocks[0].heads, blocks[0].dtype.itemsize
    kept = rows * w * (2 * 4 + 5 * size) + keys * (2 * w + heads * asking) * size
    passing = rows * w * (5 * 4 + 14 * size) + keys * (2 * w + 3 * heads * asking) * size
    return len(blocks) * kept + passing


def packed_tower(tower: CausalTextTower, dtype: torch.dtype) -> PackedTower:
    """One for all who ask with the same tower and type."""
    if dtype not in tower.packed:
        tower.packed[dtype] = PackedTower(tower, dtype)
    return tower.packed[dtype]

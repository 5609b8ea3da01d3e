"""Prompted images: pixels and deep prompts -> image features, through the frozen blocks of a native vision transformer.

The same engine as for text (`packed_block`): an image is a stripe in which every row sees every other, and the last
block computes the class token's row alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coop_core.backbone.base import full_float32
from coop_core.backbone.blocks import Deep, supports_block, through_block
from coop_core.prompts.engine import Engine
from coop_core.prompts.packed_block import Block, Shape
from coop_core.prompts.packed_tower import kept_bytes


def supports_image_prompts(tower: nn.Module) -> bool:
    """Whether this is open_clip's own vision transformer of plain blocks, pooled at the class token."""
    return (
        type(tower).__name__ == "VisionTransformer"
        and getattr(tower, "attn_pool", None) is None
        and getattr(tower, "pool_type", None) == "tok"
        and all(map(supports_block, _blocks(tower)))
    )


def _blocks(tower: Any) -> Sequence[Any]:
    return tower.transformer.resblocks


class PromptedImages:
    """The blocks of an image tower, ready to be prompted again and again.

    A plain object, not a module: the frozen tower is neither trained nor saved with a method that holds it.
    """

    def __init__(self, tower: Any, engine: Engine) -> None:
        """`tower` is one that `supports_image_prompts`; engine.path full and cut compute by open_clip's own parts."""
        self.tower, self.straightforward = tower, engine.path in ("full", "cut")
        self.layers, self.width = len(_blocks(tower)), tower.positional_embedding.shape[1]
        self.device, self.dtype = tower.positional_embedding.device, tower.positional_embedding.dtype
        rows = len(tower.positional_embedding)
        self.blocks = [Block(block, self.dtype, last=block is _blocks(tower)[-1]) for block in _blocks(tower)]
        self.kept = kept_bytes(self.blocks, rows=rows, asking=rows, keys=rows)
        """Bytes of one image between its forward and its backward pass."""
        self.together = max(1, engine.memory_on(self.device) // self.kept)
        first = torch.zeros(1, dtype=torch.long, device=self.device)
        mask = torch.zeros(1, 1, rows, rows, dtype=self.dtype, device=self.device)
        self.shape = Shape(0, 0, mask, mask[:, :, :1], first, first, first)

    def __call__(self, pixels: Tensor, deep: Sequence[Deep | None]) -> Tensor:
        """Normalised pixels (n, 3, size, size) and what each block's queries read besides -> features (n, d), float32,
        not normalised."""
        if torch.compiler.is_exporting():                                         # for any number of images
            return self._encode(pixels, deep)
        pieces = pixels.to(self.device, self.dtype).split(self.together)
        recompute = len(pieces) > 1 and torch.is_grad_enabled()
        with full_float32(self.device):
            return torch.cat([
                checkpoint(self._encode, piece, deep, use_reentrant=False, preserve_rng_state=False) if recompute
                else self._encode(piece, deep) for piece in pieces
            ])  # fmt: skip

    def _encode(self, pixels: Tensor, deep: Sequence[Deep | None]) -> Tensor:
        with torch.no_grad():
            x = self.tower._embeds(pixels)                                        # (n, rows, w)
        if self.straightforward:
            for block, its in zip(_blocks(self.tower), deep, strict=True):
                x = through_block(block, x, deep=its)
        else:
            x = x.float()
            for block, its in zip(self.blocks, deep, strict=True):
                x = block(x, self.shape, its)
        pooled = self.tower.ln_post(x[:, 0].to(self.dtype))
        return (pooled if self.tower.proj is None else pooled @ self.tower.proj).float()

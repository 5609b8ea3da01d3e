"""Padded prompts: context vectors -> features, by whole prompts through the tower's own encode."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coop_core.backbone import TextTower
from coop_core.backbone.blocks import Deep
from coop_core.backbone.towers import CausalTextTower, PaddedTextTower
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import PromptLayout, slices

ROWS_WORTH_A_PASS = 256
"""Padded rows that cost about as much as starting one more pass through the tower."""


class PaddedPrompts:
    """Prompts in groups of similar length, or all at the tower's full length."""

    def __init__(self, tower: TextTower, layout: PromptLayout, engine: Engine, *, full: bool) -> None:
        if isinstance(tower, PaddedTextTower):
            tower = tower.ready_for(engine.dtype)
        self.tower, self.layout, self.dtype = tower, layout, engine.dtype
        self.limit = engine.memory_on(tower.device)
        lengths = layout.lengths.tolist()
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        groups = [order] if full else list(_by_length(order, lengths))
        self.groups = [
            (torch.tensor(group, device=tower.device), tower.context_length if full else lengths[group[-1]])
            for group in groups
        ]
        kept = [len(members) * tower.kept_bytes(length) for members, length in self.groups]
        self.together = max(1, self.limit // max(kept))
        self.chunks = sum(len(self._pieces(len(members), length)) for members, length in self.groups)
        self.recompute = self.chunks > len(groups)
        self.rows = sum(len(members) * length for members, length in self.groups)
        self.back = torch.cat([members for members, _ in self.groups]).argsort()
        with torch.no_grad():
            self.embeddings = layout.embed(tower, max(length for _, length in self.groups))

    def __call__(self, context_vectors: Tensor, deep: Sequence[Deep | None] = ()) -> Tensor:
        """(g, m, w) or (g, c, m, w) -> features (g, c, d), not normalised; `deep` is read in its block by all."""
        with torch.autocast(context_vectors.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            prompts = torch.stack([self.layout.fill(self.embeddings, one) for one in context_vectors])  # (g, c, l, w)
            found = [self._encode(prompts, *group, deep) for group in self.groups]
        return torch.cat(found, dim=1).index_select(1, self.back)

    def _encode(self, prompts: Tensor, members: Tensor, length: int, deep: Sequence[Deep | None]) -> Tensor:
        """The features (g, k, d) of one group's prompts, in pieces that fit into memory."""
        some = prompts.index_select(1, members)[:, :, :length].flatten(0, 1)      # (g k, l, w)
        lengths = self.layout.lengths.index_select(0, members).repeat(len(prompts))
        pieces = self._pieces(len(some), length)
        recompute = self.recompute or len(pieces) > 1
        encode: Callable[..., Tensor] = self.tower.encode
        if isinstance(self.tower, CausalTextTower):
            encode = functools.partial(self.tower.encode, deep=deep)
        found = []
        for piece in pieces:
            inputs = some[piece[0] : piece[-1] + 1], lengths[piece[0] : piece[-1] + 1]
            found.append(checkpoint(encode, *inputs, use_reentrant=False) if recompute else encode(*inputs))
        return torch.cat(found).unflatten(0, (len(prompts), len(members)))

    def _pieces(self, count: int, length: int) -> list[Sequence[int]]:
        return slices(range(count), max(1, self.limit // self.tower.kept_bytes(length)))


def _by_length(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut prompts, sorted by length, wherever the padding saved is worth another pass."""
    group: list[int] = []
    for i in order:
        padding = sum(lengths[i] - lengths[j] for j in group)
        if padding > ROWS_WORTH_A_PASS:
            yield group
            group = []
        group.append(i)
    yield group

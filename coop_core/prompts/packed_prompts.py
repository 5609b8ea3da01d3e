"""Packed prompts: context vectors -> features, by prefix trees through the packed tower."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from coop_core.backbone.blocks import Deep
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import PromptLayout, slices
from coop_core.prompts.packed_block import Shape
from coop_core.prompts.packed_tower import packed_tower
from coop_core.prompts.prefix_tree import PrefixTree, build_tree
from coop_core.prompts.step_graph import graphed


class PackedPrompts:
    """One tree, or several in turn where one would not fit in memory."""

    def __init__(self, tower: Any, layout: PromptLayout, class_specific: bool, engine: Engine) -> None:
        self.tower = tower
        self.packed, self.cuda_graphs = packed_tower(tower, engine.dtype), engine.cuda_graphs
        prompts = layout.prompts(class_specific=class_specific)
        order = sorted(range(len(prompts)), key=lambda i: list(map(str, prompts[i])))
        limit = engine.memory_on(tower.device)
        for size in _sizes(len(prompts)):
            trees = [(part, build_tree([prompts[i] for i in part])) for part in slices(order, size)]
            fullest = max(self.packed.kept_bytes(tree) for _, tree in trees)
            if fullest <= limit:
                break
        self.together = max(1, limit // fullest)
        """Sets of context vectors that fit in memory at once."""
        self.parts = [_Rows(tower, tree, engine.dtype) for _, tree in trees]
        self.chunks = len(self.parts)
        self.rows = sum(len(part.frozen) for part in self.parts)
        self.back = torch.tensor(order, device=tower.device).argsort()

    def __call__(self, context_vectors: Tensor, deep: Sequence[Deep | None] = ()) -> Tensor:
        """(g, m, w) or (g, c, m, w) -> features (g, c, d), not normalised; `deep` is read in its block by all."""
        sets = context_vectors.flatten(1, -2)                                     # (g, m, w) or (g, c m, w)
        passes = sets.split(self.together)
        recompute = len(passes) * len(self.parts) > 1

        def encode(some: Tensor, part: _Rows) -> Tensor:
            rows = part.fill(some)
            if self.cuda_graphs and rows.is_cuda and rows.requires_grad and not (recompute or deep):
                return self._graphed(rows, part)(rows)
            return self.packed.encode(rows, part.shape, deep=deep, recompute=recompute)

        ends = torch.cat([torch.cat([encode(some, part) for part in self.parts], dim=1) for some in passes])
        return self.tower.project(ends.index_select(1, self.back))                # (g, c, d)

    def _graphed(self, rows: Tensor, part: "_Rows") -> Callable[[Tensor], Tensor]:
        if rows.shape not in part.graphs:
            part.graphs[rows.shape] = graphed(lambda rows: self.packed.encode(rows, part.shape), rows)
        return part.graphs[rows.shape]


class _Rows:
    """A tree's frozen rows, and where context vectors go among them."""

    def __init__(self, tower: Any, tree: PrefixTree, dtype: torch.dtype) -> None:
        device = tower.device
        token_ids = [element if isinstance(element, int) else tower.pad_id for element in tree.elements]
        slots = [(row, element[1]) for row, element in enumerate(tree.elements) if isinstance(element, tuple)]
        self.shape = Shape.of(tree, device, dtype)
        self.graphs: dict[torch.Size, Callable[[Tensor], Tensor]] = {}
        with torch.no_grad():
            positions = tower.module.positional_embedding[tree.positions.to(device)].float()
            self.frozen = tower.embed(torch.tensor(token_ids, device=device)) + positions        # (r, w)
            self.slots, self.sources = torch.tensor(slots, dtype=torch.long, device=device).view(-1, 2).T.contiguous()
            self.positions_of_slots = positions[self.slots]

    def fill(self, sets: Tensor) -> Tensor:
        """Sets of context vectors (g, k, w) -> residual rows (g, r, w)."""
        rows = self.frozen.expand(len(sets), -1, -1)
        return rows.index_copy(1, self.slots, sets.index_select(1, self.sources) + self.positions_of_slots)


def _sizes(count: int) -> Iterator[int]:
    """All at once, then halves, down to one."""
    while count > 1:
        yield count
        count = -(-count // 2)
    yield 1

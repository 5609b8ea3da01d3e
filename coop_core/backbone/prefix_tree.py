"""Prefix tree: many prompts -> the rows a causal tower must compute, each distinct beginning once.

In a causal tower a row depends on what stands before it and on nothing else, so prompts that begin alike share
what is computed for their common rows, at every layer, and rows after EOT are never read. What all prompts share
is the trunk. The branches that leave it are sorted and cut into blocks, inside which attention is dense; branches
of one block share their common beginnings again. A row sees the trunk and its own ancestors in its block.

    SOS ctx ctx ctx ctx cat . EOT          block 0: the trunk and the first branches
                        sea lion . EOT
                            snake . EOT
                        tree . EOT         block 1 reads block 0's trunk
                        wolf . EOT

Dimensions besides the project's: b blocks of s slots (the shorter ones padded), p trunk rows that the blocks share
(0 when one block holds everything), e ends in the fullest block.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Path = tuple[Hashable, ...]
BLOCK_ROWS = range(48, 168, 8)
"""Sizes of blocks that are tried."""
ATTENTION_COST = 1000
"""Keys that cost a row as much as its matrix products (measured on a CPU at width 512)."""


@dataclass(frozen=True)
class PrefixTree:
    elements: list[Hashable]
    """(b s) what stands in each row; None in padding."""
    positions: Tensor
    """(b s) where in its prompt each row stands."""
    trunk: int
    """p: the first rows of block 0, which every block reads; 0 when there is only one block."""
    mask: Tensor
    """(b, s, p + s) additive, 0 or -inf: what a slot sees of the shared trunk and of its own block."""
    ends: Tensor
    """(b, e) the slots of EOT rows, padded with slot 0."""
    end_of: Tensor
    """(c,) where each prompt's EOT is found in `ends`, flattened."""

    @property
    def shape(self) -> tuple[int, int]:
        """(b, s)"""
        return self.mask.shape[0], self.mask.shape[1]

    def to(self, device: torch.device) -> "PrefixTree":
        tensors = {name: getattr(self, name).to(device) for name in ("positions", "mask", "ends", "end_of")}
        return PrefixTree(elements=self.elements, trunk=self.trunk, **tensors)


def build_tree(prompts: Sequence[Path]) -> PrefixTree:
    """Arrange prompts, each its elements up to and with EOT; equal elements stand for equal embeddings."""
    order = sorted(range(len(prompts)), key=lambda i: [str(element) for element in prompts[i]])
    members = _partition([prompts[i] for i in order])
    trunk = _common(prompts) if len(members) > 1 else 0
    blocks = [_Block([(order[i], prompts[order[i]]) for i in block], 0 if n == 0 else trunk)
              for n, block in enumerate(members)]  # fmt: skip
    s, e = max(len(block.paths) for block in blocks), max(len(block.ends) for block in blocks)
    elements: list[Hashable] = []
    positions: list[int] = []
    mask = torch.full((len(blocks), s, trunk + s), float("-inf"))
    ends = torch.zeros(len(blocks), e, dtype=torch.long)
    end_of = torch.zeros(len(prompts), dtype=torch.long)
    for number, block in enumerate(blocks):
        padding = s - len(block.paths)
        elements += [path[-1] for path in block.paths] + [None] * padding
        positions += [len(path) - 1 for path in block.paths] + [0] * padding
        seen = [(slot, trunk + ancestor) for slot, line in enumerate(block.ancestors) for ancestor in line]
        mask[number][tuple(torch.tensor(seen).T)] = 0
        if number:
            mask[number, :, :trunk] = 0
        mask[number, range(len(block.paths), s), range(trunk + len(block.paths), trunk + s)] = 0   # no empty softmax
        for place, (prompt, slot) in enumerate(block.ends):
            ends[number, place] = slot
            end_of[prompt] = number * e + place
    return PrefixTree(elements, torch.tensor(positions), trunk, mask, ends, end_of)


class _Block:
    """Prompts with common beginnings merged; a row is named by its path from SOS."""

    def __init__(self, prompts: Iterable[tuple[int, Path]], skip: int) -> None:
        """The first `skip` rows of every prompt are in another block."""
        self.paths: list[Path] = []
        self.ancestors: list[list[int]] = []
        """Of each row, those in this block, itself included."""
        self.ends: list[tuple[int, int]] = []
        """(prompt, slot)"""
        slot_of: dict[Path, int] = {}
        for number, prompt in prompts:
            line: list[int] = []
            for length in range(skip + 1, len(prompt) + 1):
                path = prompt[:length]
                slot = slot_of.setdefault(path, len(self.paths))
                line = [*line, slot]
                if slot == len(self.paths):
                    self.paths.append(path)
                    self.ancestors.append(line)
            self.ends.append((number, line[-1]))


def _partition(prompts: Sequence[Path]) -> list[range]:
    """Cut sorted prompts into blocks: of all sizes worth trying, the one that costs least."""
    trunk = _common(prompts)
    shared = [0, *(_common(pair) for pair in pairwise(prompts))]

    def cut(capacity: int) -> list[tuple[range, int]]:
        blocks, start, rows = [], 0, 0
        for i, prompt in enumerate(prompts):
            new = len(prompt) - shared[i]
            if rows and rows + new > capacity:
                blocks.append((range(start, i), rows))
                start, rows, new = i, 0, len(prompt) - trunk
            rows += new
        return [*blocks, (range(start, len(prompts)), rows)]

    def cost(blocks: list[tuple[range, int]]) -> float:
        slots = max(rows for _, rows in blocks)
        keys = slots + (trunk if len(blocks) > 1 else 0)
        return len(blocks) * slots * (1 + keys / ATTENTION_COST)

    longest = max(map(len, prompts))
    cuts = [cut(capacity) for capacity in sorted({max(longest, rows) for rows in BLOCK_ROWS})]
    return [block for block, _ in min(cuts, key=cost)]


def _common(prompts: Sequence[Path]) -> int:
    """How many first elements all prompts share, never a whole prompt: every EOT keeps a row of its own."""
    first, *others = prompts
    shortest = min(map(len, prompts)) - 1
    return next((i for i in range(shortest) if any(other[i] != first[i] for other in others)), shortest)

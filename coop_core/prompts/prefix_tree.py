"""Prefix tree: many prompts -> the rows a causal tower must compute, each distinct beginning once.

In a causal tower a row depends on what stands before it and on nothing else, so prompts that begin alike share
what is computed for their common rows, at every layer, and rows after EOT are never read. What all prompts share
is the trunk; the branches that leave it follow in sorted order, each after the one it shares most with.

    SOS ctx ctx ctx ctx cat . EOT          one prompt a line; what stands to the left is seen, not computed again
                        sea lion . EOT
                            snake . EOT
                        tree . EOT
                        wolf . EOT

Attention is dense inside stripes: rows are cut evenly, wherever that falls, and the rows of a stripe see the trunk,
the end of the stripe before and their own stripe, each its ancestors there. A beginning that was computed too long
ago to be seen is computed again.

Dimensions besides the project's: r rows, cut into b stripes of s slots; p rows of trunk and u rows before the stripe
that each stripe reads besides its own (both 0 when one stripe holds everything).
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Path = tuple[Hashable, ...]
STRIPES = range(32, 128)
"""Sizes of stripes that are tried, besides one that holds everything."""
ATTENTION_COST = 1000
"""Keys that cost a row as much as its matrix products (measured on a CPU at width 512)."""


@dataclass(frozen=True)
class PrefixTree:
    elements: list[Hashable]
    """(r,) what stands in each row; None in padding, which comes last."""
    positions: Tensor
    """(r,) where in its prompt each row stands."""
    ends: Tensor
    """(c,) the row of each prompt's EOT."""
    mask: Tensor
    """(b, s, p + u + s) additive, 0 or -inf: what a row sees of the trunk, of the u rows before its stripe, and of
    its stripe."""
    trunk: int
    """p: the first rows, which every stripe reads; at most s."""
    reach: int
    """u: at most s."""


def build_tree(prompts: Sequence[Path]) -> PrefixTree:
    """Arrange prompts, each its elements up to and with EOT; equal elements stand for equal embeddings.

    >>> tree = build_tree([("SOS", "ctx", "sea", "lion", "EOT"), ("SOS", "ctx", "sea", "snake", "EOT")])
    >>> tree.elements
    ['SOS', 'ctx', 'sea', 'lion', 'EOT', 'snake', 'EOT']
    >>> tree.positions.tolist(), tree.ends.tolist()
    ([0, 1, 2, 3, 4, 3, 4], [4, 6])
    """
    order = sorted(range(len(prompts)), key=lambda i: [str(element) for element in prompts[i]])
    ordered = [prompts[i] for i in order]
    _, lines, b, s, p, u = min(_cuts(ordered), key=lambda cut: cut.cost)
    elements: list[Hashable] = [None] * (b * s)
    positions = torch.zeros(b * s, dtype=torch.long)
    ends = torch.zeros(len(prompts), dtype=torch.long)
    seen = {(row, row) for row in range(b * s)}                                   # padding, too: no empty softmax
    for number, prompt, line in zip(order, ordered, lines, strict=True):
        for position, row in enumerate(line):
            if elements[row] is None:
                elements[row], positions[row] = prompt[position], position
                seen.update((row, ancestor) for ancestor in line[:position])
        ends[number] = line[-1]
    rows, ancestors = torch.tensor(sorted(seen)).T
    keys = torch.where(ancestors < p, ancestors, p + u + ancestors - rows // s * s)
    mask = torch.full((b * s, p + u + s), float("-inf"))
    mask[rows, keys] = 0
    return PrefixTree(elements, positions, ends, mask.view(b, s, -1), p, u)


class _Cut(NamedTuple):
    """Sorted prompts in stripes of one size."""

    cost: float
    lines: list[list[int]]
    """The rows of each prompt's elements."""
    stripes: int
    slots: int
    trunk: int
    reach: int


def _cuts(prompts: Sequence[Path]) -> Iterator[_Cut]:
    """Everything in one stripe, and stripes of every size worth trying."""
    shared = [0, *map(_common, prompts, prompts[1:])]
    trunk = min([len(path) - 1 for path in prompts] + shared[1:])
    reach = max(map(len, prompts)) - trunk - 1
    rows = sum(map(len, prompts)) - sum(shared)
    sizes = sorted({max(trunk, reach, size) for size in STRIPES})
    for slots, p, u in [(rows, 0, 0), *((size, trunk, reach) for size in sizes if size < rows)]:
        lines = _lines(prompts, shared, slots=slots, trunk=p, reach=u)
        stripes = -(-(1 + max(line[-1] for line in lines)) // slots)
        yield _Cut(stripes * slots * (1 + (p + u + slots) / ATTENTION_COST), lines, stripes, slots, p, u)


def _lines(
    prompts: Sequence[Path], shared: Sequence[int], *, slots: int, trunk: int, reach: int
) -> list[list[int]]:
    """The rows of each prompt's elements; `shared` says how many first ones each has in common with the one before."""
    lines: list[list[int]] = []
    line: list[int] = []
    count = 0
    for prompt, kept in zip(prompts, shared, strict=True):
        last = count + len(prompt) - kept - 1
        if kept > trunk and line[trunk] < last // slots * slots - reach:          # its stripe would not see it
            kept = trunk
        new = range(count, count + len(prompt) - kept)
        line = [*line[:kept], *new]
        lines.append(line)
        count += len(new)
    return lines


def _common(a: Path, b: Path) -> int:
    """How many first elements two prompts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

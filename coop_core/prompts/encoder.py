"""Text encoding: context vectors -> text features, computing only the tokens that matter.

Three ways, equal to rounding; `auto` takes the first that is exact for the text tower:

    packed    plain causal towers: each distinct beginning of a prompt once (backbone.prefix_tree), no padding
    cut       other towers: prompts of similar length together, cut after the longest of them
    full      every prompt at the text tower's full length, as the CoOp code does; for comparison
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from coop_core.backbone import Precision, TextTower, pad
from coop_core.errors import PromptError
from coop_core.files import digest_json
from coop_core.memory import device_memory
from coop_core.prompts.layout import PromptLayout
from coop_core.prompts.packed_block import Shape
from coop_core.prompts.packed_tower import Workspace, packed_tower, supports_packing
from coop_core.prompts.prefix_tree import PrefixTree, build_tree

log = logging.getLogger(__name__)

Path = Literal["packed", "cut", "full"]
ROWS_WORTH_A_PASS = 256
"""Padded rows that cost about as much as starting one more pass through the tower."""


@dataclass(frozen=True)
class Engine:
    """How prompts are encoded; changes speed, memory and rounding, never what is computed."""

    path: Path | Literal["auto"] = "auto"
    precision: Precision = "float32"
    """What the frozen text tower computes in; context vectors, features and logits are float32."""
    max_memory: int | None = None
    """Bytes that one step may hold besides the weights, as far as a single class allows; None takes a quarter of the
    device's memory, divided by `sharing`."""
    sharing: int = 1
    """Processes that train on the device at the same time."""

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)

    def memory_on(self, device: torch.device) -> int:
        return device_memory(device) // (4 * self.sharing) if self.max_memory is None else self.max_memory


class PromptEncoder:
    """One text tower with one layout, ready to encode context vectors again and again.

    A plain object, not a module: the frozen tower is neither trained nor saved with a method that holds it.
    """

    def __init__(
        self, tower: TextTower, layout: PromptLayout, *, class_specific: bool = False, engine: Engine | None = None
    ) -> None:
        """Raises PromptError when engine.path asks for packing and the tower is not a plain causal one."""
        self.tower = tower
        self.layout = layout
        self.class_specific = class_specific
        self.engine = engine or Engine()
        self.path: Path = best_path(tower) if self.engine.path == "auto" else self.engine.path
        if self.path == "packed" and not supports_packing(tower):
            raise PromptError("engine.path is packed, but this text tower is not a plain causal one: set auto")
        if self.path != "packed" and self.engine.precision != "float32":
            _warn_of_half_precision(tower, self.engine)
        self._encoding = (
            _Packed(tower, layout, class_specific, self.engine)
            if self.path == "packed"
            else _Padded(tower, layout, self.engine, full=self.path == "full")
        )
        self.identity = (id(tower), self.engine, digest_json(layout.prompts(class_specific=class_specific)))
        """Equal for encoders that do the same."""

    def __call__(self, context_vectors: Tensor) -> Tensor:
        """Context vectors -> L2-normalised text features (..., c, d), float32.

        (..., m, w) where classes share them, (..., c, m, w) where they are class-specific; leading dimensions
        are independent sets, such as one for each image.
        """
        *lead, _, _ = context_vectors.shape
        sets = context_vectors.reshape(-1, *context_vectors.shape[len(lead) - self.class_specific :])
        features = F.normalize(self._encoding(sets).float(), dim=-1)              # (g, c, d)
        return features.view(*(lead[:-1] if self.class_specific else lead), *features.shape[1:])

    @property
    def rows(self) -> int:
        """Token rows that go through the tower in one pass over all classes."""
        return self._encoding.rows

    @property
    def full_rows(self) -> int:
        """What they would be at the tower's full length."""
        return len(self.layout.lengths) * self.tower.context_length

    def __str__(self) -> str:
        chunks = f", in {self._encoding.chunks} chunks" if self._encoding.chunks > 1 else ""
        rows = f"{self.rows} token rows a step instead of {self.full_rows}"
        return f"{self.path}, {rows}, {self.engine.precision}{chunks}"

    def summary(self) -> dict[str, Any]:
        """For a card: the way that was taken."""
        return {
            "path": self.path,
            "precision": self.engine.precision,
            "rows": self.rows,
            "full_rows": self.full_rows,
            "chunks": self._encoding.chunks,
        }


def encode_together(encoders: Sequence[PromptEncoder], context_vectors: Sequence[Tensor]) -> list[Tensor]:
    """Each encoder's context vectors -> its features (c, d); encoders that do the same share one pass."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, encoder in enumerate(encoders):
        alike[encoder.identity, context_vectors[i].shape].append(i)
    found: dict[int, Tensor] = {}
    for members in alike.values():
        features = encoders[members[0]](torch.stack([context_vectors[i] for i in members]))
        found |= dict(zip(members, features, strict=True))
    return [found[i] for i in range(len(encoders))]


class _Packed:
    """Prefix trees through the packed tower: one tree, or several in turn where one would not fit in memory."""

    def __init__(self, tower: Any, layout: PromptLayout, class_specific: bool, engine: Engine) -> None:
        self.tower = tower
        self.packed = packed_tower(tower, engine.dtype)
        prompts = layout.prompts(class_specific=class_specific)
        order = sorted(range(len(prompts)), key=lambda i: list(map(str, prompts[i])))
        limit = engine.memory_on(tower.device)
        for size in _sizes(len(prompts)):
            trees = [(part, build_tree([prompts[i] for i in part])) for part in _slices(order, size)]
            fullest = max(self.packed.kept_bytes(tree) for _, tree in trees)
            if fullest <= limit:
                break
        self.together = max(1, limit // fullest)
        """Sets of context vectors that fit in memory at once."""
        self.parts = [_Rows(tower, tree, engine.dtype) for _, tree in trees]
        self.chunks = len(self.parts)
        self.rows = sum(len(part.frozen) for part in self.parts)
        self.back = torch.tensor(order, device=tower.device).argsort()

    def __call__(self, context_vectors: Tensor) -> Tensor:
        """(g, m, w) or (g, c, m, w) -> features (g, c, d), not normalised."""
        sets = context_vectors.flatten(1, -2)                                     # (g, m, w) or (g, c m, w)
        passes = sets.split(self.together)
        recompute = len(passes) * len(self.parts) > 1

        def encode(some: Tensor, part: _Rows) -> Tensor:
            return self.packed.encode(part.fill(some), part.workspace, recompute=recompute)

        ends = torch.cat([torch.cat([encode(some, part) for part in self.parts], dim=1) for some in passes])
        return self.tower.project(ends.index_select(1, self.back))                # (g, c, d)


class _Rows:
    """A tree's frozen rows, and where context vectors go among them."""

    def __init__(self, tower: Any, tree: PrefixTree, dtype: torch.dtype) -> None:
        device = tower.device
        token_ids = [element if isinstance(element, int) else tower.pad_id for element in tree.elements]
        slots = [(row, element[1]) for row, element in enumerate(tree.elements) if isinstance(element, tuple)]
        self.workspace = Workspace(Shape.of(tree, device, dtype))
        with torch.no_grad():
            positions = tower.module.positional_embedding[tree.positions.to(device)].float()
            self.frozen = tower.embed(torch.tensor(token_ids, device=device)) + positions        # (r, w)
            self.slots, self.sources = torch.tensor(slots, device=device).T.contiguous()
            self.positions_of_slots = positions[self.slots]

    def fill(self, sets: Tensor) -> Tensor:
        """Sets of context vectors (g, k, w) -> residual rows (g, r, w)."""
        rows = self.frozen.expand(len(sets), -1, -1)
        return rows.index_copy(1, self.slots, sets.index_select(1, self.sources) + self.positions_of_slots)


class _Padded:
    """Whole prompts through the tower's own encode, in groups of similar length."""

    def __init__(self, tower: TextTower, layout: PromptLayout, engine: Engine, *, full: bool) -> None:
        self.tower, self.layout, self.dtype = tower, layout, engine.dtype
        lengths = layout.lengths.tolist()
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        limit = engine.memory_on(tower.device)
        groups = [order] if full else list(_by_length(order, lengths))

        def longest(group: Sequence[int]) -> int:
            return tower.context_length if full else lengths[group[-1]]

        self.groups = [
            (torch.tensor(part, device=tower.device), longest(part))
            for group in groups
            for part in _slices(group, max(1, limit // tower.kept_bytes(longest(group))))
        ]
        self.chunks = len(self.groups)
        self.recompute = len(self.groups) > len(groups)
        self.rows = sum(len(members) * length for members, length in self.groups)
        self.back = torch.cat([members for members, _ in self.groups]).argsort()
        missing = max(length for _, length in self.groups) - layout.token_ids.shape[1]
        with torch.no_grad():
            self.embeddings = tower.embed(F.pad(layout.token_ids, (0, max(0, missing)), value=tower.pad_id))

    def __call__(self, context_vectors: Tensor) -> Tensor:
        """(g, m, w) or (g, c, m, w) -> features (g, c, d), not normalised."""
        with torch.autocast(context_vectors.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return torch.stack([self._encode(one) for one in context_vectors])

    def _encode(self, context_vectors: Tensor) -> Tensor:
        prompts = self.layout.fill(self.embeddings, context_vectors)              # (c, l, w)
        found = []
        for members, length in self.groups:
            inputs = prompts.index_select(0, members)[:, :length], self.layout.lengths.index_select(0, members)
            encode: Callable[..., Tensor] = self.tower.encode
            found.append(checkpoint(encode, *inputs, use_reentrant=False) if self.recompute else encode(*inputs))
        return torch.cat(found).index_select(0, self.back)


def _warn_of_half_precision(tower: TextTower, engine: Engine) -> None:
    """On towers whose padded batches go through their own module, autocast converts frozen weights in every pass.

    Raises
    ------
    PromptError
        For float16 on the CPU, where unscaled gradients vanish.
    """
    if engine.precision == "float16":
        raise PromptError("engine.precision float16 is not for this text tower: its gradients are not scaled and "
                          "vanish; set float32 or bfloat16")  # fmt: skip
    if tower.device.type == "cpu":
        log.warning("engine.precision %s gains little on this text tower and loses on some processors (mini: 0.8 to "
                    "1.4 times its speed): benchmarks/half_precision.py measures it", engine.precision)  # fmt: skip


def best_path(tower: TextTower) -> Path:
    """The fastest way that is exact for this tower."""
    return "packed" if supports_packing(tower) else "cut"


def encode_texts(tower: TextTower, texts: list[str], *, batch_size: int = 256) -> Tensor:
    """Plain sentences -> L2-normalised features (n, d), float32, without gradient.

    Raises
    ------
    PromptError
        When a sentence is longer than the text tower's context; nothing is truncated.
    """
    sequences = [tower.tokenizer.tokenize(text) for text in texts]
    for text, sequence in zip(texts, sequences, strict=True):
        if len(sequence) > tower.context_length:
            raise PromptError(
                f"{text!r} has {len(sequence)} tokens, but the text tower takes {tower.context_length}: shorten it"
            )
    parts = []
    with torch.no_grad():
        for start in range(0, len(sequences), batch_size):
            token_ids, lengths = pad(sequences[start : start + batch_size], tower)
            parts.append(tower.encode(tower.embed(token_ids), lengths).float())
    return F.normalize(torch.cat(parts), dim=-1)


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


def _sizes(count: int) -> Iterator[int]:
    """All at once, then halves, down to one."""
    while count > 1:
        yield count
        count = -(-count // 2)
    yield 1


def _slices(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]

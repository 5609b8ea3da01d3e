"""Text encoding: context vectors -> text features, computing only the tokens that matter.

Three ways, equal to rounding; `auto` takes the first that is exact for the text tower:

    packed    plain causal towers: each distinct beginning of a prompt once (prompts.prefix_tree), no padding
    cut       other towers: prompts of similar length together, cut after the longest of them
    full      every prompt at the text tower's full length, as the CoOp code does; for comparison
"""

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coop_core.backbone import Backbone, SentenceTower, TextTower, pad
from coop_core.backbone.blocks import Deep
from coop_core.errors import PromptError
from coop_core.files import digest_json
from coop_core.prompts.engine import Engine, Path
from coop_core.prompts.layout import PromptLayout
from coop_core.prompts.packed_prompts import PackedPrompts
from coop_core.prompts.packed_tower import supports_packing
from coop_core.prompts.padded_prompts import PaddedPrompts

log = logging.getLogger(__name__)

_TOGETHER = 256
"""Sentences that are encoded in one pass."""


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
        if layout.blended is not None and self.path == "packed":
            self.path = "cut"                                                     # a row of it is no token
        if self.path == "packed" and not supports_packing(tower):
            raise PromptError("engine.path is packed, but this text tower is not a plain causal one: set auto")
        if self.path != "packed" and self.engine.precision != "float32":
            _warn_of_half_precision(tower, self.engine)
        self._encoding = (
            PackedPrompts(tower, layout, class_specific, self.engine)
            if self.path == "packed"
            else PaddedPrompts(tower, layout, self.engine, full=self.path == "full")
        )
        self.identity = (id(tower), self.engine, digest_json(layout.prompts(class_specific=class_specific)))
        """Equal for encoders that do the same."""

    def __call__(self, context_vectors: Tensor, *, deep: Sequence[Deep | None] = ()) -> Tensor:
        """Context vectors -> L2-normalised text features (..., c, d), float32.

        (..., m, w) where classes share them, (..., c, m, w) where they are class-specific; leading dimensions
        are independent sets, such as one for each image. `deep`: what each block's queries read besides, the same for
        all prompts, on plain causal towers.
        """
        *lead, _, _ = context_vectors.shape
        count = math.prod(lead[:-1] if self.class_specific else lead)
        sets = context_vectors.reshape(count, *context_vectors.shape[len(lead) - self.class_specific :])
        features = F.normalize(self._encoding(sets, deep).float(), dim=-1)              # (g, c, d)
        return features.view(*(lead[:-1] if self.class_specific else lead), *features.shape[1:])

    @property
    def rows(self) -> int:
        """Token rows that go through the tower in one pass over all classes."""
        return self._encoding.rows

    @property
    def sets_at_once(self) -> int:
        """Sets of context vectors whose features fit into the engine's memory without a gradient."""
        return self._encoding.together

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


def _warn_of_half_precision(tower: TextTower, engine: Engine) -> None:
    """What half precision gains on towers whose padded batches go through their own module depends on the processor.

    Raises
    ------
    PromptError
        For float16 on the CPU, where unscaled gradients vanish.
    """
    if engine.precision == "float16":
        raise PromptError("engine.precision float16 is not for this text tower: its gradients are not scaled and "
                          "vanish; set float32 or bfloat16")  # fmt: skip
    if tower.device.type == "cpu":
        log.warning("engine.precision %s gains on this text tower where the processor multiplies in it, and loses "
                    "elsewhere (mini: 1.4 to 1.6 times as fast, or 0.8): benchmarks/half_precision.py measures it",
                    engine.precision)  # fmt: skip


def best_path(tower: TextTower) -> Path:
    """The fastest way that is exact for this tower."""
    return "packed" if supports_packing(tower) else "cut"


def read_texts(backbone: Backbone, texts: list[str]) -> Tensor:
    """Plain sentences -> L2-normalised features (n, d), float32, whether or not the tower takes prompts.

    Raises
    ------
    PromptError
        When a sentence is longer than the text tower's context; nothing is truncated.
    """
    if (tower := backbone.sentence_tower) is None:
        return encode_texts(backbone.text_tower, texts)
    for text in texts:
        _check_length(text, tower.count_tokens(text), tower)
    with torch.no_grad():
        parts = [tower.encode_sentences(texts[start : start + _TOGETHER]).float()
                 for start in range(0, len(texts), _TOGETHER)]  # fmt: skip
    return F.normalize(torch.cat(parts), dim=-1)


def encode_texts(tower: TextTower, texts: list[str], *, batch_size: int = _TOGETHER) -> Tensor:
    """Plain sentences -> L2-normalised features (n, d), float32, without gradient.

    Raises
    ------
    PromptError
        When a sentence is longer than the text tower's context; nothing is truncated.
    """
    sequences = [tower.tokenizer.tokenize(text) for text in texts]
    for text, sequence in zip(texts, sequences, strict=True):
        _check_length(text, len(sequence), tower)
    parts = []
    with torch.no_grad():
        for start in range(0, len(sequences), batch_size):
            token_ids, lengths = pad(sequences[start : start + batch_size], tower)
            parts.append(tower.encode(tower.embed(token_ids), lengths).float())
    return F.normalize(torch.cat(parts), dim=-1)


def _check_length(text: str, tokens: int, tower: TextTower | SentenceTower) -> None:
    if tokens > tower.context_length:
        raise PromptError(f"{text!r} has {tokens} tokens, but the text tower takes {tower.context_length}: shorten it")

"""Text encoding: context vectors -> text features, computing only the tokens that matter.

Three ways, equal to rounding; `auto` takes the first that is exact for the text tower:

    shared-prefix   causal towers: the rows all prompts share run once, tails are packed (backbone.shared_prefix)
    cut             padding-masked towers: prompts are cut after the longest
    full            every prompt at the text tower's full length, as the CoOp code does; for comparison
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from coop_core.backbone import TextTower, pad
from coop_core.backbone.shared_prefix import TailPlan, encode_prefix, encode_tails, plan_tails, supports_shared_prefix
from coop_core.errors import PromptError
from coop_core.prompt import PromptLayout

Path = Literal["shared-prefix", "cut", "full"]
Precision = Literal["float32", "bfloat16", "float16"]


class PromptEncoder:
    """One text tower with one layout, ready to encode context vectors again and again.

    A plain object, not a module: the frozen tower is neither trained nor saved with a method that holds it.
    """

    def __init__(
        self,
        tower: TextTower,
        layout: PromptLayout,
        *,
        path: Path | Literal["auto"] = "auto",
        precision: Precision = "float32",
        classes_per_chunk: int | None = None,
    ) -> None:
        """With `classes_per_chunk`, classes are encoded in turn and recomputed in the backward pass, so that
        memory is bounded by one chunk."""
        self.tower = tower
        self.layout = layout
        self.path: Path = best_path(tower) if path == "auto" else path
        self.precision = precision
        self.chunks = _chunks(len(layout.lengths), classes_per_chunk)
        missing = tower.context_length - layout.token_ids.shape[1] if self.path == "full" else 0
        with torch.no_grad():
            token_ids = F.pad(layout.token_ids, (0, missing), value=tower.pad_id)
            self._embeddings = tower.embed(token_ids)                             # (c, l, w)
        self._plans: dict[tuple[int, int, int], TailPlan] = {}

    def __call__(self, context_vectors: Tensor) -> Tensor:
        """Context vectors, shared (m, w) or class-specific (c, m, w) -> L2-normalised features (c, d), float32."""
        device = context_vectors.device.type
        dtype = getattr(torch, self.precision)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            prompts = self.layout.fill(self._embeddings, context_vectors)         # (c, l, w)
            if self.path == "shared-prefix":
                shared_rows = self.layout.shared_rows if context_vectors.ndim == 2 else self._frozen_rows()
                features = self._encode_shared(prompts, shared_rows)
            else:
                features = self._encode_whole(prompts)
        return F.normalize(features.float(), dim=-1)

    def _encode_shared(self, prompts: Tensor, shared_rows: int) -> Tensor:
        prefix = encode_prefix(self.tower, prompts[0, :shared_rows])              # type: ignore[arg-type]
        flat = [tensor for pair in prefix for tensor in pair]

        def encode(prompts: Tensor, plan: TailPlan, *flat: Tensor) -> Tensor:
            t = plan.shape[1]
            tails = prompts[:, shared_rows : shared_rows + t].flatten(0, 1).index_select(0, plan.packed)
            positions = shared_rows + plan.packed % t
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
            return encode_tails(self.tower, tails, positions, plan, pairs)        # type: ignore[arg-type]

        parts = [self._run(encode, prompts[a:b], self._plan(shared_rows, a, b), *flat) for a, b in self.chunks]
        return torch.cat(parts)

    def _encode_whole(self, prompts: Tensor) -> Tensor:
        lengths = self.layout.lengths
        return torch.cat([self._run(self.tower.encode, prompts[a:b], lengths[a:b]) for a, b in self.chunks])

    def _run(self, encode: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """One chunk; with several, each is recomputed in the backward pass instead of kept."""
        return encode(*inputs) if len(self.chunks) == 1 else checkpoint(encode, *inputs, use_reentrant=False)

    def _frozen_rows(self) -> int:
        """Rows every prompt shares when each class has its own context: the special tokens before it."""
        return min(self.layout.shared_rows, self.tower.tokenizer.prefix_length)

    def _plan(self, shared_rows: int, start: int, stop: int) -> TailPlan:
        key = (shared_rows, start, stop)
        if key not in self._plans:
            self._plans[key] = plan_tails(self.layout.lengths[start:stop], shared_rows=shared_rows)
        return self._plans[key]


def best_path(tower: TextTower) -> Path:
    """The fastest way that is exact for this tower."""
    return "shared-prefix" if supports_shared_prefix(tower) else "cut"


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


def _chunks(count: int, size: int | None) -> list[tuple[int, int]]:
    size = size or count
    return [(start, min(start + size, count)) for start in range(0, count, size)]

"""Interpretation: context vectors -> the vocabulary's nearest words, with the distances that put them in place."""

from typing import Any

import torch
from torch import Tensor

from coop_core.backbone import TextTower

_SAMPLE = 512
_CHUNK = 4096


@torch.no_grad()
def nearest_words(tower: TextTower, context_vectors: Tensor, *, count: int = 3) -> dict[str, Any]:
    """The nearest words to each shared context vector (m, w), by Euclidean distance in this tower's own table.

    Only tokens of letters count as words. The paper warns that nearest words may be a coincidence (CoOp,
    section 3.5), so the answer carries what a word's own nearest neighbour is away (median over a sample of the
    words): a context vector much farther from its nearest word than words are from each other does not mean
    that word.
    """
    texts, table = _words(tower)                                                  # (v, w)
    distances, ids = _nearest(table, context_vectors.to(table.device).float(), count)
    step = max(1, len(table) // _SAMPLE)
    among_words = torch.cdist(table[::step].double(), table.double()).topk(2, largest=False).values[:, 1]
    between_words = among_words.median().item()
    vectors = [
        [{"word": texts[i], "distance": d} for i, d in zip(row_ids, row, strict=True)]
        for row_ids, row in zip(ids.tolist(), distances.tolist(), strict=True)
    ]
    return {"vectors": vectors, "between_words": between_words, "norms": context_vectors.norm(dim=-1).tolist()}


def _words(tower: TextTower) -> tuple[list[str], Tensor]:
    """The vocabulary's words and their embeddings (v, w): no special tokens, signs or single letters."""
    texts = {i: tower.tokenizer.decode([i]).strip() for i in range(tower.vocabulary_size)}
    ids = [i for i, text in texts.items() if i not in tower.tokenizer.special_ids and len(text) > 1 and text.isalpha()]
    table = torch.cat([tower.embed(part) for part in torch.tensor(ids, device=tower.device).split(_CHUNK)])
    return [texts[i] for i in ids], table


def _nearest(table: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """-> (distances (n, count), row numbers (n, count)), nearest first.

    In float64 and by differences: the usual way through a matrix product cancels most digits between near vectors,
    and computes in whatever precision the process allows its float32 products (bfloat16, TF32).
    """
    exact = torch.cdist(vectors.double(), table.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = exact.topk(count, dim=1, largest=False)
    return found.values, found.indices

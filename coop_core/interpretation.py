"""Interpretation: context vectors -> the vocabulary's nearest words, with the distances that put them in place."""

from typing import Any

import torch
from torch import Tensor

from coop_core.backbone import TextTower

_SAMPLE = 512
_CHUNK = 4096


@torch.no_grad()
def nearest_words(tower: TextTower, context_vectors: Tensor, *, count: int = 3) -> dict[str, Any]:
    """The nearest tokens to each shared context vector (m, w), by Euclidean distance in this tower's own table.

    The paper warns that nearest words may be a coincidence (CoOp, section 3.5). So the answer carries what a
    word's own nearest neighbour is away (median over the vocabulary's sample): a context vector much farther
    from its nearest word than words are from each other does not mean that word.
    """
    table = _vocabulary(tower)                                                    # (v, w)
    distances, ids = _nearest(table, context_vectors.to(table.device).float(), count)
    step = max(1, len(table) // _SAMPLE)
    between_words = _nearest(table, table[::step], 2)[0][:, 1].median().item()
    vectors = [
        [{"word": _word(tower, i), "distance": d} for i, d in zip(row_ids, row, strict=True)]
        for row_ids, row in zip(ids.tolist(), distances.tolist(), strict=True)
    ]
    return {"vectors": vectors, "between_words": between_words, "norms": context_vectors.norm(dim=-1).tolist()}


def _vocabulary(tower: TextTower) -> Tensor:
    """Every token's embedding; special tokens are no words and stand infinitely far away."""
    ids = torch.arange(tower.vocabulary_size, device=tower.device)
    table = torch.cat([tower.embed(part) for part in ids.split(_CHUNK)])
    table[list(tower.tokenizer.special_ids)] = 1e4
    return table


def _nearest(table: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """-> (distances (n, count), token ids (n, count)), nearest first."""
    found = torch.cdist(vectors, table).topk(count, dim=1, largest=False)
    return found.values, found.indices


def _word(tower: TextTower, token_id: int) -> str:
    return tower.tokenizer.decode([token_id]).strip() or f"token {token_id}"

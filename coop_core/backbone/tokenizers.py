"""Tokenizers of open_clip and Hugging Face -> one shape that never truncates in silence."""

from collections.abc import Callable
from typing import Any

from coop_core.backbone.base import Tokenizer


def from_simple_tokenizer(tokenizer: Any) -> Tokenizer:
    """open_clip's byte-pair tokenizer; calling it would cut long texts, so its pieces are assembled here."""
    sot, eot = tokenizer.sot_token_id, tokenizer.eot_token_id
    return Tokenizer(
        tokenize=lambda text: [sot, *tokenizer.encode(text), eot],
        decode=lambda ids: tokenizer.decode(ids),
        prefix_length=1,
        suffix_length=1,
        special_ids=frozenset({sot, eot}),
    )


def from_hugging_face(tokenizer: Any, *, clean: Any = lambda text: text) -> Tokenizer:
    """A transformers tokenizer; `clean` is what its model did to texts before tokenising."""

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(clean(text), truncation=False, verbose=False).input_ids)

    bare = list(tokenizer("a photo", add_special_tokens=False).input_ids)
    whole = tokenize("a photo")
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return Tokenizer(
        tokenize=tokenize,
        decode=lambda ids: tokenizer.decode(ids),
        prefix_length=start,
        suffix_length=len(whole) - start - len(bare),
        # An unknown word is an ordinary piece: rare, but no end of anything.
        special_ids=frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id},
    )


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    """open_clip's tokenizer, which cuts long texts -> how many slots a text fills, special tokens included."""
    if hasattr(tokenizer, "sot_token_id"):
        return lambda text: len(tokenizer.encode(text)) + 2
    inner, clean = tokenizer.tokenizer, tokenizer.clean_fn
    adds_its_own = tokenizer.tokenizer_mode == "clips"  # SOT, EOT and a class token in the last slot

    def count(text: str) -> int:
        ids = inner(clean(text), truncation=False, verbose=False, add_special_tokens=not adds_its_own).input_ids
        return len(ids) + 3 * adds_its_own

    return count

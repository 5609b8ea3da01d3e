"""Tokenizers of open_clip and Hugging Face -> one shape that never truncates in silence."""

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

"""Text towers: prompt embeddings -> text features, for the families prompts can be injected into.

CausalTextTower       OpenAI-type CLIP and open_clip's native text transformer: causal mask, EOT pooling
PaddedTextTower       Hugging Face encoders: no causal mask, padding masked, pooled over or at the first token

WholeSentences reads sentences alone, for the families that prompts cannot be injected into.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coop_core.backbone.base import Tokenizer
from coop_core.backbone.blocks import Deep, through_block
from coop_core.backbone.frozen_linear import is_packable, with_frozen_products


class CausalTextTower:
    """A causal transformer pooled at EOT: what stands after EOT cannot matter.

    `module` has open_clip's attributes, on the flat CLIP itself or on its `text` part: token_embedding,
    positional_embedding, transformer, ln_final, text_projection, attn_mask.
    """

    pad_id = 0

    def __init__(self, module: Any, tokenizer: Tokenizer, encode_words: Callable[[Tensor], Tensor]) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.encode_words = encode_words
        self.context_length: int = module.positional_embedding.shape[0]
        self.width: int = module.positional_embedding.shape[1]
        self.vocabulary_size: int = module.token_embedding.num_embeddings
        self.packed: dict[torch.dtype, Any] = {}
        """Its frozen weights as the engine multiplies them, made when first asked for (prompts.packed_tower)."""

    @property
    def device(self) -> torch.device:
        return self.module.positional_embedding.device

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.module.token_embedding(token_ids).float()

    def encode(self, prompts: Tensor, lengths: Tensor, *, deep: Sequence[Deep | None] = ()) -> Tensor:
        """`deep`: what each plain block's queries read besides; empty for nothing."""
        x = self.add_positions(prompts)                                           # (n, l, w)
        mask = self.module.attn_mask[: prompts.shape[1], : prompts.shape[1]]
        if deep:
            for block, its in zip(self.module.transformer.resblocks, deep, strict=True):
                x = through_block(block, x, mask=mask, deep=its)
        else:
            x = self.module.transformer(x, attn_mask=mask)
        return self.project(x[torch.arange(len(x), device=x.device), lengths - 1])

    def kept_bytes(self, length: int) -> int:
        blocks = self.module.transformer.resblocks
        return _kept_bytes(length, self.width, len(blocks), blocks[0].attn.num_heads)

    def add_positions(self, prompts: Tensor) -> Tensor:
        dtype = self.module.transformer.get_cast_dtype()
        return prompts.to(dtype) + self.module.positional_embedding[: prompts.shape[-2]].to(dtype)

    def project(self, eot_rows: Tensor) -> Tensor:
        """The last block's rows at EOT (n, w) -> features (n, d)."""
        x = self.module.ln_final(eot_rows)
        projection = self.module.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


class PaddedTextTower:
    """A Hugging Face encoder that masks its padding: rows after the end are invisible, so cutting is exact.

    Embeddings enter as `inputs_embeds`; the encoder itself then adds positions, token types and layer norm.
    """

    def __init__(
        self,
        encoder: Any,
        tokenizer: Tokenizer,
        *,
        pool: Callable[[Any, Tensor], Tensor],
        project: Callable[[Tensor], Tensor],
        context_length: int,
        pad_id: int,
    ) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.pool = pool
        self.project = project
        self.context_length = context_length
        self.pad_id = pad_id
        self.vocabulary_size: int = encoder.get_input_embeddings().weight.shape[0]
        self.width: int = encoder.get_input_embeddings().weight.shape[1]
        self._ready: dict[torch.dtype, PaddedTextTower] = {}

    def ready_for(self, dtype: torch.dtype) -> "PaddedTextTower":
        """The same tower to be computed in a type, with frozen products, made once; itself where they gain nothing.

        Autocast to the type would convert every matrix in every pass. In half precision its attention is written out,
        because torch's fused one for CPUs is slow there.
        """
        if dtype == torch.float32 and not is_packable(self.encoder.get_input_embeddings().weight):
            return self
        if dtype not in self._ready:
            encoder: Any = with_frozen_products(self.encoder, dtype)
            project = self.project
            if dtype != torch.float32:
                encoder.set_attn_implementation("eager")
            if isinstance(project, nn.Module):
                project = with_frozen_products(project, dtype)
            self._ready[dtype] = PaddedTextTower(
                encoder, self.tokenizer, pool=self.pool, project=project,
                context_length=self.context_length, pad_id=self.pad_id,
            )  # fmt: skip
        return self._ready[dtype]

    @property
    def device(self) -> torch.device:
        return self.encoder.get_input_embeddings().weight.device

    def embed(self, token_ids: Tensor) -> Tensor:
        # Called, not indexed: some encoders scale inside their embedding module.
        return self.encoder.get_input_embeddings()(token_ids).float()

    def encode(self, prompts: Tensor, lengths: Tensor) -> Tensor:
        mask = (torch.arange(prompts.shape[1], device=prompts.device) < lengths[:, None]).long()  # (n, l)
        prompts = prompts.to(self.encoder.dtype)
        return self.project(self.pool(self.encoder(inputs_embeds=prompts, attention_mask=mask), mask))

    def kept_bytes(self, length: int) -> int:
        config = self.encoder.config
        return _kept_bytes(length, self.width, config.num_hidden_layers, config.num_attention_heads)

    def encode_words(self, token_ids: Tensor) -> Tensor:
        mask = (token_ids != self.pad_id).long()
        return self.project(self.pool(self.encoder(input_ids=token_ids, attention_mask=mask), mask))


class WholeSentences:
    """Sentences encoded by the model's own tokenizer and text encoder (`SentenceTower`)."""

    def __init__(
        self, encode: Callable[[list[str]], Tensor], count_tokens: Callable[[str], int], *, context_length: int
    ) -> None:
        self._encode, self._count, self.context_length = encode, count_tokens, context_length

    def count_tokens(self, text: str) -> int:
        return self._count(text)

    def encode_sentences(self, texts: list[str]) -> Tensor:
        return self._encode(texts)


def mean_pool(output: Any, mask: Tensor) -> Tensor:
    """Mean of the rows that count: (n, l, w) -> (n, w)."""
    weights = mask[..., None].to(output.last_hidden_state.dtype)
    return (output.last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1)


def _kept_bytes(length: int, width: int, depth: int, heads: int) -> int:
    """Generous: some 24 float32 values a row and width, and three of the attention's squares."""
    return 4 * depth * length * (24 * width + 3 * heads * length)

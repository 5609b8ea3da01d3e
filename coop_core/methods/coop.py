"""CoOp: images' features and labels -> context vectors, shared by all classes or one set a class.

Zhou, Yang, Loy, Liu: Learning to Prompt for Vision-Language Models, IJCV 2022. The words of a prompt are
replaced by learned vectors in the text tower's embedding space; both towers and the logit scale are frozen.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from coop_core.backbone import Backbone
from coop_core.errors import PromptError
from coop_core.methods import MethodParams
from coop_core.prompts.encoder import Engine, PromptEncoder, encode_together
from coop_core.prompts.layout import Position, build_layout, count_words, initial_context


class Params(MethodParams):
    name: Literal["coop"] = "coop"
    n_context: int | None = Field(default=16, ge=1, le=512)
    """How many context vectors (the paper's M); null takes the number of tokens of initial_words."""
    initial_words: str | None = Field(default=None, min_length=1)
    """Words the context starts from, such as "a photo of a"; null starts from random vectors."""
    class_specific: bool = False
    """One set of context vectors a class (the paper's CSC) instead of one for all."""
    class_token_position: Position = "end"

    @model_validator(mode="after")
    def _some_length(self) -> "Params":
        if self.n_context is None and self.initial_words is None:
            raise ValueError("n_context can be null only with initial_words")
        return self


class CoOp(nn.Module):
    """Learned context vectors in front of a frozen text tower."""

    def __init__(self, encoder: PromptEncoder, context_vectors: Tensor, *, logit_scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.logit_scale = logit_scale
        self.context_vectors = nn.Parameter(context_vectors)                      # (m, w) or (c, m, w), float32
        self.rebinds = context_vectors.ndim == 2

    def class_weights(self) -> Tensor:
        return self.encoder(self.context_vectors)                                 # (c, d)

    def forward(self, image_features: Tensor) -> Tensor:
        return self.logit_scale * image_features @ self.class_weights().T         # (n, c)

    @staticmethod
    def forward_together(learners: Sequence["CoOp"], image_features: Sequence[Tensor]) -> list[Tensor]:
        """Each learner's logits for its own image features, with prompts encoded in as few passes as possible."""
        weights = encode_together([one.encoder for one in learners], [one.context_vectors for one in learners])
        return [
            one.logit_scale * features @ own.T
            for one, features, own in zip(learners, image_features, weights, strict=True)
        ]


def build(
    params: Params,
    *,
    backbone: Backbone,
    class_names: Sequence[str],
    generator: torch.Generator,
    engine: Engine | None = None,
) -> CoOp:
    """An untrained CoOp for these class names.

    Raises
    ------
    PromptError
        When n_context is not the number of tokens of initial_words, or prompts do not fit the tower.
    """
    tower = backbone.text_tower
    n_context = _n_context(params, backbone)
    layout = build_layout(
        tower,
        class_names,
        n_context=n_context,
        position=params.class_token_position,
        initial_words=params.initial_words,
    )
    context = initial_context(
        tower,
        n_context=n_context,
        initial_words=params.initial_words,
        class_specific=len(class_names) if params.class_specific else None,
        generator=generator,
    )
    encoder = PromptEncoder(tower, layout, class_specific=params.class_specific, engine=engine)
    return CoOp(encoder, context.to(backbone.device), logit_scale=backbone.logit_scale)


def _n_context(params: Params, backbone: Backbone) -> int:
    if params.n_context is not None and params.initial_words is None:
        return params.n_context
    counted = count_words(backbone.text_tower, params.initial_words or "")
    if params.n_context not in (None, counted):
        raise PromptError(
            f"method.initial_words {params.initial_words!r} is {counted} tokens for {backbone.name}, but "
            f"method.n_context is {params.n_context}: set it to {counted} or null"
        )
    return counted

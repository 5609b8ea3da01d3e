"""CoOp: images' features and labels -> context vectors, shared by all classes or one set a class.

Zhou, Yang, Loy, Liu: Learning to Prompt for Vision-Language Models, IJCV 2022. The words of a prompt are
replaced by learned vectors in the text tower's embedding space; both towers and the logit scale are frozen.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from coop_core.backbone import Backbone
from coop_core.methods import MethodParams, Task
from coop_core.methods.learner import ContextLearner
from coop_core.prompts.encoder import PromptEncoder, encode_together
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import Position, build_layout, context_size, initial_context


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


class CoOp(ContextLearner):
    """Learned context vectors and nothing else."""

    @staticmethod
    def logits_together(learners: Sequence["CoOp"], images: Sequence[Tensor]) -> list[Tensor]:
        """Each learner's logits for its own images, with prompts encoded in as few passes as possible."""
        weights = encode_together([one.encoder for one in learners], [one.context_vectors for one in learners])
        return [one.logits_with(*its) for one, its in zip(learners, zip(weights, images, strict=True), strict=True)]


def build(
    params: Params,
    *,
    backbone: Backbone,
    task: Task,
    generator: torch.Generator,
    engine: Engine | None = None,
    **rest: Any,
) -> CoOp:
    """An untrained CoOp for the task's class names.

    Raises
    ------
    PromptError
        When n_context is not the number of tokens of initial_words, or prompts do not fit the tower.
    """
    tower = backbone.text_tower
    n_context = context_size(params.n_context, params.initial_words, backbone)
    layout = build_layout(
        tower,
        task.class_names,
        n_context=n_context,
        position=params.class_token_position,
        initial_words=params.initial_words,
    )
    context = initial_context(
        tower,
        n_context=n_context,
        initial_words=params.initial_words,
        class_specific=len(task.class_names) if params.class_specific else None,
        generator=generator,
    )
    encoder = PromptEncoder(tower, layout, class_specific=params.class_specific, engine=engine)
    return CoOp(encoder, context.to(backbone.device), logit_scale=backbone.logit_scale)

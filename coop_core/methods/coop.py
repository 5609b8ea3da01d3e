"""CoOp: images' features and labels -> context vectors, shared by all classes or one set a class.

Zhou, Yang, Loy, Liu: Learning to Prompt for Vision-Language Models, IJCV 2022. The words of a prompt are
replaced by learned vectors in the text tower's embedding space; both towers and the logit scale are frozen.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from coop_core.backbone import Backbone
from coop_core.methods import Task
from coop_core.methods.learner import ContextLearner, ContextParams, first_prompts
from coop_core.prompts.encoder import encode_together
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import Position


class Params(ContextParams):
    name: Literal["coop"] = "coop"
    class_specific: bool = False
    """One set of context vectors a class (the paper's CSC) instead of one for all."""
    class_token_position: Position = "end"


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
    encoder, context = first_prompts(
        params, backbone=backbone, task=task, generator=generator, engine=engine,
        position=params.class_token_position, class_specific=params.class_specific,
    )  # fmt: skip
    return CoOp(encoder, context, logit_scale=backbone.logit_scale)

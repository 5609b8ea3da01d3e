"""CoOp: images' features and labels -> context vectors, shared by all classes or one set a class.

Zhou, Yang, Loy, Liu: Learning to Prompt for Vision-Language Models, IJCV 2022. The words of a prompt are
replaced by learned vectors in the text tower's embedding space; both towers and the logit scale are frozen.

Two additions against forgetting, each off at 0 (`guided_coop`): `guidance` holds the learned text features near those
of the hand-written prompt (KgCoOp), `decoupled` lets a head of its own learn what is of these classes alone (DePT).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from coop_core.backbone import Backbone
from coop_core.judging.baselines import zero_shot
from coop_core.methods import Task
from coop_core.methods.guided_coop import DecoupledHead, GuidedCoOp
from coop_core.methods.learner import ContextLearner, ContextParams, first_prompts
from coop_core.prompts.encoder import encode_together
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import Position


class Params(ContextParams):
    name: Literal["coop"] = "coop"
    class_specific: bool = False
    """One set of context vectors a class (the paper's CSC) instead of one for all."""
    class_token_position: Position = "end"
    guidance: float = Field(default=0.0, ge=0, le=1000)
    """Weight of the distance from the hand-written prompt's text features (KgCoOp); its paper has 8, DePT 2."""
    decoupled: float = Field(default=0.0, ge=0, lt=1)
    """Share of a head of its own, in the loss and in the answers for the classes it learned (DePT); published: 0.7."""


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
    state: dict[str, Tensor] | None = None,
    rebound: bool = False,
    **rest: Any,
) -> CoOp | GuidedCoOp:
    """An untrained CoOp for the task's class names, or one that is to take up `state`.

    Raises
    ------
    PromptError
        When n_context is not the number of tokens of initial_words, or prompts do not fit the tower.
    """
    encoder, context = first_prompts(
        params, backbone=backbone, task=task, generator=generator, engine=engine,
        position=params.class_token_position, class_specific=params.class_specific,
    )  # fmt: skip
    if not params.guidance and not params.decoupled:
        return CoOp(encoder, context, logit_scale=backbone.logit_scale)
    texts = zero_shot(backbone, task.class_names, task.template).weights          # (c, d)
    head = None
    if params.decoupled:
        classes = len(texts) if state is None else len(state["head.weight"])
        head = DecoupledHead(classes, texts.shape[1], generator).to(backbone.device)
    return GuidedCoOp(
        encoder, context, texts, head, logit_scale=backbone.logit_scale, guidance=params.guidance,
        share=params.decoupled, rebound=rebound,
    )  # fmt: skip

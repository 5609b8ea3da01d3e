"""UPL: several prompts learned from images that zero-shot labelled, whose answers are averaged.

Huang, Chu, Wei: Unsupervised Prompt Learning for Vision-Language Models, 2022, sections 3.2 and 3.3. Each prompt is a
CoOp with a start and an order of batches of its own; the images' labels are zero-shot's (`judging.pseudo_labels`), and
the mean of the prompts' logits answers. It collapses to one classifier: the plain mean of their unit class weights.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from coop_core.backbone import Backbone
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Task
from coop_core.methods.learner import ContextParams, FeatureLearner, first_prompts
from coop_core.prompts.encoder import PromptEncoder
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import Position


class Params(ContextParams):
    name: Literal["upl"] = "upl"
    members: int = Field(default=16, ge=1, le=64)
    """How many prompts are learned; their logits are averaged."""
    class_token_position: Position = "end"


class UPL(FeatureLearner):
    """Prompts side by side, which share nothing but the frozen text tower."""

    def __init__(self, encoder: PromptEncoder, context_vectors: Tensor, *, logit_scale: float) -> None:
        super().__init__()
        self.encoder, self.logit_scale = encoder, logit_scale
        self.context_vectors = nn.Parameter(context_vectors)                      # (g, m, w), one set a member
        self.members = len(context_vectors)

    def classifier(self) -> LinearClassifier:
        return LinearClassifier(self.encoder(self.context_vectors).mean(0), scale=self.logit_scale)

    def logits(self, images: Tensor) -> Tensor:
        return self.classifier().logits(images)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each member's own batch (g, n, d), (g, n) -> the members' mean loss and logits (g, n, c)."""
        class_weights = self.encoder(self.context_vectors)                        # (g, c, d)
        logits = self.logit_scale * F.normalize(images, dim=-1) @ class_weights.mT
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def build(
    params: Params,
    *,
    backbone: Backbone,
    task: Task,
    generator: torch.Generator,
    engine: Engine | None = None,
    **rest: Any,
) -> UPL:
    """Untrained prompts for the task's class names, drawn one after another.

    Raises
    ------
    PromptError
        When n_context is not the number of tokens of initial_words, or prompts do not fit the tower.
    """
    encoder, contexts = first_prompts(
        params, backbone=backbone, task=task, generator=generator, engine=engine,
        position=params.class_token_position, members=params.members,
    )  # fmt: skip
    return UPL(encoder, contexts, logit_scale=backbone.logit_scale)

"""CoCoOp: context vectors that shift with each image, by a small network on its features.

Zhou, Yang, Loy, Liu: Conditional Prompt Learning for Vision-Language Models, CVPR 2022, section 3.2. The meta-net's
shift is added to every context vector of one image's prompts, so an answer costs a prompt a class and image, and
nothing collapses. Classes share the prompt up to their names: it is encoded once an image.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from coop_core.backbone import Backbone
from coop_core.methods import Task
from coop_core.methods.learner import ContextLength, ContextParams, FeatureLearner, InitialWords, first_prompts
from coop_core.prompts.encoder import PromptEncoder, encode_texts, encode_together
from coop_core.prompts.engine import Engine


class Params(ContextParams):
    name: Literal["cocoop"] = "cocoop"
    n_context: ContextLength | None = None
    initial_words: InitialWords | None = "a photo of a"
    reduction: int = Field(default=16, ge=1, le=1024)
    """The meta-net's hidden layer is the joint width divided by this."""


class CoCoOp(FeatureLearner):
    """Context vectors and a meta-net in front of a frozen text tower."""

    def __init__(
        self, encoder: PromptEncoder, context_vectors: Tensor, meta: "MetaNet", *, logit_scale: float
    ) -> None:
        super().__init__()
        self.encoder, self.logit_scale = encoder, logit_scale
        self.context_vectors = nn.Parameter(context_vectors)                      # (m, w)
        self.meta = meta

    @property
    def prompts_per_image(self) -> int:
        return len(self.encoder.layout.lengths)

    @property
    def images_at_once(self) -> int:
        return self.encoder.sets_at_once

    def logits(self, images: Tensor) -> Tensor:
        features = F.normalize(images, dim=-1)                                    # (n, d)
        return self._logits(features, self.encoder(self._contexts(features)))

    @staticmethod
    def logits_together(learners: Sequence["CoCoOp"], images: Sequence[Tensor]) -> list[Tensor]:
        """Each learner's logits for its own images, with prompts encoded in as few passes as possible."""
        features = [F.normalize(some, dim=-1) for some in images]
        contexts = [one._contexts(some) for one, some in zip(learners, features, strict=True)]
        weights = encode_together([one.encoder for one in learners], contexts)
        return [one._logits(*its) for one, its in zip(learners, zip(features, weights, strict=True), strict=True)]

    def _contexts(self, features: Tensor) -> Tensor:
        """Each image's context vectors (n, m, w): the shared ones and its own shift."""
        return self.context_vectors + self.meta(features)[:, None]

    def _logits(self, features: Tensor, class_weights: Tensor) -> Tensor:
        """(n, d), (n, c, d) -> (n, c)"""
        return self.logit_scale * (class_weights @ features[:, :, None]).squeeze(-1)


class MetaNet(nn.Module):
    """Unit image features (n, d) -> the context's shift (n, w), through one hidden layer."""

    def __init__(self, d: int, hidden: int, w: int, generator: torch.Generator) -> None:
        """Starts as torch's linear layers do, drawn in this order on the CPU, so that every device starts alike."""
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(d, hidden), nn.Linear(hidden, w)
        with torch.no_grad():
            for layer in (self.linear1, self.linear2):
                bound = layer.in_features**-0.5
                for parameter in (layer.weight, layer.bias):
                    parameter.uniform_(-bound, bound, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(features)))


def build(
    params: Params,
    *,
    backbone: Backbone,
    task: Task,
    generator: torch.Generator,
    engine: Engine | None = None,
    **rest: Any,
) -> CoCoOp:
    """An untrained CoCoOp for the task's class names; context is drawn first (if at all), then the meta-net.

    Raises
    ------
    PromptError
        When n_context is not the number of tokens of initial_words, or prompts do not fit the tower.
    """
    encoder, context = first_prompts(params, backbone=backbone, task=task, generator=generator, engine=engine)
    d = encode_texts(backbone.text_tower, ["a"]).shape[1]
    meta = MetaNet(d, max(1, d // params.reduction), backbone.text_tower.width, generator)
    learner = CoCoOp(encoder, context, meta, logit_scale=backbone.logit_scale)
    return learner.to(backbone.device)

"""What methods have in common: a torch module that reads image features and learns by cross-entropy."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Learner
from coop_core.prompts.encoder import PromptEncoder


class FeatureLearner(nn.Module):
    """Reads what the image tower says; a method overrides what is different with it."""

    reads: Literal["features", "pixels"] = "features"
    rebinds = True

    def logits(self, images: Tensor) -> Tensor:
        """Image tower outputs (n, d) -> (n, c)."""
        raise NotImplementedError

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(images)
        return F.cross_entropy(logits, labels), logits

    def classifier(self) -> LinearClassifier | None:
        return None


class ContextLearner(FeatureLearner):
    """Learned context vectors in front of a frozen text tower, which collapse to class weights."""

    def __init__(self, encoder: PromptEncoder, context_vectors: Tensor, *, logit_scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.logit_scale = logit_scale
        self.context_vectors = nn.Parameter(context_vectors)                      # (m, w) or (c, m, w), float32
        self.rebinds = context_vectors.ndim == 2

    def class_weights(self) -> Tensor:
        """L2-normalised text features (c, d)."""
        return self.encoder(self.context_vectors)

    def classifier(self) -> LinearClassifier:
        return LinearClassifier(self.class_weights(), scale=self.logit_scale)

    def logits(self, images: Tensor) -> Tensor:
        return self.logits_with(self.class_weights(), images)

    def logits_with(self, class_weights: Tensor, images: Tensor) -> Tensor:
        return self.logit_scale * F.normalize(images, dim=-1) @ class_weights.T   # (n, c)


class Fixed(FeatureLearner):
    """Built from examples and finished: a linear classifier that learns no further.

    It knows its own classes alone.
    """

    rebinds = False
    weights: Tensor
    bias: Tensor | None

    def __init__(self, classifier: LinearClassifier) -> None:
        super().__init__()
        self.scale, self.normalise = classifier.scale, classifier.normalise
        self.register_buffer("weights", classifier.weights)                       # (c, d)
        self.register_buffer("bias", classifier.bias)                             # (c,) or None

    def classifier(self) -> LinearClassifier:
        return LinearClassifier(self.weights, self.scale, self.bias, self.normalise)

    def logits(self, images: Tensor) -> Tensor:
        return self.classifier().logits(images)


@torch.no_grad()
def logits_in_pieces(learner: Learner, images: Tensor) -> Tensor:
    """The logits of many images (n, c), as many at a time as the learner says fit into memory."""
    pieces = images.split(getattr(learner, "images_at_once", None) or max(1, len(images)))
    return torch.cat([learner.logits(piece) for piece in pieces])


@torch.no_grad()
def collapsed(learner: Learner) -> LinearClassifier | None:
    """What a trained learner collapses to, on the CPU, or None."""
    found = learner.classifier()
    return None if found is None else found.cpu()

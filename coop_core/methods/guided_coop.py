"""CoOp with guidance and a decoupled head: what `coop` learns where its parameters ask for either.

Yao, Zhang, Xu: Visual-Language Prompt Tuning with Knowledge-guided Context Optimization, CVPR 2023 (KgCoOp), and
Zhang, Wu, Gao, Shen, Song: DePT: Decoupled Prompt Tuning, CVPR 2024. With image f, learned text features g, those of
the hand-written prompt t, all of unit length, l the head's share and k the weight of guidance, the loss is

    (1 - l) CE(scale * f'g_c) + l CE(A [q * f + r ; q' * g_y + r']) + k (1 - mean_c g_c't_c)

where q, r, q', r' (d) stretch and shift, A is linear, and each image's text joins the head's batch. An answer is the
same sum of both logits for the classes that were learned, and scale * f'g_c alone for others.

Where this file differs: KgCoOp's paper writes |g - t|^2, its code (and DePT's) the cosine above, half of that. DePT's
code gives its head features that are not normalised, here they are of length 10, so that one rate suits every tower;
and it trains the head at 6.5 times the rate of the context, here the two have one.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coop_core.judging.classifier import LinearClassifier
from coop_core.methods.learner import ContextLearner
from coop_core.prompts.encoder import PromptEncoder

LENGTH = 10.0
"""Of the features that the head is given."""


class DecoupledHead(nn.Module):
    """A linear classifier on stretched and shifted features, of images and of texts."""

    def __init__(self, classes: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.image_stretch, self.text_stretch = (nn.Parameter(torch.ones(width)) for _ in range(2))       # (d,)
        self.image_shift, self.text_shift = (nn.Parameter(torch.zeros(width)) for _ in range(2))          # (d,)
        bound = width**-0.5  # as torch begins linear layers
        self.weight = nn.Parameter(bound * (2 * torch.rand(classes, width, generator=generator) - 1))     # (c, d)
        self.bias = nn.Parameter(bound * (2 * torch.rand(classes, generator=generator) - 1))              # (c,)

    def images(self, unit: Tensor) -> Tensor:
        """Unit image features (n, d) -> logits (n, c)."""
        return F.linear(LENGTH * unit * self.image_stretch + self.image_shift, self.weight, self.bias)

    def texts(self, unit: Tensor) -> Tensor:
        """Unit text features (n, d) -> logits (n, c)."""
        return F.linear(LENGTH * unit * self.text_stretch + self.text_shift, self.weight, self.bias)

    def classifier(self) -> LinearClassifier:
        """The same for images."""
        bias = self.weight @ self.image_shift + self.bias
        return LinearClassifier(LENGTH * self.weight * self.image_stretch, bias=bias)


class GuidedCoOp(ContextLearner):
    """Context vectors whose text features are held near given ones, and, where there is one, a head beside them."""

    def __init__(
        self, encoder: PromptEncoder, context_vectors: Tensor, texts: Tensor, head: DecoupledHead | None, *,
        logit_scale: float, guidance: float, share: float, rebound: bool,
    ) -> None:  # fmt: skip
        """`rebound`: the classes are others than the head's, so that it answers nothing."""
        super().__init__(encoder, context_vectors, logit_scale=logit_scale)
        self.texts, self.guidance, self.share, self.rebound = texts, guidance, share, rebound
        self.head = head

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        class_weights = self.class_weights()                                      # (c, d)
        logits = self.logits_with(class_weights, images)                          # (n, c)
        loss = F.cross_entropy(logits, labels)
        if self.head is not None:
            seen, read = self.head.images(F.normalize(images, dim=-1)), self.head.texts(class_weights[labels])
            both = F.cross_entropy(torch.cat([seen, read]), labels.repeat(2))
            loss, logits = torch.lerp(loss, both, self.share), torch.lerp(logits, seen, self.share)
        if self.guidance:
            loss = loss + self.guidance * distance(class_weights, self.texts)
        return loss, logits

    def classifier(self) -> LinearClassifier:
        plain = super().classifier()
        if self.head is None or self.rebound:
            return plain
        own = self.head.classifier()
        assert own.bias is not None
        weights = torch.lerp(plain.scale * plain.weights, own.weights, self.share)
        return LinearClassifier(weights, bias=self.share * own.bias)

    def logits(self, images: Tensor) -> Tensor:
        return self.classifier().logits(images)


def distance(class_weights: Tensor, texts: Tensor) -> Tensor:
    """Unit features (c, d), (c, d) -> 1 - their mean cosine, half the mean squared distance."""
    return 1 - (class_weights * texts).sum(dim=1).mean()

"""Probe: a linear probe that starts from the class texts and, class by class, is held near them.

Silva-Rodriguez, Hajimiri, Ben Ayed, Dolz: A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models,
CVPR 2024. Weights w_c start at the text features t_c, and with unit features f

    mean_i CE(scale * f_i'w_c / |w_c|, y_i) + mean_c a_c |w_c - t_c|^2

goes down, where a_c, computed once, is how probable zero-shot finds class c on its own images: a class that its text
knows well stays near the text. Without the penalty it is the paper's ZS-LP, with it CLAP. The recipe is the paper's
and needs no validation images; each image shows one of its views an epoch (the paper has 20 of them).

Where the released code differs: it starts from the mean of un-normalised text features and penalises weights of that
length. `length` makes ours longer, which answered validation images of flowers no better with `mini`. A class without
an example, which the paper does not have, is held as one that zero-shot is sure of (a_c = 1).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from coop_core.backbone import Backbone
from coop_core.judging.baselines import zero_shot
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Examples, MethodParams, Task
from coop_core.methods.fitting import batches_an_epoch, descend, draw_batches, given, unit_views
from coop_core.methods.learner import Fixed


class Params(MethodParams):
    name: Literal["probe"] = "probe"
    penalty: Literal["class_adaptive", "none"] = "class_adaptive"
    """class_adaptive: CLAP; none: ZS-LP."""
    length: float = Field(default=1.0, gt=0, le=1e6)
    """Of the weights at the start: the longer, the smaller a step, and the heavier the penalty against it."""
    epochs: int = Field(default=300, ge=0, le=100_000)
    learning_rate: float = Field(default=0.1, ge=0, le=100)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    batch_size: int = Field(default=256, ge=1, le=10**6)


def build(
    params: Params,
    *,
    backbone: Backbone,
    task: Task,
    generator: torch.Generator | None = None,
    examples: Examples | None = None,
    state: dict[str, Tensor] | None = None,
    **rest: Any,
) -> Fixed:
    """From examples, all views of them; or, to load `state`, of its size.

    Raises
    ------
    TrainingError
        Without examples, or when the loss is no longer a number.
    """
    if state is not None:
        return Fixed(LinearClassifier(torch.zeros_like(state["weights"]), scale=backbone.logit_scale))
    examples = given(examples, method=params.name)
    texts = zero_shot(backbone, task.class_names, task.template)
    weights = fit(texts, examples, params, generator or torch.Generator().manual_seed(0))
    return Fixed(LinearClassifier(F.normalize(weights, dim=-1), scale=texts.scale))


def fit(texts: LinearClassifier, examples: Examples, params: Params, generator: torch.Generator) -> Tensor:
    """-> weights (c, d), not normalised."""
    features, labels = unit_views(examples), examples.labels                      # (n, views, d), (n,)
    strength = class_strength(texts, features, labels)
    if params.penalty == "none":
        strength = torch.zeros_like(strength)
    start = params.length * texts.weights                                         # (c, d)
    weights = nn.Parameter(start.clone())

    def loss(rows: Tensor, views: Tensor) -> Tensor:
        logits = texts.scale * features[rows, views] @ F.normalize(weights, dim=-1).T
        return F.cross_entropy(logits, labels[rows]) + penalty(weights, start, strength)

    steps = batches_an_epoch(examples, size=params.batch_size)
    descend(
        torch.optim.SGD([weights], lr=params.learning_rate, momentum=params.momentum), loss,
        draw_batches(examples, size=params.batch_size, epochs=params.epochs, generator=generator),
        steps=params.epochs * steps, warmup=steps, method=params.name,
    )  # fmt: skip
    return weights.detach()


def penalty(weights: Tensor, start: Tensor, strength: Tensor) -> Tensor:
    """(c, d), (c, d), (c,) -> mean over classes of a_c |w_c - t_c|^2, the multipliers fixed."""
    return (strength * (weights - start).square().sum(dim=1)).mean()


def class_strength(texts: LinearClassifier, features: Tensor, labels: Tensor) -> Tensor:
    """Unit features (n, views, d) -> a (c,): zero-shot's mean probability of each class on its own images."""
    right = texts.probabilities(features.flatten(0, 1)).view(*features.shape[:2], -1)
    right = right[torch.arange(len(labels), device=labels.device), :, labels].mean(dim=1)       # (n,)
    counts = torch.bincount(labels, minlength=len(texts.weights))
    sums = torch.zeros(len(texts.weights), device=right.device).index_add_(0, labels, right)
    return torch.where(counts > 0, sums / counts.clamp(min=1), 1.0)

"""ProLIP: a linear map after the image tower, held near where it starts; the class texts stay as they are.

Fahes, Vu, Bursuc, Perez, de Charette: Fine-Tuning CLIP's Last Visual Projector, 2024. With features h before the map,
its pretrained value W0 and unit class texts T

    mean_i CE(scale * normalise(h_i W) T', y_i) + lambda |W - W0|^2

goes down from W = W0, where lambda is 1 over the images a class, so that nothing is chosen by validation. What is
learned is W - W0, which suits any class list.

Where this file differs: the paper's W is the tower's own last projection. Here h is the tower's output, of unit length,
and W0 the identity, for every tower: the map can turn what the tower says, not bring back what its projection dropped.
The rate is 1e-4 instead of 1e-5, because validation loss is lower from there on (flowers and waste materials, `mini`);
the paper finds little difference between 1e-5 and 1e-2.
"""

import statistics
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from coop_core.backbone import Backbone
from coop_core.judging.baselines import zero_shot
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Examples, MethodParams, Task
from coop_core.methods.fitting import descend, given, unit_views
from coop_core.methods.learner import FeatureLearner


class Params(MethodParams):
    name: Literal["prolip"] = "prolip"
    penalty: float | None = Field(default=None, ge=0, le=1e12)
    """Weight of the distance from the start (the paper's lambda); null takes 1 / K, K the median of images a class."""
    steps: int = Field(default=300, ge=0, le=1_000_000)
    """Each with all images, in one of their views."""
    learning_rate: float = Field(default=1e-4, ge=0, le=100)
    """Of Adam; falls to 0 by a cosine."""


class ProLIP(FeatureLearner):
    """What was added to a map after the image tower."""

    change: Tensor

    def __init__(self, texts: LinearClassifier, change: Tensor) -> None:
        super().__init__()
        self.texts = texts
        self.register_buffer("change", change)                                    # (d, d), W - W0

    def logits(self, images: Tensor) -> Tensor:
        unit = F.normalize(images.double(), dim=-1)
        return self.texts.logits(unit + unit @ self.change.double())


def build(
    params: Params,
    *,
    backbone: Backbone,
    task: Task,
    generator: torch.Generator | None = None,
    examples: Examples | None = None,
    state: dict[str, Tensor] | None = None,
    **rest: Any,
) -> ProLIP:
    """From examples, all views of them; or, to load `state`, of its size and for any classes.

    Raises
    ------
    TrainingError
        Without examples, or when the loss is no longer a number.
    """
    texts = zero_shot(backbone, task.class_names, task.template)
    if state is not None:
        return ProLIP(texts, torch.zeros_like(state["change"], device=backbone.device))
    examples = given(examples, method=params.name)
    return ProLIP(texts, fit(texts, examples, params, generator or torch.Generator().manual_seed(0)))


def fit(texts: LinearClassifier, examples: Examples, params: Params, generator: torch.Generator) -> Tensor:
    """-> W - W0 (d, d)."""
    views, labels = unit_views(examples).transpose(0, 1), examples.labels         # (views, n, d), (n,)
    weight = 1 / shots_of(labels) if params.penalty is None else params.penalty
    change = nn.Parameter(torch.zeros(views.shape[-1], views.shape[-1], device=views.device))

    def loss(_: Tensor, view: Tensor) -> Tensor:
        images = views[view]                                                      # (n, d)
        logits = texts.scale * F.normalize(images + images @ change, dim=-1) @ texts.weights.T
        return F.cross_entropy(logits, labels) + weight * change.square().sum()

    everything = torch.arange(len(labels))
    drawn = torch.randint(len(views), (params.steps,), generator=generator)
    descend(torch.optim.Adam([change], lr=params.learning_rate), loss, ((everything, view) for view in drawn),
            steps=params.steps, method=params.name)  # fmt: skip
    return change.detach()


def shots_of(labels: Tensor) -> float:
    """The median of images a class, over the classes that have some."""
    return statistics.median(labels.unique(return_counts=True)[1].tolist())

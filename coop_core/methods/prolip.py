"""ProLIP: the image tower's last linear map, held near its pretrained value; the class texts stay as they are.

Fahes, Vu, Bursuc, Perez, de Charette: Fine-Tuning CLIP's Last Visual Projector, 2024. With features h before the map,
its pretrained value W0 and unit class texts T

    mean_i CE(scale * normalise(h_i W) T', y_i) + lambda |W - W0|^2

goes down from W = W0, where lambda is 1 over the images a class, so that nothing is chosen by validation. What is
learned is W - W0, which suits any class list. A bias of the map, which ResNets have, stays as it is.

Where this file differs: for a tower without such a map, `mini` among them, h is what the tower says, of unit length,
and W0 the identity. The rate is 1e-4 there instead of the paper's 1e-5, because validation loss is lower from there on
(flowers and waste materials, `mini`); the paper finds little difference between 1e-5 and 1e-2.
"""

import logging
import statistics
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from coop_core.backbone import Backbone
from coop_core.judging.baselines import zero_shot
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Examples, MethodParams, Reads, Task
from coop_core.methods.fitting import all_views, descend, given
from coop_core.methods.learner import FeatureLearner

log = logging.getLogger(__name__)

_RATE, _RATE_OF_IDENTITY = 1e-5, 1e-4


class Params(MethodParams):
    name: Literal["prolip"] = "prolip"
    penalty: float | None = Field(default=None, ge=0, le=1e12)
    """Weight of the distance from the start (the paper's lambda); null takes 1 / K, K the median of images a class."""
    steps: int = Field(default=300, ge=0, le=1_000_000)
    """Each with all images, in one of their views."""
    learning_rate: float | None = Field(default=None, ge=0, le=100)
    """Of Adam; falls to 0 by a cosine. null takes 1e-5, or 1e-4 for a tower without a last linear map."""
    reads: ClassVar[Reads] = "unprojected"


class ProLIP(FeatureLearner):
    """What was added to the image tower's last linear map."""

    reads: Reads = "unprojected"
    change: Tensor

    def __init__(self, texts: LinearClassifier, change: Tensor, backbone: Backbone) -> None:
        super().__init__()
        self.texts, self.backbone = texts, backbone
        self.register_buffer("change", change)                                    # (p, d), W - W0

    def logits(self, images: Tensor) -> Tensor:
        before = starting_point(images, self.backbone).double()                   # (n, p)
        return self.texts.logits(self.backbone.project(before).double() + before @ self.change.double())


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
        shape = state["change"].shape if backbone.projection is None else backbone.projection.weight.shape
        return ProLIP(texts, torch.zeros(shape, device=backbone.device), backbone)
    examples = given(examples, method=params.name)
    if backbone.projection is None:
        log.info("prolip: the image tower of %s has no last linear map that is known here, so an identity after it is "
                 "learned instead", backbone.name)  # fmt: skip
    drawn = generator or torch.Generator().manual_seed(0)
    return ProLIP(texts, fit(texts, examples, params, backbone, drawn), backbone)


def fit(
    texts: LinearClassifier, examples: Examples, params: Params, backbone: Backbone, generator: torch.Generator
) -> Tensor:
    """-> W - W0 (p, d)."""
    views = starting_point(all_views(examples), backbone).transpose(0, 1)         # (views, n, p)
    labels, starts = examples.labels, backbone.project(views)                     # (n,), (views, n, d)
    weight = 1 / shots_of(labels) if params.penalty is None else params.penalty
    rate = params.learning_rate
    if rate is None:
        rate = _RATE if backbone.projection else _RATE_OF_IDENTITY
    change = nn.Parameter(torch.zeros(views.shape[-1], starts.shape[-1], device=views.device))

    def loss(_: Tensor, view: Tensor) -> Tensor:
        images = F.normalize(torch.addmm(starts[view], views[view], change), dim=-1)              # (n, d)
        return F.cross_entropy(texts.scale * images @ texts.weights.T, labels)

    # The slope of lambda |W - W0|^2 is 2 lambda (W - W0), which Adam adds itself: its passes over W are the cost.
    adam = torch.optim.Adam([change], lr=rate, weight_decay=2 * weight, fused=True)
    everything = torch.arange(len(labels))
    drawn = torch.randint(len(views), (params.steps,), generator=generator).tolist()
    descend(adam, loss, ((everything, view) for view in drawn), steps=params.steps, method=params.name)
    return change.detach()


def starting_point(images: Tensor, backbone: Backbone) -> Tensor:
    """What was read (..., p) -> h; of unit length where the tower has no last linear map."""
    return images if backbone.projection else F.normalize(images, dim=-1)


def shots_of(labels: Tensor) -> float:
    """The median of images a class, over the classes that have some."""
    return statistics.median(labels.unique(return_counts=True)[1].tolist())

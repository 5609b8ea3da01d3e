"""Tip-Adapter: the examples are a memory whose labels answer in part for what an image is like.

Zhang, Zhang, Fang, Gao, Li, Dai, Qiao, Li: Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification,
ECCV 2022. With a key F_i an example (its views' mean, of unit length) and its label one-hot in L, the answer is

    scale * f'T' + alpha * exp(-beta (1 - f F')) L

`fine_tune` learns the keys as well (Tip-Adapter-F), a fixed number of epochs with the recipe of the released code.
alpha and beta are chosen on the validation images, before the keys are learned with them and once more after.

Where the released code differs: it takes the epoch that answers the test images best, and its grid and the alpha and
beta that keys are learned with are written down for each data set.
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
from coop_core.methods.fitting import (
    batches_an_epoch,
    best_choice,
    descend,
    draw_batches,
    given,
    unit_views,
    watched,
)
from coop_core.methods.learner import FeatureLearner

ALPHAS = tuple(torch.logspace(-1, 2.5, 15).tolist())
BETAS = tuple(torch.logspace(-1, 1.5, 11).tolist())
"""0.1 to 316 and 0.1 to 32, four a decade."""
DEFAULT_ALPHA, DEFAULT_BETA = 1.0, 5.5
"""The paper's, section 4.1; without validation images."""
_AFFINITIES = 2**24
"""Images times examples that an answer may hold."""


class Params(MethodParams):
    name: Literal["tip_adapter"] = "tip_adapter"
    fine_tune: bool = False
    """Whether the keys are learned too."""
    alpha: float | None = Field(default=None, ge=0, le=1e6)
    """Weight of the memory beside zero-shot; null chooses it on the validation images, or takes 1 without any."""
    beta: float | None = Field(default=None, ge=0, le=1e6)
    """How near an example must be to count; null chooses it likewise, or takes 5.5."""
    epochs: int = Field(default=20, ge=0, le=100_000)
    learning_rate: float = Field(default=0.001, ge=0, le=100)
    batch_size: int = Field(default=256, ge=1, le=10**6)


class TipAdapter(FeatureLearner):
    """A memory of examples beside the class texts; it knows its own classes alone."""

    rebinds = False
    keys: Tensor
    labels: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, texts: LinearClassifier, keys: Tensor, labels: Tensor, *, alpha: float, beta: float) -> None:
        super().__init__()
        self.texts = texts
        self.register_buffer("keys", keys)                                        # (n, d)
        self.register_buffer("labels", labels)                                    # (n,)
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float64))
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float64))

    @property
    def images_at_once(self) -> int:
        return max(1, _AFFINITIES // len(self.keys))

    def logits(self, images: Tensor) -> Tensor:
        unit = F.normalize(images.double(), dim=-1)
        said = memory(unit, self.keys.double(), self.labels, len(self.texts.weights), beta=self.beta.item())
        return (self.texts.logits(images).double() + self.alpha * said).float()


def build(
    params: Params,
    *,
    backbone: Backbone,
    task: Task,
    generator: torch.Generator | None = None,
    examples: Examples | None = None,
    validation: Examples | None = None,
    state: dict[str, Tensor] | None = None,
    **rest: Any,
) -> TipAdapter:
    """From examples, the mean of their views; or, to load `state`, of its size.

    Raises
    ------
    TrainingError
        Without examples, or when the loss is no longer a number.
    """
    texts = zero_shot(backbone, task.class_names, task.template)
    if state is not None:
        keys, labels = (torch.zeros_like(state[name], device=backbone.device) for name in ("keys", "labels"))
        return TipAdapter(texts, keys, labels, alpha=0.0, beta=0.0)
    examples = given(examples, method=params.name)
    keys, labels = F.normalize(unit_views(examples).mean(dim=1), dim=-1), examples.labels       # (n, d), (n,)
    asked = watched(validation)
    alpha, beta = choose(texts, keys, labels, asked, params)
    if params.fine_tune:
        keys = learn_keys(
            texts, keys, examples, params, alpha=alpha, beta=beta,
            generator=generator or torch.Generator().manual_seed(0),
        )  # fmt: skip
        alpha, beta = choose(texts, keys, labels, asked, params)
    return TipAdapter(texts, keys, labels, alpha=alpha, beta=beta)


def learn_keys(
    texts: LinearClassifier, start: Tensor, examples: Examples, params: Params, *,
    alpha: float, beta: float, generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Keys (n, d) -> learned ones, no longer of unit length (section 3.3)."""
    views, labels = unit_views(examples), examples.labels                         # (n, views, d), (n,)
    keys = nn.Parameter(start.clone())

    def loss(rows: Tensor, drawn: Tensor) -> Tensor:
        images = views[rows, drawn]                                               # (b, d)
        said = memory(images, keys, labels, len(texts.weights), beta=beta)
        return F.cross_entropy(texts.scale * images @ texts.weights.T + alpha * said, labels[rows])

    descend(
        torch.optim.AdamW([keys], lr=params.learning_rate, eps=1e-4), loss,
        draw_batches(examples, size=params.batch_size, epochs=params.epochs, generator=generator),
        steps=params.epochs * batches_an_epoch(examples, size=params.batch_size), method=params.name,
    )  # fmt: skip
    return keys.detach()


def memory(images: Tensor, keys: Tensor, labels: Tensor, classes: int, *, beta: float) -> Tensor:
    """Unit images (n, d) and keys (k, d) with labels (k,) -> exp(-beta (1 - f F')) L (n, c) (equations 3 and 4)."""
    affinities = torch.exp(-beta * (1 - images @ keys.T))                         # (n, k)
    return images.new_zeros(images.shape[0], classes).index_add(1, labels, affinities)


def choose(
    texts: LinearClassifier, keys: Tensor, labels: Tensor, asked: tuple[Tensor, Tensor] | None, params: Params
) -> tuple[float, float]:
    """The alpha and beta of the grid that answer unit validation images (n, d) with labels best; given ones stay."""
    if asked is None:
        return (DEFAULT_ALPHA if params.alpha is None else params.alpha,
                DEFAULT_BETA if params.beta is None else params.beta)  # fmt: skip
    images, truth = asked
    untrained = texts.scale * images @ texts.weights.double().T                   # (n, c)
    alphas, betas = (grid if given is None else (given,)
                     for grid, given in ((ALPHAS, params.alpha), (BETAS, params.beta)))  # fmt: skip
    said = ((beta, _in_pieces(images, keys, labels, len(texts.weights), beta=beta)) for beta in betas)
    return best_choice((((alpha, beta), untrained + alpha * its) for beta, its in said for alpha in alphas), truth)


def _in_pieces(images: Tensor, keys: Tensor, labels: Tensor, classes: int, *, beta: float) -> Tensor:
    pieces = images.split(max(1, _AFFINITIES // len(keys)))
    return torch.cat([memory(piece, keys.double(), labels, classes, beta=beta) for piece in pieces])

"""GDA: Gaussians around the classes' means, with one covariance, in closed form and mixed with zero-shot.

Wang, Liang, Sheng, He, Wang, Tan: A Hard-to-Beat Baseline for Training-Free CLIP-based Adaptation, ICLR 2024.
With f unit features of all views (N of them, d wide), mu_c their class means and S their covariance around these,
P = d ((N - 1) S + tr(S) I)^-1 is the shrunk precision, and the answer to an image f is

    scale * f't_c + alpha * (f'P mu_c - mu_c'P mu_c / 2 - log c)

which is a linear classifier. alpha is chosen on the validation images, of those of the released code.

With other classes it does what the released code does with new ones (main_base2new.py): a class's mean is that of the
64 features nearest to its text and 16 copies of the text, and P the mean of the classes' own, each around its text.
Therefore the unit features of the examples are kept: N * d * 4 bytes, 33 MB for 1,000 classes of 16 images at d = 512.

Where this file differs: one image a class in one view has no spread, so P is d I then, and the class means answer;
the released code chooses alpha for ImageNet on its test images, and has the plain pseudo-inverse of the mean class
covariance for the base classes of base-to-new.
"""

import logging
import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from coop_core.backbone import Backbone
from coop_core.judging.baselines import zero_shot
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Examples, MethodParams, Task
from coop_core.methods.fitting import best_choice, check_classes, given, unit_views, watched
from coop_core.methods.learner import FeatureLearner

log = logging.getLogger(__name__)

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
DEFAULT_ALPHA = 0.1
"""Without validation images; what the released search starts from."""
_NEAREST, _COPIES = 64, 16
"""Features that a new class's mean is made of, and how often its text counts among them."""
_SPREAD = 1e-12
"""Sum of squares below which features are one point."""


class Params(MethodParams):
    name: Literal["gda"] = "gda"
    alpha: float | None = Field(default=None, ge=0, le=1e6)
    """Weight of the Gaussians beside zero-shot; null chooses it on the validation images, or takes 0.1 without any."""


class GDA(FeatureLearner):
    """A linear classifier, and the features that one for other classes is made of."""

    def __init__(self, classifier: LinearClassifier, features: Tensor, labels: Tensor, alpha: float) -> None:
        super().__init__()
        self._classifier = classifier
        self.register_buffer("features", features)                                # (N, d), unit
        self.register_buffer("labels", labels)                                    # (N,)
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float64))

    def classifier(self) -> LinearClassifier:
        return self._classifier

    def logits(self, images: Tensor) -> Tensor:
        return self._classifier.logits(images)


def build(
    params: Params,
    *,
    backbone: Backbone,
    task: Task,
    examples: Examples | None = None,
    validation: Examples | None = None,
    state: dict[str, Tensor] | None = None,
    rebound: bool = False,
    **rest: Any,
) -> GDA:
    """From examples, all views of them; or of `state`, for its own classes or, `rebound`, for others.

    Raises
    ------
    TrainingError
        Without examples, or when a class has none.
    """
    texts = zero_shot(backbone, task.class_names, task.template)                  # (c, d)
    if state is not None:
        features, labels = (state[name].to(backbone.device) for name in ("features", "labels"))
        alpha = state["alpha"].item()
        weights, bias = (new_gaussians(features, texts.weights) if rebound
                         else gaussians(features, labels, len(texts.weights)))  # fmt: skip
    else:
        examples = given(examples, method=params.name)
        check_classes(examples.labels, len(task.class_names), method=params.name)
        features = unit_views(examples).flatten(0, 1)                             # (N, d), N = n * views
        labels = examples.labels.repeat_interleave(examples.views)
        weights, bias = gaussians(features, labels, len(texts.weights))
        alpha = params.alpha if params.alpha is not None else _choose(texts, weights, bias, validation)
        log.info("gda: alpha %g; it keeps %d unit features for other classes, %.1f MB", alpha, len(features),
                 features.numel() * 4 / 1e6)  # fmt: skip
    mixed = LinearClassifier(texts.scale * texts.weights.double() + alpha * weights, bias=alpha * bias)
    return GDA(mixed, features, labels, alpha)


def gaussians(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Unit features (N, d) and their labels (N,) -> weights (c, d) and bias (c,), float64 (the paper's equation 5).

    With the shrinkage of Kubokawa and Srivastava (2008), which the paper takes.
    """
    features = features.double()
    counts = torch.bincount(labels, minlength=classes)[:, None]                   # (c, 1)
    means = torch.zeros(classes, features.shape[1], dtype=features.dtype, device=features.device)
    means = means.index_add_(0, labels, features) / counts
    return _weights(means, shrunk_precision(features - means[labels]))


def new_gaussians(features: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Unit features (N, d) of other classes and unit texts (c, d) -> weights (c, d) and bias (c,), float64."""
    features, texts = features.double(), texts.double()
    rows = (texts @ features.T).topk(min(_NEAREST, len(features))).indices       # (c, k)
    means = (features[rows].sum(dim=1) + _COPIES * texts) / (rows.shape[1] + _COPIES)
    precision = torch.zeros(texts.shape[1], texts.shape[1], dtype=texts.dtype, device=texts.device)
    for text, nearest in zip(texts, rows, strict=True):
        precision += shrunk_precision(features[nearest] - text) / len(texts)
    return _weights(means, precision)


def _weights(means: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    weights = means @ precision
    return weights, -0.5 * (weights * means).sum(dim=1) - math.log(len(means))


def shrunk_precision(centred: Tensor) -> Tensor:
    """Rows around their centre (n, d) -> d ((n - 1) S + tr(S) I)^-1 (d, d), where (n - 1) S is the sum of squares."""
    n, d = centred.shape
    identity = torch.eye(d, dtype=centred.dtype, device=centred.device)
    squares = centred.square().sum()
    if squares <= _SPREAD:
        return d * identity
    trace = squares / max(1, n - 1)
    if n >= d:
        return d * torch.linalg.inv(centred.T @ centred + trace * identity)
    # With fewer rows than columns the inverse of an (n, n) matrix will do (Woodbury).
    small = centred @ centred.T + trace * torch.eye(n, dtype=centred.dtype, device=centred.device)
    return d / trace * (identity - centred.T @ torch.linalg.solve(small, centred))


def _choose(texts: LinearClassifier, weights: Tensor, bias: Tensor, validation: Examples | None) -> float:
    """The alpha that answers the validation images best."""
    found = watched(validation)
    if found is None:
        return DEFAULT_ALPHA
    images, labels = found
    untrained = texts.scale * images @ texts.weights.double().T                  # (n, c)
    learned = images @ weights.T + bias
    return best_choice(((alpha, untrained + alpha * learned) for alpha in ALPHAS), labels)

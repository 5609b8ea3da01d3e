"""Baselines: class names, templates and few-shot features -> zero-shot, prompt ensemble and linear probe.

All three answer from the same cached image features as the learned prompt.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from coop_core.backbone import Backbone
from coop_core.classifier import LinearClassifier
from coop_core.text_encoding import encode_texts

COARSE_GRID = tuple(10.0**power for power in (6, 4, 2, 0, -2, -4, -6))
"""First values of C in the linear probe's search (CoOp, lpclip)."""
_SMALL = 5e7
"""Multiplications a pass below which one thread is faster than several."""


def zero_shot(backbone: Backbone, class_names: Sequence[str], template: str) -> LinearClassifier:
    """One hand-written prompt a class (Radford et al. 2021, section 3.1)."""
    weights = encode_texts(backbone.text_tower, [template.format(name) for name in class_names])  # (c, d)
    return LinearClassifier(weights, scale=backbone.logit_scale)


def prompt_ensemble(
    backbone: Backbone, class_names: Sequence[str], templates: Sequence[str], *, own_template: str
) -> LinearClassifier:
    """The mean of several templates' normalised features, normalised again.

    The data set's own template joins the others once, and the list that was given is left as it is.
    """
    distinct = list(dict.fromkeys([*templates, own_template]))
    parts = [zero_shot(backbone, class_names, template).weights for template in distinct]
    return LinearClassifier(F.normalize(torch.stack(parts).mean(dim=0), dim=-1), scale=backbone.logit_scale)


@dataclass(frozen=True)
class LinearProbe:
    classifier: LinearClassifier
    regularisation: float
    """scikit-learn's C, the inverse strength of L2."""
    val_accuracy: float | None


def linear_probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    val_features: np.ndarray,
    val_labels: np.ndarray,
    *,
    steps: int = 8,
) -> LinearProbe:
    """Logistic regression on image tower outputs (n, d), not normalised, as published with CoOp.

    C is searched on the validation images: a coarse grid, then `steps` comparisons of the ends of the log
    interval around its best, which halves each time (ties go to the smaller C); never worse than the grid.
    Without validation images C is 1. The test images are never asked.

    The L2 optimum lies in the span of the training features, so with fewer images than dimensions the fit runs
    on their coordinates in that span: the same classifier, many times faster.
    """
    basis = np.linalg.qr(train_features.T)[0] if len(train_features) < train_features.shape[1] else None
    train, val = (x if basis is None else x @ basis for x in (train_features, val_features))

    @cache
    def fitted(c: float) -> Any:
        return _fit(train, train_labels, c)

    @cache
    def score(c: float) -> float:
        return float(fitted(c).score(val, val_labels))

    if not len(val_labels):
        return LinearProbe(_as_classifier(fitted(1.0), basis), 1.0, None)
    chosen = best = max(COARSE_GRID, key=score)
    left, right = 0.1 * best, 10.0 * best
    for _ in range(steps):
        chosen = left if score(left) >= score(right) else right
        middle = 10 ** ((np.log10(left) + np.log10(right)) / 2)
        left, right = (left, middle) if chosen == left else (middle, right)
    if score(best) > score(chosen):
        chosen = best
    return LinearProbe(_as_classifier(fitted(chosen), basis), float(chosen), score(chosen))


def _fit(features: np.ndarray, labels: np.ndarray, c: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    # Hundreds of products of small matrices: two threads on two busy cores were 10 to 20 times slower than one.
    small = features.size * len(np.unique(labels)) < _SMALL
    with warnings.catch_warnings(), threadpool_limits(1 if small else None):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the published limit of 1000 iterations counts
        return LogisticRegression(C=c, max_iter=1000).fit(features, labels)


def _as_classifier(model: Any, basis: np.ndarray | None) -> LinearClassifier:
    """`basis` (d, n) takes weights back from the span's coordinates."""
    weights, bias = torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float()
    if len(weights) == 1:  # two classes share one separating plane
        weights, bias = torch.cat([0 * weights, weights]), torch.cat([0 * bias, bias])
    if basis is not None:
        weights = weights @ torch.from_numpy(basis).float().T
    return LinearClassifier(weights, bias=bias, normalise=False)

"""Baselines: class names, templates and few-shot features -> zero-shot, prompt ensemble and linear probe.

All three answer from the same cached image features as the learned prompt.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from coop_core.backbone import Backbone
from coop_core.judging.classifier import LinearClassifier
from coop_core.prompts.encoder import read_texts

COARSE_GRID = tuple(10.0**power for power in (6, 4, 2, 0, -2, -4, -6))
"""First values of C in the linear probe's search (CoOp, lpclip)."""
_SMALL = 5e7
"""Multiplications a pass below which one thread is faster than several on busy cores, and closeness costs nothing."""
_MAX_ITERATIONS = 1000
"""The published limit; a fit that ends there would be the last iterate, as in scikit-learn."""
_ROWS = 1024
"""Images at a time: what is computed of them stays in the processor's cache."""
_FLOOR = 1e-9
"""Share of the objective below which float32 sees no gain."""
_NEVER = -1e30
"""Logit of a class that nothing was learned of: probability 0, and a number all the same."""
_MEMORY = 10
"""Steps that L-BFGS remembers."""
_Step = tuple[Tensor, Tensor, float]
"""A step, the change of the gradient along it, and 1 / their product."""


def zero_shot(backbone: Backbone, class_names: Sequence[str], template: str) -> LinearClassifier:
    """One hand-written prompt a class (Radford et al. 2021, section 3.1)."""
    weights = read_texts(backbone, [template.format(name) for name in class_names])               # (c, d)
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
    classes: int | None = None,
    steps: int = 8,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> LinearProbe:
    """Logistic regression on image tower outputs (n, d), not normalised, as published with CoOp.

    C is searched on the validation images: a coarse grid, then `steps` comparisons of the ends of the log interval
    around its best, which halves each time; the best of all counts. Best is the highest accuracy. Of equals the
    lowest log loss wins, and this alone differs from the published rule, which takes the largest C of the grid and
    the smaller of two ends: few images leave many ties, and probabilities that are far too sure or unsure among them.
    Without validation images C is 1. `classes` is how many there are, where the last ones may have no training image,
    as in a pool that zero-shot labelled: these are never answered.
    The test images are never asked. `progress` gets the number of fits done and of all.
    """
    path = LogisticPath(train_features, train_labels, answers=classes)
    if not len(val_labels):
        weights = path.fit(0.0)
        progress(1, 1)
        return LinearProbe(path.classifier(weights), 1.0, None)
    val, labels = torch.from_numpy(np.array(val_features)), torch.from_numpy(np.array(val_labels))
    total = len(COARSE_GRID) + (max(2, steps) if steps else 0)  # the first middle is the grid's best
    scores: dict[float, tuple[float, float]] = {}

    def score(power: float) -> tuple[float, float]:
        if power not in scores:
            logits = path.classifier(path.fit(power)).logits(val)
            accuracy = float((logits.argmax(dim=1) == labels).float().mean())
            scores[power] = accuracy, -float(F.cross_entropy(logits, labels))
            progress(len(scores), total)
        return scores[power]

    best = max(sorted(np.log10(COARSE_GRID).tolist()), key=score)
    left, right = best - 1, best + 1
    for _ in range(steps):
        middle = (left + right) / 2
        left, right = (left, middle) if score(left) >= score(right) else (middle, right)
    best = max(sorted(scores), key=score)
    return LinearProbe(path.classifier(path.fit(best)), 10.0**best, scores[best][0])


class LogisticPath:
    """Optima of C * sum of cross entropies + |W|^2 / 2 along C, each found from those beside it.

    The features are turned into their principal axes: the optimum lies in their span, and its curvature is nearly
    diagonal there. The bias bears no penalty, so features may be centred for it, and it becomes one more weight.
    `tolerance` bounds how far the weights may be from the optimum, as a share of their own length; where it is left
    out it is 1e-4, or 1e-2 where a pass takes 5e7 multiplications or more. With two classes scikit-learn has one
    separating plane, whose penalty is that of two rows at half the C.
    """

    def __init__(
        self, features: np.ndarray, labels: np.ndarray, *, tolerance: float | None = None, answers: int | None = None
    ) -> None:
        self.labels, self.classes = torch.from_numpy(np.array(labels)), int(labels.max()) + 1
        self.without = max(0, (answers or 0) - self.classes)
        known = torch.from_numpy(np.array(features)).float()                                   # (n, d)
        small = known.numel() * self.classes < _SMALL
        self.threads = 1 if small else torch.get_num_threads()
        self.tolerance = tolerance or (1e-4 if small else 1e-2)
        self.mean = known.mean(dim=0)                                                          # (d,)
        known -= self.mean
        with _threads(self.threads):
            self.axes = _principal_axes(known)                                                 # (r, d)
            columns = known @ self.axes.T
        self.inputs = torch.cat([columns, torch.ones(len(columns), 1)], dim=1)                 # (n, r + 1)
        self.optima: dict[float, Tensor] = {}

    def fit(self, power: float) -> Tensor:
        """(r + 1, c) at C = 10 ** power; the last row is the bias."""
        if power not in self.optima:
            c = 10.0**power / (2 if self.classes == 2 else 1)
            with _threads(self.threads):
                start = self._start(power)
                self.optima[power] = _minimise(self.inputs, self.labels, c, start=start, tolerance=self.tolerance)
        return self.optima[power]

    def _start(self, power: float) -> Tensor:
        """On the line through the two nearest optima: at large C they grow with its logarithm."""
        near = sorted(self.optima, key=lambda known: abs(known - power))[:2]
        if len(near) < 2:
            return torch.zeros(self.inputs.shape[1], self.classes)
        slope = (power - near[0]) / (near[1] - near[0])
        return torch.lerp(self.optima[near[0]], self.optima[near[1]], slope)

    def classifier(self, weights: Tensor) -> LinearClassifier:
        found = weights[:-1].T @ self.axes                                                     # (c, d)
        bias = F.pad(weights[-1] - found @ self.mean, (0, self.without), value=_NEVER)
        return LinearClassifier(F.pad(found, (0, 0, 0, self.without)), bias=bias, normalise=False)


def _principal_axes(features: Tensor) -> Tensor:
    """Centred features (n, d) -> orthonormal rows (r, d) that span them, r = min(n, d)."""
    n, d = features.shape
    if n < d:
        return torch.linalg.svd(features, full_matrices=False).Vh
    return torch.linalg.eigh(features.T @ features).eigenvectors.T


def _minimise(inputs: Tensor, labels: Tensor, c: float, *, start: Tensor, tolerance: float) -> Tensor:
    """L-BFGS (Nocedal and Wright 2006, algorithm 7.4) -> weights (r + 1, c), of which the last row bears no penalty.

    A step costs two products with the inputs: logits along a direction are a line too. The objective is 1-strongly
    convex in what bears the penalty, so the optimum is no further away than the gradient is long, and the search
    ends where that is `tolerance` of the weights' length, and where the bias is as close, by its curvature and in
    units of what the weights do to logits. It also ends where the next step promises less than float32 can hold,
    which happens at large C when classes overlap.
    """
    penalty = torch.ones(inputs.shape[1], 1)
    penalty[-1] = 0
    energy = inputs.square().sum(dim=0)[:, None]                                               # (r + 1, 1)
    weights, logits = start, inputs @ start
    steps: list[_Step] = []
    direction = before = torch.zeros_like(weights)
    for _ in range(_MAX_ITERATIONS):
        gradient, loss, uncertainty = _slopes(inputs, logits, labels)
        gradient = c * gradient + penalty * weights
        spread = (energy * penalty * weights.square()).sum().sqrt() * len(inputs) ** 0.5
        if (
            (penalty * gradient).norm() <= tolerance * (penalty * weights).norm()
            and gradient[-1].norm() <= tolerance * c * uncertainty * spread
        ):
            break
        change = gradient - before
        if (bend := _dot(direction, change)) > 0:
            steps = [*steps[1 - _MEMORY :], (direction, change, 1 / bend)]
        direction = -_quasi_newton(gradient, steps, 1 / (c * uncertainty * energy + penalty))
        promise = -_dot(gradient, direction)
        if promise <= _FLOOR * (c * loss + _dot(weights, penalty * weights) / 2):
            break
        along, pull = inputs @ direction, penalty * direction
        t = _step_length(c, labels, logits, along, pull=(_dot(weights, pull), _dot(direction, pull)), promise=promise)
        direction, before = t * direction, gradient
        weights, logits = weights + direction, logits.add_(along, alpha=t)
    return weights


def _slopes(inputs: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, float, float]:
    """Gradient (r + 1, c) and value of the sum of cross entropies, and the mean of p (1 - p)."""
    gradient, loss, uncertainty = torch.zeros(inputs.shape[1], logits.shape[1]), 0.0, 0.0
    for rows, answers, truth in zip(*(x.split(_ROWS) for x in (inputs, logits, labels)), strict=True):
        residuals = _residuals(answers, truth)
        gradient.addmm_(rows.T, residuals)
        missed = residuals.gather(1, truth[:, None]).double()                                  # (b, 1), p - 1
        loss -= float(torch.log1p(missed.clamp(min=1e-12 - 1)).sum())
        uncertainty -= 2 * float(missed.sum()) + _dot(residuals, residuals)
    return gradient, loss, uncertainty / logits.numel()


def _residuals(logits: Tensor, labels: Tensor) -> Tensor:
    """Probabilities less the one-hot labels (n, c); a true class is less the others' sum, which loses no digit."""
    found = logits.softmax(dim=1).scatter_(1, labels[:, None], 0.0)
    return found.scatter_(1, labels[:, None], -found.sum(dim=1, keepdim=True))


def _quasi_newton(gradient: Tensor, steps: Sequence[_Step], diagonal: Tensor) -> Tensor:
    """The inverse Hessian that the last steps show, times the gradient; `diagonal` is its first guess."""
    found, shares = gradient, []
    for step, change, inverse in reversed(steps):
        shares.append(inverse * _dot(step, found))
        found = found - shares[-1] * change
    if steps:
        _, change, inverse = steps[-1]
        diagonal = diagonal / (inverse * _dot(change, diagonal * change))
    found = diagonal * found
    for (step, change, inverse), share in zip(steps, reversed(shares), strict=True):
        found = found + (share - inverse * _dot(change, found)) * step
    return found


def _step_length(
    c: float, labels: Tensor, logits: Tensor, along: Tensor, *, pull: tuple[float, float], promise: float
) -> float:
    """Where the slope along a direction has lost half of its size; it only rises, so halving finds the place."""
    low, high, t = 0.0, math.inf, 1.0
    for _ in range(30):
        slope = pull[0] + t * pull[1]
        for answers, change, truth in zip(*(x.split(_ROWS) for x in (logits, along, labels)), strict=True):
            slope += c * _dot(_residuals(torch.add(answers, change, alpha=t), truth), change)
        if abs(slope) <= 0.5 * promise:
            break
        low, high = (t, high) if slope < 0 else (low, t)
        t = 2 * t if high == math.inf else (low + high) / 2
    return t


def _dot(one: Tensor, other: Tensor) -> float:
    return float(one.flatten() @ other.flatten())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(usual)

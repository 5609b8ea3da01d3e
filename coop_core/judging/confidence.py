"""Confidence: answers to validation images -> a temperature, and a confidence below which a classifier abstains.

One temperature makes confidences mean what they say and changes no answer (Guo, Pleiss, Sun, Weinberger: On Calibration
of Modern Neural Networks, ICML 2017, section 4.2). Abstaining below a confidence trades answers for accuracy; on the
test images, the risk-coverage curve shows the trade (Geifman, El-Yaniv: Selective Classification for Deep Neural
Networks, NeurIPS 2017).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from coop_core.judging.evaluation import wilson_interval

_TEMPERATURES = np.geomspace(0.25, 4.0, 281)
"""One per cent apart. They end, because ever lower ones would be likelier where all validation answers are right."""
FEW_IMAGES = 200
"""Below, validation images decide little, and whoever chooses by them says so."""
_RESAMPLES = 200
_POINTS = 50
"""Of a risk-coverage curve."""


@dataclass(frozen=True)
class Confidence:
    """What was fitted on validation images, and on how many."""

    validation_images: int
    temperature: float = 1.0
    """Logits are divided by it."""
    temperature_interval: tuple[float, float] | None = None
    """95 % by resampling the validation images; None where it was not fitted."""
    threshold: float = 0.0
    """The least confidence that is an answer."""
    share: float = 1.0
    """Of the validation images, answered with that threshold."""
    accuracy: float = 0.0
    """Of these answers."""
    accuracy_interval: tuple[float, float] = (0.0, 1.0)
    """95 %, Wilson."""
    is_reached: bool = True
    """False: no threshold reached the accuracy that was asked for, and this one comes nearest."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit_confidence(
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    temperature: bool = False,
    target_accuracy: float | None = None,
    target_share: float | None = None,
    seed: int = 0,
) -> Confidence:
    """Validation probabilities (n, c) and labels (n,) -> what is kept beside the classifier.

    The threshold is the lowest confidence down to which answers are right so often (`target_accuracy`), or that so many
    images exceed (`target_share`); without either, everything is answered.

    >>> said = np.array([[0.95, 0.05], [0.9, 0.1], [0.2, 0.8], [0.55, 0.45]])
    >>> found = fit_confidence(said, np.array([0, 0, 1, 1]), target_accuracy=0.9)
    >>> found.threshold, found.share, found.accuracy
    (0.8, 0.75, 1.0)
    """
    found, interval = 1.0, None
    if temperature:
        found, interval = fit_temperature(probabilities, labels, seed=seed)
        probabilities = at_temperature(probabilities, found)
    confidence, hits = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    threshold, is_reached = _threshold(confidence, hits, target_accuracy, target_share)
    answered = confidence >= threshold
    right, n = int(hits[answered].sum()), int(answered.sum())
    return Confidence(
        len(labels), found, interval, threshold, n / len(labels), right / n, wilson_interval(right, n), is_reached
    )


def fit_temperature(
    probabilities: np.ndarray, labels: np.ndarray, *, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """The temperature between 1/4 and 4 at which labels (n,) are likeliest, and a 95 % interval by resampling."""
    logs = _logs(probabilities)                                                   # (n, c)
    own = logs[np.arange(len(labels)), labels]
    losses = np.stack([np.logaddexp.reduce(logs / t, axis=1) - own / t for t in _TEMPERATURES])  # (temperatures, n)
    random = np.random.default_rng(seed)
    drawn = (random.integers(0, len(labels), len(labels)) for _ in range(_RESAMPLES))
    low, high = np.quantile([_TEMPERATURES[losses[:, rows].mean(axis=1).argmin()] for rows in drawn], [0.025, 0.975])
    return float(_TEMPERATURES[losses.mean(axis=1).argmin()]), (float(low), float(high))


def at_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (n, c) with their logits divided by a temperature.

    >>> at_temperature(np.array([[0.9, 0.1]]), 2.0).round(2).tolist()
    [[0.75, 0.25]]
    """
    scaled = _logs(probabilities) / temperature
    return np.exp(scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True))


def _logs(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))


def _threshold(
    confidence: np.ndarray, hits: np.ndarray, target_accuracy: float | None, target_share: float | None
) -> tuple[float, bool]:
    """The confidence from which on there is an answer, and whether it does what was asked."""
    order = np.argsort(-confidence, kind="stable")
    falling = confidence[order]
    if target_share is not None:
        return float(falling[int(np.ceil(target_share * len(falling))) - 1]), True
    if target_accuracy is None:
        return 0.0, True
    accuracy = hits[order].cumsum() / np.arange(1, len(falling) + 1)
    ends = np.append(falling[1:] < falling[:-1], True)                            # equal confidences stay together
    reached = np.flatnonzero(ends & (accuracy >= target_accuracy))
    if len(reached):
        return float(falling[reached[-1]]), True
    return float(falling[ends][accuracy[ends].argmax()]), False


def selective(probabilities: np.ndarray, labels: np.ndarray, *, threshold: float) -> dict[str, Any]:
    """Test probabilities (n, c) and labels (n,) -> how answers fare above the threshold, and above any other."""
    confidence, hits = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    answered = confidence >= threshold
    n, right = int(answered.sum()), int(hits[answered].sum())
    return {
        "answered": n / len(labels),
        "accuracy": right / n if n else None,
        "interval": list(wilson_interval(right, n)) if n else None,
        "curve": risk_coverage(confidence, hits),
    }


def risk_coverage(confidence: np.ndarray, hits: np.ndarray) -> list[dict[str, float]]:
    """Answers taken by falling confidence: share answered, share of these that is wrong, and the lowest confidence."""
    order = np.argsort(-confidence, kind="stable")
    wrong = (~hits[order]).cumsum()
    places: Sequence[int] = np.unique(np.linspace(1, len(order), min(_POINTS, len(order))).round().astype(int)).tolist()
    return [
        {"coverage": k / len(order), "risk": float(wrong[k - 1] / k), "confidence": float(confidence[order[k - 1]])}
        for k in places
    ]

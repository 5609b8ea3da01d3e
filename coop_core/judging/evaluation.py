"""Evaluation: probabilities and labels of the test images -> the numbers of one classifier, in full precision."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from coop_core.data.dataset import distinct


@dataclass(frozen=True)
class CalibrationBin:
    """Test images whose confidence lies in (low, high]."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean top-1 probability; 0 in an empty bin."""
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    n: int
    accuracy: float
    """Top-1, a fraction."""
    interval: tuple[float, float]
    """95 % Wilson interval of the accuracy over test images."""
    macro_f1: float
    """Mean over the classes that occur among the labels, as in CoOp's evaluation."""
    calibration_error: float
    """Expected calibration error (Guo et al. 2017) with equally wide bins."""
    class_accuracy: dict[str, float]
    confusion: list[list[int]]
    """Rows are true classes, columns predicted ones."""
    calibration: list[CalibrationBin]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    probabilities: np.ndarray, labels: np.ndarray, class_names: Sequence[str], *, calibration_bins: int = 15
) -> Evaluation:
    """Judge probabilities (n, c) against labels (n,)."""
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities[np.arange(len(labels)), predicted]
    hits = predicted == labels
    confusion = np.zeros((len(class_names), len(class_names)), dtype=int)
    np.add.at(confusion, (labels, predicted), 1)
    bins = _calibration(confidence, hits, calibration_bins)
    accuracy = float(hits.mean())
    return Evaluation(
        n=len(labels),
        accuracy=accuracy,
        interval=wilson_interval(int(hits.sum()), len(labels)),
        macro_f1=_macro_f1(confusion),
        calibration_error=sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / len(labels),
        class_accuracy={
            name: float(row[label] / row.sum()) if row.sum() else 0.0
            for label, (name, row) in enumerate(zip(distinct(class_names), confusion, strict=True))
        },
        confusion=confusion.tolist(),
        calibration=bins,
    )


def wilson_interval(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927).

    >>> [round(edge, 2) for edge in wilson_interval(9, 10)]
    [0.6, 0.98]
    >>> [round(edge, 2) for edge in wilson_interval(90, 100)]
    [0.83, 0.94]
    """
    p = hits / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def _macro_f1(confusion: np.ndarray) -> float:
    true, predicted, hits = confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal()
    occurring = true > 0
    return float((2 * hits[occurring] / (true + predicted)[occurring]).mean())


def _calibration(confidence: np.ndarray, hits: np.ndarray, count: int) -> list[CalibrationBin]:
    edges = np.linspace(0, 1, count + 1)
    found = []
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        n = int(inside.sum())
        mean = (float(confidence[inside].mean()), float(hits[inside].mean())) if n else (0.0, 0.0)
        found.append(CalibrationBin(float(low), float(high), n, *mean))
    return found


"""Pseudo labels: what zero-shot answers to a pool of images without labels -> the images to learn from.

Huang, Chu, Wei: Unsupervised Prompt Learning for Vision-Language Models, 2022, section 3.1: of each class that is
answered, the K most confident images, and no balancing. A class that is never answered gets none. In float32 and
stable, because in half precision many confidences are equal; equal ones are ordered by the images' digests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coop_core.backbone import Backbone
from coop_core.data.split import Split
from coop_core.errors import TrainingError
from coop_core.features.examples import CachedFeatures
from coop_core.judging.baselines import zero_shot


@dataclass(frozen=True)
class PseudoLabels:
    """Classes ascending, in each the most confident image first."""

    rows: np.ndarray
    """(n,) numbers of images in the pool."""
    labels: np.ndarray
    """(n,) int64"""
    confidences: np.ndarray
    """(n,) probabilities of the labels."""


def pseudo_labels(
    probabilities: np.ndarray, digests: Sequence[str], *, per_class: int, min_confidence: float | None = None
) -> PseudoLabels:
    """Probabilities (n, c) of a pool -> the images of each class that are learned from.

    The `per_class` most confident, and all whose confidence is above `min_confidence`.

    >>> said = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]])
    >>> pseudo_labels(said, ["a", "b", "c", "d"], per_class=1).rows.tolist()
    [0, 2]
    >>> pseudo_labels(said, ["a", "b", "c", "d"], per_class=1, min_confidence=0.75).rows.tolist()
    [0, 3, 2]
    """
    answers, confidences = probabilities.argmax(1), probabilities.max(1)
    order = np.lexsort((np.array(digests), -confidences, answers))               # the last key counts first
    labels = answers[order]
    starts = np.searchsorted(labels, labels)                                     # where each one's class begins
    chosen = np.arange(len(order)) - starts < per_class
    if min_confidence is not None:
        chosen |= confidences[order] > min_confidence
    rows = order[chosen]
    return PseudoLabels(rows, answers[rows].astype(np.int64), confidences[rows])


def training_examples(
    split: Split, features: np.ndarray, backbone: Backbone, *, shots: int, min_confidence: float | None = None,
    unprojected: bool = False,
) -> tuple[CachedFeatures, PseudoLabels | None]:  # fmt: skip
    """A split and its training images' features (n, views, d) -> `shots` images a class with their labels, or, where
    it has none, with those that zero-shot is surest of, which are said beside them.

    `unprojected`: features are those before the tower's last linear map (n, views, p), and stay so.

    Raises
    ------
    TrainingError
        When all images get one label.
    """
    images = split.shots_subset(shots)
    examples = CachedFeatures.of(images, features[: len(images)], device=backbone.device)
    if not split.is_unlabelled:
        return examples, None
    return labelled_pool(split, examples.features, backbone, per_class=shots, min_confidence=min_confidence,
                         unprojected=unprojected)  # fmt: skip


def labelled_pool(
    split: Split, features: Tensor, backbone: Backbone, *, per_class: int, min_confidence: float | None = None,
    unprojected: bool = False,
) -> tuple[CachedFeatures, PseudoLabels]:  # fmt: skip
    """A split without labels and its pool's features (n, views, d) -> examples in the pool's order, and their labels.

    Raises
    ------
    TrainingError
        When all images get one label, from which nothing can be learned.
    """
    classifier = zero_shot(backbone, split.class_names, split.template)
    seen = features[:, 0].float()
    probabilities = classifier.probabilities(backbone.project(seen) if unprojected else seen).cpu().numpy()
    digests = [image.digest for image in split.train]
    found = pseudo_labels(probabilities, digests, per_class=per_class, min_confidence=min_confidence)
    if len(set(found.labels.tolist())) < 2:
        raise TrainingError(f"zero-shot takes every image without a label for {split.class_names[found.labels[0]]!r}: "
                            "correct the class names or the template, or take another backbone")  # fmt: skip
    in_order = np.argsort(found.rows)
    rows = torch.from_numpy(found.rows[in_order]).to(features.device)
    labels = torch.from_numpy(found.labels[in_order]).to(features.device)
    return CachedFeatures(features[rows], labels), found

"""Pseudo labels: what zero-shot answers to a pool of images without labels -> the images to learn from.

Huang, Chu, Wei: Unsupervised Prompt Learning for Vision-Language Models, 2022, section 3.1: of each class that is
answered, the K most confident images, and no balancing. A class that is never answered gets none. In float32 and
stable, because in half precision many confidences are equal; equal ones are ordered by the images' digests. Several
backbones (the paper's UPL*) answer by the mean of their probabilities.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from coop_core.backbone import Backbone
from coop_core.data.split import Split
from coop_core.errors import TrainingError
from coop_core.features.examples import CachedFeatures
from coop_core.features.extract import feature_key
from coop_core.judging.baselines import zero_shot
from coop_core.judging.label_file import Labeller, PoolLabels, PseudoLabels, surest_of_each


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
    rows = order[surest_of_each(answers[order], confidences[order], per_class, min_confidence)]
    return PseudoLabels(rows, answers[rows].astype(np.int64), confidences[rows])


def answer_pool(
    split: Split, features: Tensor, backbone: Backbone, *, name: str | None = None
) -> tuple[Labeller, np.ndarray]:
    """A pool's image features (n, d) by a backbone -> who answers, and its zero-shot probabilities (n, c), float32.

    `name` is what params.yaml calls a further backbone.
    """
    probabilities = zero_shot(backbone, split.class_names, split.template).probabilities(features.float())
    return Labeller(name or backbone.name, backbone.weights_digest, feature_key(backbone)), probabilities.cpu().numpy()


def label_pool(
    split: Split, answers: Iterable[tuple[Labeller, np.ndarray]], *, per_class: int, min_confidence: float | None = None
) -> PoolLabels:
    """A split without labels and what one backbone or several answer to its pool -> the images to learn from.

    Answers are taken one after another, so that one backbone is in memory at a time.

    Raises
    ------
    TrainingError
        When all images get one label, from which nothing can be learned.
    """
    labellers, total = [], np.zeros(1, dtype=np.float32)
    for labeller, probabilities in answers:
        labellers.append(labeller)
        total = total + probabilities
    digests = [image.digest for image in split.train]
    found = pseudo_labels(total / len(labellers), digests, per_class=per_class, min_confidence=min_confidence)
    if len(set(found.labels.tolist())) < 2:
        raise TrainingError(f"zero-shot takes every image without a label for {split.class_names[found.labels[0]]!r}: "
                            "correct the class names or the template, or take another backbone")  # fmt: skip
    return PoolLabels(found, per_class, min_confidence, tuple(labellers))


def training_examples(
    split: Split, features: np.ndarray, labels: PoolLabels | None, *, shots: int, device: torch.device | str = "cpu"
) -> CachedFeatures:
    """A split and its training images' features (n, views, d) -> `shots` images a class in the split's order, with
    their labels or, where it has none, with the pool's."""
    images = split.shots_subset(shots)
    examples = CachedFeatures.of(images, features[: len(images)], device=device)
    return examples if labels is None else pool_examples(examples.features, labels.of(shots))


def pool_examples(features: Tensor, labels: PseudoLabels) -> CachedFeatures:
    """A pool's features (n, views, d) -> examples of the images that have a label, in the pool's order."""
    in_order = np.argsort(labels.rows)
    rows = torch.from_numpy(labels.rows[in_order]).to(features.device)
    return CachedFeatures(features[rows], torch.from_numpy(labels.labels[in_order]).to(features.device))

"""Seen: images that a version answered -> what is kept of each: a feature, a label, a confidence.

A version carries what it saw of its test images (`reference.safetensors`), and the server records what it is sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from coop_core.errors import ArtifactError

REFERENCE_IMAGES = 500
"""At most so many test images stay with a version: 1.3 MB where features are 1280 wide."""


@dataclass(frozen=True)
class Seen:
    features: np.ndarray
    """Image features (n, d), L2-normalised, float16."""
    labels: np.ndarray
    """The most probable class of each (n,), int64; of classes that share a name, the first."""
    confidences: np.ndarray
    """Its probability (n,), float32."""
    answered: np.ndarray
    """Whether that was enough for an answer (n,), bool."""
    images: tuple[str, ...]
    """SHA-256 of each file, in hexadecimal."""

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, which: np.ndarray) -> "Seen":
        """Of these images alone: row numbers, or a bool each."""
        which = np.arange(len(self))[which]
        return Seen(self.features[which], self.labels[which], self.confidences[which], self.answered[which],
                    tuple(self.images[i] for i in which))  # fmt: skip

    def without(self, images: Sequence[str]) -> "Seen":
        """All but these files."""
        known = set(images)
        return self.rows(np.array([image not in known for image in self.images], dtype=bool))

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        digests = np.frombuffer(bytes.fromhex("".join(self.images)), np.uint8).reshape(len(self), 32)
        arrays = {"features": self.features, "labels": self.labels, "confidences": self.confidences,
                  "answered": self.answered, "images": digests}  # fmt: skip
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Any]) -> "Seen":
        try:
            arrays = {name: tensors[name].numpy() for name in ("features", "labels", "confidences", "answered")}
            return cls(**arrays, images=tuple(bytes(row).hex() for row in tensors["images"].numpy()))
        except KeyError as error:
            raise ArtifactError(f"what a version saw of its test images lacks {error}: train again") from None


def seen_of_nothing() -> Seen:
    """What a version saw whose test images have no labels: there are none."""
    nothing = np.zeros(0)
    return Seen(np.zeros((0, 0), np.float16), nothing.astype(np.int64), nothing.astype(np.float32),
                nothing.astype(bool), ())  # fmt: skip


def small(features: Tensor) -> np.ndarray:
    """Image tower outputs (n, d) -> L2-normalised, float16, on the CPU; a feature moves by a thousandth at most."""
    return F.normalize(features.detach().float(), dim=-1).half().cpu().numpy()


def label_numbers(class_names: Sequence[str]) -> dict[str, int]:
    """Class names -> their labels; of classes that share a name, the first."""
    return {name: number for number, name in reversed(list(enumerate(class_names)))}


def seen_of(
    features: Tensor, probabilities: Tensor, images: Sequence[str], *, class_names: Sequence[str], threshold: float
) -> Seen:
    """Image tower outputs (n, d), probabilities (n, c) and SHA-256 of the files -> what a version saw."""
    confidences, labels = probabilities.cpu().max(dim=1)
    numbers = label_numbers(class_names)
    first = np.array([numbers[name] for name in class_names])                     # (c,)
    values = confidences.float().numpy()
    return Seen(small(features), first[labels.numpy()], values, values >= threshold, tuple(images))


def spread(count: int, *, at_most: int = REFERENCE_IMAGES) -> np.ndarray:
    """Rows of at most so many of `count` images, equally far apart: a split lists its images class by class.

    >>> spread(10, at_most=4).tolist()
    [0, 3, 6, 9]
    """
    return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(np.int64))

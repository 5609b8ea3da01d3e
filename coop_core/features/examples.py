"""Examples: labelled images as learners read them, as features computed before or as pixels decoded when asked for."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coop_core.data.split import SplitImage
from coop_core.data.views import ImageTransform
from coop_core.features.decoding import decode_ahead


@dataclass(frozen=True)
class CachedFeatures:
    """Labelled images whose features are computed already."""

    features: Tensor
    """(n, views, d) image tower outputs, not normalised."""
    labels: Tensor
    """(n,) int64 on the same device."""

    @classmethod
    def of(cls, images: Sequence[SplitImage], features: np.ndarray, *, device: torch.device | str) -> "CachedFeatures":
        """Images of a split and their features (n, views, d)."""
        labels = torch.tensor([image.label for image in images], dtype=torch.int64, device=device)
        return cls(torch.from_numpy(np.array(features)).float().to(device), labels)

    @property
    def views(self) -> int:
        return self.features.shape[1]

    def batch(self, rows: Tensor, views: Tensor) -> Tensor:
        """(b,), (b,) -> (b, d)"""
        return self.features[rows, views]


FRESH = 2**31 - 1
"""Views of an image that is augmented anew each time it is read."""


@dataclass(frozen=True)
class DecodedImages:
    """Labelled images that are decoded when they are read, for methods that learn through the image tower."""

    images: Sequence[SplitImage]
    root: Path
    transform: ImageTransform
    device: torch.device | str = "cpu"
    views: int = 1
    """1: the test view alone; more: so many random crops and flips besides, by `seed`."""
    seed: int = 0

    @cached_property
    def labels(self) -> Tensor:
        """(n,) int64"""
        return torch.tensor([image.label for image in self.images], dtype=torch.int64, device=self.device)

    def batch(self, rows: Tensor, views: Tensor) -> Tensor:
        """(b,), (b,) -> normalised pixels (b, 3, size, size)"""
        return next(self.batches([rows], [views]))

    def batches(self, rows: Iterable[Tensor], views: Iterable[Tensor]) -> Iterator[Tensor]:
        """One after another, the next ones decoded ahead."""
        requests = ([(self.images[i], view) for i, view in zip(some.tolist(), its.tolist(), strict=True)]
                    for some, its in zip(rows, views, strict=True))  # fmt: skip
        decoded = decode_ahead(self.transform, requests, root=self.root, seed=self.seed, device=self.device)
        for pixels in decoded:
            yield pixels.to(self.device, non_blocking=True)

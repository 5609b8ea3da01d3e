"""Examples: what the image tower said of labelled images, kept on the device that learners compute on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coop_core.data.split import SplitImage


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

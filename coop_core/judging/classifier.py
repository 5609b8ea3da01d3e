"""Linear classifiers: image features -> logits and probabilities; what every baseline and every prompt becomes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from coop_core.errors import ArtifactError

_AT_ONCE = 4096
"""Images that are answered at a time, so that their copies in float64 stay small."""


@dataclass(frozen=True)
class LinearClassifier:
    weights: Tensor
    """(c, d)"""
    scale: float = 1.0
    bias: Tensor | None = None
    """(c,)"""
    normalise: bool = True
    """Whether image features are L2-normalised first; the linear probe was fitted on them as they are."""

    def logits(self, features: Tensor) -> Tensor:
        """Image tower outputs (n, d) -> (n, c), float32.

        Computed in float64: figures are read from it, and what a process allows its float32 products to be computed
        in (bfloat16, TF32) must not reach them.
        """
        features = features.double()
        if self.normalise:
            features = F.normalize(features, dim=-1)
        logits = self.scale * features @ self.weights.to(features).T
        return (logits if self.bias is None else logits + self.bias.to(features)).float()

    def logits_in_pieces(self, features: Tensor) -> Tensor:
        """The same of many images, whose copies in float64 would be four times as large as they are."""
        return torch.cat([self.logits(piece) for piece in features.split(_AT_ONCE)])

    def probabilities(self, features: Tensor) -> Tensor:
        return self.logits_in_pieces(features).softmax(dim=-1)

    def cpu(self) -> "LinearClassifier":
        return replace(self, weights=self.weights.cpu(), bias=None if self.bias is None else self.bias.cpu())

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As named tensors, for a safetensors file that may hold several classifiers."""
        found = {
            f"{name}.weights": self.weights,
            f"{name}.scale": torch.tensor(self.scale, dtype=torch.float64),
            f"{name}.normalise": torch.tensor(self.normalise),
        }
        return found if self.bias is None else found | {f"{name}.bias": self.bias}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], name: str) -> "LinearClassifier":
        try:
            return cls(
                weights=tensors[f"{name}.weights"],
                scale=tensors[f"{name}.scale"].item(),
                bias=tensors.get(f"{name}.bias"),
                normalise=bool(tensors[f"{name}.normalise"].item()),
            )
        except KeyError as error:
            raise ArtifactError(f"classifier {name} lacks {error}: write the artefact again") from None

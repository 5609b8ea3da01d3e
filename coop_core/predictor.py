"""Predictor: an artefact and its backbone -> labels and probabilities for images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from coop_core.artifact import Artifact, check_backbone, read_artifact, restore_learner
from coop_core.backbone import Backbone
from coop_core.classifier import LinearClassifier
from coop_core.errors import ArtifactError


@dataclass(frozen=True)
class Prediction:
    labels: tuple[str, ...]
    """Class names, the most probable first."""
    probabilities: tuple[float, ...]


class Predictor:
    """One image pass and one matrix product an image; the text tower is needed only for other classes."""

    def __init__(self, artifact: Artifact, backbone: Backbone, class_names: Sequence[str] | None = None) -> None:
        """Answer with the artefact's own classes, or re-bind its shared context to `class_names`.

        Raises
        ------
        ArtifactError
            For another backbone, or class-specific context with other classes.
        """
        check_backbone(artifact, backbone)
        self.backbone = backbone
        self.class_names = tuple(class_names or artifact.class_names)
        if artifact.class_weights is not None and self.class_names == artifact.class_names:
            self._classifier = artifact.class_weights
        else:
            learner = restore_learner(artifact, backbone, self.class_names)
            with torch.no_grad():
                weights = learner.class_weights()
            if weights is None:
                raise ArtifactError("this method's classifier depends on the image, which serving does not know yet")
            self._classifier = LinearClassifier(weights, scale=backbone.logit_scale)

    @classmethod
    def load(
        cls, folder: Path, *, class_names: Sequence[str] | None = None, device: torch.device | str = "cpu"
    ) -> "Predictor":
        """From an artefact's folder, with the backbone that its card names."""
        artifact = read_artifact(folder)
        return cls(artifact, artifact.load_backbone(device=device), class_names)

    def predict(self, images: Sequence[Image.Image], *, top: int | None = None) -> list[Prediction]:
        """Upright RGB images -> the `top` most probable classes of each (all of them by default)."""
        pixels = np.stack([self.backbone.transform.test_view(image) for image in images])
        features = self.backbone.encode_images(torch.from_numpy(pixels))
        ranked = self._classifier.probabilities(features).sort(dim=-1, descending=True, stable=True)
        return [
            Prediction(tuple(self.class_names[i] for i in labels[:top]), tuple(probabilities[:top]))
            for labels, probabilities in zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True)
        ]

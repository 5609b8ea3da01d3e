"""Portable: an artefact -> one module from pixels to probabilities, for any number of images, without this product.

What an artefact collapses to is written as one matrix product. Heads that answer by more than that (prolip,
tip_adapter) are written as they are. A prompt for every image is not: the text tower would have to go with it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coop_core.artifact import Artifact, restore_learner
from coop_core.backbone import Backbone
from coop_core.errors import ArtifactError
from coop_core.judging.classifier import LinearClassifier
from coop_core.prompts.engine import Engine

OUTPUTS = ("probabilities", "features")


class Portable(nn.Module):
    """Normalised pixels (n, 3, size, size) -> probabilities (n, c) and what they are told from, float32: image features
    (n, d), or, for a method that learned the tower's last linear map, what comes before it (n, p)."""

    def __init__(self, tower: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.tower, self.head = tower, head

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.tower(pixels)
        return self.head(features), features


class LinearHead(nn.Module):
    """A linear classifier's probabilities at a temperature.

    Class weights are centred first, in float64: what all classes have in common is no part of a softmax, and without
    it float32 has more digits for what tells them apart.
    """

    weights: Tensor
    bias: Tensor

    def __init__(self, classifier: LinearClassifier, *, temperature: float) -> None:
        super().__init__()
        self.normalise = classifier.normalise
        weights = classifier.weights.double() * (classifier.scale / temperature)
        bias = torch.zeros(len(weights)) if classifier.bias is None else classifier.bias
        bias = bias.double() / temperature
        self.register_buffer("weights", (weights - weights.mean(dim=0)).float())  # (c, d)
        self.register_buffer("bias", (bias - bias.mean()).float())                # (c,)

    def forward(self, features: Tensor) -> Tensor:
        if self.normalise:
            features = F.normalize(features, dim=-1)
        return F.linear(features, self.weights, self.bias).softmax(dim=-1)


class OwnHead(nn.Module):
    """The probabilities of a method that answers itself, from features."""

    def __init__(self, learner: nn.Module, *, temperature: float) -> None:
        super().__init__()
        self.learner, self.temperature = learner, temperature

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.learner.logits(features)                            # type: ignore[operator]
        return (logits / self.temperature).softmax(dim=-1)


class _OwnTower(nn.Module):
    """The image tower of a method that reads pixels."""

    def __init__(self, learner: nn.Module) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.learner.features(pixels)                          # type: ignore[operator]
        return features


def portable(artifact: Artifact, backbone: Backbone) -> Portable:
    """The artefact's answers for its own classes as one module on the CPU.

    Raises
    ------
    ArtifactError
        For another backbone, images in half precision, and methods with a prompt an image.
    """
    name = artifact.card["method"].get("name")
    if backbone.image_precision != "float32":
        raise ArtifactError(f"the artefact's images are encoded in {backbone.image_precision}, which no exported model "
                            "can repeat: train with backbone.image_precision: float32")  # fmt: skip
    if artifact.reads == "features" and artifact.classifier is not None:
        return Portable(backbone.image_tower, LinearHead(artifact.classifier, temperature=artifact.temperature)).eval()
    learner = restore_learner(artifact, backbone, engine=Engine(path="full"))     # by operators that others have too
    assert isinstance(learner, nn.Module)
    if getattr(learner, "prompts_per_image", 0):
        raise ArtifactError(f"{name} encodes a prompt a class for every image, so neither class weights nor a model of "
                            "its image tower can answer for it: serve it with `coop serve`, or train coop")  # fmt: skip
    tower = _OwnTower(learner) if artifact.reads == "pixels" else backbone.image_tower
    if artifact.reads == "unprojected" and backbone.projection is not None:
        tower = backbone.projection.tower
    head = (OwnHead(learner, temperature=artifact.temperature) if artifact.classifier is None
            else LinearHead(artifact.classifier, temperature=artifact.temperature))  # fmt: skip
    return Portable(tower, head).eval()

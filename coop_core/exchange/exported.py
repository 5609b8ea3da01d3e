"""Exported: an artefact, its backbone and real images -> a folder that answers without this product, checked first.

    model.onnx               pixels -> probabilities and image features
    model.xml, model.bin     the same for OpenVINO
    answer.json              labels, threshold and how pixels are made: all that a reader needs besides
    card.json                the artefact's card, as it is

or, of the class weights alone, `class_weights.safetensors` and `class_weights.npz` in place of the models.
docs/export.md has readers of twenty lines.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coop_core.answering import answerer, encoded
from coop_core.artifact import Artifact
from coop_core.backbone import Backbone, backbone_name
from coop_core.conversion import FLOAT32, INPUT, Runtime, onnx_runtime, openvino_runtime, write_onnx, write_openvino
from coop_core.data.images import read_image
from coop_core.errors import ArtifactError
from coop_core.exchange.portable import OUTPUTS, portable
from coop_core.files import whole_folder, write_arrays, write_json, write_tensors
from coop_core.judging.classifier import LinearClassifier

TOLERANCE = 1e-4
"""How far a probability may be from what `coop predict` says."""
_TOGETHER = 16
"""Images that are answered at once while checking; the first is answered alone."""


@dataclass(frozen=True)
class Exported:
    files: dict[str, int]
    """Bytes by name."""
    images: int
    differences: dict[str, float]
    """The largest difference of a probability, by what answered."""


def export_model(artifact: Artifact, backbone: Backbone, folder: Path, *, images: Sequence[Path]) -> Exported:
    """Write both models into `folder`, once they answer `images` as the artefact does.

    Raises
    ------
    ArtifactError
        For a method that no model of one image pass can answer for, a folder with other files in it, and a model that
        answers an image otherwise; nothing is written then.
    DatasetError
        For an image that cannot be read.
    """
    module = portable(artifact, backbone)
    asked = _Asked.of(artifact, backbone, images)
    with _folder(folder, artifact, _about_model(artifact, backbone)) as made:
        size = backbone.transform.size
        write_onnx(module, made / "model.onnx", example=torch.zeros(2, 3, size, size), outputs=OUTPUTS)
        write_openvino(made / "model.onnx", made / "model.xml")
        found = {"ONNX Runtime": asked.check(onnx_runtime(made / "model.onnx"), by="ONNX Runtime"),
                 "OpenVINO": asked.check(openvino_runtime(made / "model.xml"), by="OpenVINO")}  # fmt: skip
    return Exported(_sizes(folder), len(images), found)


def export_weights(artifact: Artifact, backbone: Backbone, folder: Path, *, images: Sequence[Path]) -> Exported:
    """Write the class weights alone, for whoever computes image features already; checked as `export_model` is.

    Raises
    ------
    ArtifactError
        For a method without class weights, or whose weights belong to an image tower of its own; else as there.
    """
    name, classifier = artifact.card["method"].get("name"), artifact.classifier
    if classifier is None or artifact.reads != "features":
        why = "answers by more than class weights" if classifier is None else "changes the image tower as well"
        raise ArtifactError(f"{name} {why}, so they alone answer nothing: export without --only")
    asked = _Asked.of(artifact, backbone, images)
    arrays = {"weights": classifier.weights.numpy()}
    if classifier.bias is not None:
        arrays["bias"] = classifier.bias.numpy()
    about = _about_weights(artifact, backbone, classifier)

    def answer(pixels: np.ndarray) -> dict[str, np.ndarray]:
        features = backbone.encode_images(torch.from_numpy(pixels)).cpu().numpy()
        return {"probabilities": from_weights(features, arrays, about)}

    with _folder(folder, artifact, about) as made:
        write_tensors(made / "class_weights.safetensors", {key: torch.from_numpy(one) for key, one in arrays.items()})
        write_arrays(made / "class_weights.npz", arrays)
        found = {"NumPy": asked.check(answer, by="NumPy")}
    return Exported(_sizes(folder), len(images), found)


def from_weights(features: np.ndarray, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> np.ndarray:
    """Image features (n, d), class weights and what `answer.json` says -> probabilities (n, c).

    It is what docs/export.md tells readers to compute, and imports nothing of this product.
    """
    features = features.astype(np.float64)
    if about["normalise"]:
        features = features / np.linalg.norm(features, axis=1, keepdims=True)
    logits = (about["logit_scale"] * features @ arrays["weights"].T + arrays.get("bias", 0)) / about["temperature"]
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class _Asked:
    """Images, and what the artefact answers."""

    images: Sequence[Path]
    pixels: np.ndarray
    """(n, 3, size, size)"""
    probabilities: np.ndarray
    """(n, c)"""
    class_names: tuple[str, ...]
    threshold: float

    @classmethod
    def of(cls, artifact: Artifact, backbone: Backbone, images: Sequence[Path]) -> "_Asked":
        if not images:
            raise ArtifactError("an export is checked on real images, and there are none: name some with --images")
        pixels = np.stack([backbone.transform.test_view(read_image(path)) for path in images])
        own = answerer(artifact, backbone=backbone)
        read = [torch.from_numpy(some) for some in _in_pieces(pixels)]
        said = [own.probabilities(encoded(some, backbone, reads=own.reads)) for some in read]
        return cls(images, pixels, torch.cat(said).cpu().numpy(), own.class_names, own.threshold)

    def check(self, runtime: Runtime | Callable[[np.ndarray], dict[str, np.ndarray]], *, by: str) -> float:
        """The largest difference of a probability; ArtifactError where an answer is another one."""
        found = np.concatenate([runtime(some)["probabilities"] for some in _in_pieces(self.pixels)])
        for image, own, its in zip(self.images, self.probabilities, found, strict=True):
            if not (np.abs(own - its).max() <= TOLERANCE and self._answer(own) == self._answer(its)):
                raise ArtifactError(f"nothing was exported: {by} answers {image} with {self._words(its)}, and the "
                                    f"artefact with {self._words(own)}; --only weights may do")  # fmt: skip
        return float(np.abs(self.probabilities - found).max())

    def _answer(self, row: np.ndarray) -> int | None:
        return int(row.argmax()) if row.max() >= self.threshold else None

    def _words(self, row: np.ndarray) -> str:
        unsure = ", no answer" if self._answer(row) is None else ""
        return f"{self.class_names[int(row.argmax())]} ({row.max():.5f}{unsure})"


def _in_pieces(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """One image, and then several at once: a model must answer any number."""
    yield pixels[:1]
    for start in range(1, len(pixels), _TOGETHER):
        yield pixels[start : start + _TOGETHER]


def _about_model(artifact: Artifact, backbone: Backbone) -> dict[str, Any]:
    return {
        **_about(artifact, backbone),
        "models": {"onnx": "model.onnx", "openvino": "model.xml"},
        "openvino_options": FLOAT32,
        "input": INPUT,
        "outputs": list(OUTPUTS),
        "inside": {"temperature": artifact.temperature, "logit_scale": backbone.logit_scale},
    }


def _about_weights(artifact: Artifact, backbone: Backbone, classifier: LinearClassifier) -> dict[str, Any]:
    return {
        **_about(artifact, backbone),
        "normalise": classifier.normalise,
        "logit_scale": classifier.scale,
        "temperature": artifact.temperature,
    }


def _about(artifact: Artifact, backbone: Backbone) -> dict[str, Any]:
    return {
        "schema": 1,
        "labels": list(artifact.class_names),
        "threshold": artifact.threshold,
        "pixels": asdict(backbone.transform),
        "backbone": backbone_name(backbone.architecture, backbone.pretrained, "float32"),
    }


@contextmanager
def _folder(folder: Path, artifact: Artifact, about: dict[str, Any]) -> Iterator[Path]:
    """The folder to write models into; what stands beside them is written when they are."""
    with whole_folder(folder, marker="answer.json") as made:
        yield made
        write_json(made / "card.json", artifact.card)
        write_json(made / "answer.json", about)


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}

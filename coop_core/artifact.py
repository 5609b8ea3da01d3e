"""The artefact: what a method learned, with its card -> a folder of safe files, and back.

    context.safetensors          the learned state: context_vectors, and what else the method learned
    class_weights.safetensors    the classifier it collapses to for the classes it was trained on
    card.json                    what made it, by digest; loading checks all of it
    reference.safetensors        of a registered version: what it saw of its test images (`reference`)
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from coop_core.backbone import Backbone, backbone_name, digest_tensors, is_installed, load_backbone
from coop_core.card import SCHEMA, CardFields
from coop_core.data.dataset import words
from coop_core.data.views import ImageTransform
from coop_core.errors import ArtifactError
from coop_core.features.extract import key_of
from coop_core.files import digest_json, read_json, read_tensors, write_json, write_tensors
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Learner, Reads, Task, load_method, method_names
from coop_core.methods.learner import collapsed
from coop_core.prompts.engine import Engine

log = logging.getLogger(__name__)

_READABLE = (1, 2)
"""Cards of schema 1 do not carry a digest of themselves."""


@dataclass(frozen=True)
class Artifact:
    card: dict[str, Any]
    state: dict[str, Tensor]
    classifier: LinearClassifier | None
    """What it collapses to for its own classes; None where the answer to an image needs the method itself."""

    def __repr__(self) -> str:
        """For people: tensors and card would fill pages."""
        backbone, data = self.card["backbone"], self.card.get("data", {})
        learned = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.state.items())
        return (f"Artifact({self.card['method'].get('name')!r} on {backbone['architecture']}, {len(self.class_names)} "
                f"classes of {data.get('name')!r}: {learned or 'nothing learned'})")  # fmt: skip

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.card["class_names"])

    def load_backbone(self, *, device: torch.device | str = "cpu") -> Backbone:
        """The backbone that the card names; BackboneError when it cannot be had.

        In float32, torch takes the place of a runtime that is not installed: features are the same but for rounding.
        """
        ours = self.card["backbone"]
        precision, runtime = ours.get("image_precision", "float32"), ours.get("image_runtime", "torch")
        if precision == "float32" and not is_installed(runtime):
            log.info("%s is not installed, so torch computes the image tower: answers may differ by rounding", runtime)
            runtime = "torch"
        return load_backbone(
            ours["architecture"], ours["pretrained"], image_precision=precision, image_runtime=runtime, device=device
        )

    @property
    def temperature(self) -> float:
        """What logits of its own classes are divided by."""
        return float(self.card.get("answering", {}).get("temperature", 1.0))

    @property
    def threshold(self) -> float:
        """The least confidence that is an answer among its own classes."""
        return float(self.card.get("answering", {}).get("threshold", 0.0))

    @property
    def reads(self) -> Reads:
        """What its method reads."""
        name = self.card["method"].get("name")
        return load_method(name).Params.reads if name in method_names() else "features"

    @property
    def feature_key(self) -> str:
        """`features.feature_key` of the backbone that the card names."""
        ours = self.card["backbone"]
        return key_of(ours["weights_digest"], self.transform, folded=ours.get("batch_norm_folded", False),
                      projected_apart=ours.get("projected_apart", False),
                      runtime=ours.get("image_runtime", "torch"))  # fmt: skip

    @property
    def transform(self) -> ImageTransform:
        constants = dict(self.card["backbone"]["transform"])
        mean, std = tuple(constants.pop("mean")), tuple(constants.pop("std"))
        return ImageTransform(mean=mean, std=std, **constants)


def write_artifact(folder: Path, learner: Learner, card: dict[str, Any]) -> None:
    """Write what was learned, with its card."""
    copy_artifact(Artifact(card, learner.state_dict(), collapsed(learner)), folder)


def copy_artifact(artifact: Artifact, folder: Path) -> None:
    """Write the three files; the card comes last, so that a folder with a card is whole."""
    digests = {"context": digest_tensors(artifact.state)}
    write_tensors(folder / "context.safetensors", artifact.state)
    if artifact.classifier is not None:
        tensors = artifact.classifier.tensors("classifier")
        digests["class_weights"] = digest_tensors(tensors)
        write_tensors(folder / "class_weights.safetensors", tensors)
    write_card(folder, {**artifact.card, "digests": digests})


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write a card with the digest of all that it says; whoever adds to a card writes it so."""
    write_json(folder / "card.json", {**card, "digests": {**card["digests"], "card": _card_digest(card)}})


def _card_digest(card: dict[str, Any]) -> str:
    """Of the whole card but the digest itself."""
    return digest_json({**card, "digests": {**card["digests"], "card": None}})


def read_artifact(folder: Path) -> Artifact:
    """Read and check an artefact.

    Raises
    ------
    ArtifactError
        When a file is missing, damaged, of another schema, or not the one the card was written for.
    """
    card = read_json(folder / "card.json")
    if not isinstance(card, dict) or card.get("schema") not in _READABLE:
        raise ArtifactError(f"{folder}/card.json is not a card of schema {SCHEMA}: train again with `dvc repro`")
    try:
        CardFields.model_validate(card)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
        raise ArtifactError(f"{folder}/card.json is not whole ({faults}): restore it, or train again") from None
    digests = card["digests"]
    if card["schema"] != 1 and digests.get("card") != _card_digest(card):
        raise ArtifactError(f"{folder}/card.json was changed after it was written (its class names, method or backbone "
                            "may be wrong): restore it, or train again")  # fmt: skip
    state, _ = read_tensors(folder / "context.safetensors")
    _check_digest(folder / "context.safetensors", state, digests.get("context"))
    classifier = None
    if "class_weights" in digests:
        tensors, _ = read_tensors(folder / "class_weights.safetensors")
        _check_digest(folder / "class_weights.safetensors", tensors, digests["class_weights"])
        classifier = LinearClassifier.from_tensors(tensors, "classifier")
        if len(classifier.weights) != len(card["class_names"]):
            raise ArtifactError(f"{folder}: class_weights.safetensors and the card's class names differ in number")
    return Artifact(card, state, classifier)


def check_backbone(artifact: Artifact, backbone: Backbone) -> None:
    """What was learned means nothing on other weights or other pixels: refuse it.

    Raises
    ------
    ArtifactError
    """
    ours = artifact.card["backbone"]
    if ours["weights_digest"] != backbone.weights_digest:
        name = backbone_name(ours["architecture"], ours["pretrained"], ours.get("image_precision", "float32"))
        raise ArtifactError(
            f"the artefact was learned on {name} with weights {ours['weights_digest'][:12]}, but this is "
            f"{backbone.name} with weights {backbone.weights_digest[:12]}: load the backbone it was learned on"
        )
    runtime = ours.get("image_runtime", "torch")
    if runtime != backbone.image_runtime and backbone.image_precision != "float32":
        raise ArtifactError(
            f"the artefact was learned on images that {runtime} computed in {backbone.image_precision}, but this is "
            f"{backbone.image_runtime}, whose features differ by hundredths: set backbone.image_runtime: {runtime}"
        )
    if artifact.transform != backbone.transform:
        raise ArtifactError(
            f"the artefact was learned on images prepared by {artifact.transform}, but {backbone.name} "
            f"prepares them by {backbone.transform}: load the backbone it was learned on"
        )
    if ours.get("transform_digest", backbone.transform.digest) != backbone.transform.digest:
        log.warning("the artefact was learned with another version of the image preparation, so answers may "
                    "differ a little: train again to be sure")  # fmt: skip


def restore_learner(
    artifact: Artifact,
    backbone: Backbone,
    class_names: Sequence[str] | None = None,
    *,
    template: str | None = None,
    engine: Engine | None = None,
) -> Learner:
    """The trained method again, for its own classes or re-bound to others.

    `template` is what methods that read class texts write other classes in; by default it is the artefact's own.

    Raises
    ------
    ArtifactError
        For another backbone, an unknown method, or class-specific context with other classes.
    """
    check_backbone(artifact, backbone)
    params = artifact.card["method"]
    if params.get("name") not in method_names():
        raise ArtifactError(f"the artefact's method {params.get('name')!r} is not in this version of the product")
    module = load_method(params["name"])
    wanted, own = tuple(map(words, class_names or artifact.class_names)), artifact.card.get("template")
    rebound = wanted != artifact.class_names
    try:
        learner: Learner = module.build(
            module.Params.model_validate(params),
            backbone=backbone,
            task=Task(wanted, (rebound and template) or own or "a photo of a {}."),
            generator=torch.Generator().manual_seed(0),
            engine=engine,
            state=artifact.state,
            rebound=rebound,
        )
    except ValidationError as error:
        raise ArtifactError(f"the artefact's method parameters are not valid: {error.errors()[0]['msg']}") from None
    if not learner.rebinds and rebound:
        raise ArtifactError(
            f"this artefact learned something of its own for each of {', '.join(artifact.class_names[:5])}..., so it "
            "cannot be used with other classes: train coop with method.class_specific: false, cocoop, prolip or gda"
        )
    _load_state(learner, artifact.state)
    return learner


def _load_state(learner: Learner, state: dict[str, Tensor]) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in learner.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if own != given:
        raise ArtifactError(f"context.safetensors holds {given}, but the method expects {own}: train again")
    learner.load_state_dict(state)


def _check_digest(path: Path, tensors: dict[str, Tensor], expected: str | None) -> None:
    if digest_tensors(tensors) != expected:
        raise ArtifactError(f"{path} is not the file its card was written for: restore it, or train again")

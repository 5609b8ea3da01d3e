"""Proof: a registered version -> it can answer, or why not; asked before it may become champion.

Without the backbone, which may be gigabytes elsewhere: what was learned is whole, finite and of a known method, and
where it collapsed to a classifier, that answers.
"""

import tempfile
from pathlib import Path

import torch
from pydantic import ValidationError

from coop_core.answering import answerer
from coop_core.artifact import Artifact, read_artifact
from coop_core.errors import ArtifactError, GateError
from coop_core.methods import load_method, method_names
from pipelines.records.registry import RegisteredVersion, fetch_prompt
from pipelines.records.server import Records


def require_answers(version: RegisteredVersion, records: Records) -> None:
    """The version's artefact comes from the registry whole and can answer.

    Raises
    ------
    GateError
        With the reason why it cannot.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            prove(read_artifact(fetch_prompt(f"{records.model}/{version.number}", records, Path(folder))))
        except ArtifactError as error:
            raise GateError(f"version {version.number} cannot answer, so it cannot be champion: {error}") from None


def prove(artifact: Artifact) -> None:
    """As much as can be told of an artefact without its backbone.

    Raises
    ------
    ArtifactError
    """
    method = artifact.card["method"].get("name")
    if method not in method_names():
        raise ArtifactError(f"its method {method!r} is not in this version of the product")
    try:
        load_method(method).Params.model_validate(artifact.card["method"])
    except ValidationError as error:
        raise ArtifactError(f"its parameters of {method} are not valid: {error.errors()[0]['msg']}") from None
    shapes = {name: list(tensor.shape) for name, tensor in artifact.state.items()}
    if artifact.card.get("learned", shapes) != shapes:
        raise ArtifactError(f"context.safetensors holds {shapes}, but its card says {artifact.card['learned']}")
    for name, tensor in artifact.state.items():
        if not tensor.isfinite().all():
            raise ArtifactError(f"{name} in context.safetensors holds values that are no numbers")
    if artifact.classifier is not None:
        blank = torch.zeros(1, artifact.classifier.weights.shape[1])                # (1, d)
        if not answerer(artifact).probabilities(blank).isfinite().all():
            raise ArtifactError("class_weights.safetensors holds values that are no numbers")

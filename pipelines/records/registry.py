"""Registry: versions, their aliases and tags, and the champion's history."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coop_core.errors import ArtifactError, GateError
from pipelines.records.claims import Claim
from pipelines.records.local_versions import find_locally
from pipelines.records.server import Records

log = logging.getLogger(__name__)

CANDIDATE, CHAMPION = "candidate", "champion"
GATE = "gate"
"""Tag of a version: what the gate said last, passed or refused."""
_EVENT = "promotion."
"""Tags of the registered model that start so hold its history."""
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")
"""MLflow's codes for what is not in the registry."""


def fetch_prompt(reference: str, records: Records, target: Path) -> Path:
    """`name@alias` or `name/version` in the registry -> the artefact's folder to read from, in `target` where it had to
    be downloaded."""
    missing = f"no model {reference} in the registry at {records.address}"
    if not re.fullmatch(r"(models:/)?[^/@:\s]+(@[^/@:\s]+|/\d+)", reference):
        raise ArtifactError(f"{missing}: write NAME@ALIAS or NAME/VERSION")
    folder = find_locally(reference, records.settings) or _download(reference, records, target, missing=missing)
    cards = sorted(folder.glob("artifacts/*/card.json"))
    if not cards:
        raise ArtifactError(f"model {reference} holds no prompt artefact: it was not registered by this product")
    return cards[0].parent


def _download(reference: str, records: Records, target: Path, *, missing: str) -> Path:
    """The model's whole folder by MLflow's client."""
    with records.asked():
        import mlflow
        from mlflow.exceptions import MlflowException

        try:
            uri = f"models:/{reference.removeprefix('models:/')}"
            return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(target)))
        except MlflowException as error:
            if error.error_code not in MISSING:
                raise
            raise ArtifactError(f"{missing}: {' '.join(str(error).split())[:200]}") from None


@dataclass(frozen=True)
class RegisteredVersion:
    number: str
    run_id: str
    gate: str | None = None
    """What the gate said last: passed, refused, declined by a person, not comparable, or nothing yet."""


def find_version(reference: str, records: Records) -> RegisteredVersion | None:
    """An alias or a number among the registered versions, or None."""
    with records.asked() as client:
        from mlflow.exceptions import MlflowException

        name = records.model
        try:
            by = client.get_model_version if reference.isdigit() else client.get_model_version_by_alias
            found = by(name, reference)
        except MlflowException as error:
            if error.error_code not in MISSING:
                raise
            return None
    return RegisteredVersion(str(found.version), found.run_id, dict(found.tags).get(GATE))


def fetch_evaluation(version: RegisteredVersion, records: Records, target: Path) -> Path:
    """What the version's run recorded of its test images -> a folder below `target`.

    Raises
    ------
    GateError
        When it recorded nothing, as for a prompt that was imported.
    """
    with records.asked() as client:
        import mlflow

        if not client.list_artifacts(version.run_id, "evaluation"):
            raise GateError(f"version {version.number} has no answers to test images on record, so the gate cannot "
                            "judge it: train and evaluate one on the project's images with `dvc repro`")  # fmt: skip
        uri = f"runs:/{version.run_id}/evaluation"
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(target)))


def set_champion(version: RegisteredVersion, event: dict[str, Any], records: Records, claim: "Claim") -> None:
    """Write the event down, move the alias if the claim still holds, and write down that it was carried out.

    So no champion changes without a record, and what was cut short is told from what somebody undid by hand.
    """
    with records.asked() as client:
        from mlflow.exceptions import MlflowException

        name = records.model
        text = json.dumps(event, indent=1)
        client.log_text(version.run_id, text, f"promotion/{event['time']}.json")
        tag, short = f"{_EVENT}{event['time']}", {key: value for key, value in event.items() if key != "decision"}
        client.set_registered_model_tag(name, tag, json.dumps(short | {"carried_out": False}))
        claim.confirm()
        client.set_registered_model_alias(name, CHAMPION, version.number)
        try:
            client.set_registered_model_tag(name, tag, json.dumps(short | {"carried_out": True}))
        except MlflowException as error:  # the champion has changed, and its alias says so until the next change
            log.warning("the champion changed, but its record could not be completed: %s", error)


def mark_judged(number: str, word: str, records: Records) -> None:
    """Say with a version what came of its judgement, so that it is not asked for again."""
    with records.asked() as client:
        client.set_model_version_tag(records.model, number, GATE, word)


def record_decision(version: RegisteredVersion, time: str, decision: dict[str, Any], records: Records) -> None:
    """Keep what the gate said with the version's run, and in one word with the version."""
    with records.asked() as client:
        client.log_text(version.run_id, json.dumps(decision, indent=1), f"gate/{time}.json")
        word = "passed" if decision["promote"] else "refused"
        client.set_model_version_tag(records.model, version.number, GATE, word)


def list_events(records: Records) -> list[dict[str, Any]]:
    """Every time the champion was to change, oldest first; older versions did not record `carried_out`."""
    with records.asked() as client:
        models = client.search_registered_models(f"name = '{records.model}'")
    tags = models[0].tags if models else {}
    return [json.loads(tags[key]) for key in sorted(tags) if key.startswith(_EVENT)]

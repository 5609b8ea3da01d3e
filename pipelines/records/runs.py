"""Runs: a finished `dvc repro`'s files -> an MLflow run and a registered version; and back as a table."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.links import fragment, page, run_route
from pipelines.records.names import name_after
from pipelines.records.registry import CANDIDATE, MISSING
from pipelines.records.served import log_model
from pipelines.records.server import (
    Records,
    compare_page,
    heartbeat,
    signs_of_life,
)

log = logging.getLogger(__name__)

_REPORT = "report/report.html"
_MODEL_DESCRIPTION = """\
Classifiers of images, learned from a few labelled images a class. Every version is what one `dvc repro` made: its
description says what it answers and how well, its tags name the images and the code by digest and revision, and its
artifact `card.json` says all that made it.

- `@candidate` is what was tracked last. `coop promote` judges it.
- `@champion` is what passed and answers. `coop history` tells every change of it, and `coop rollback` takes one back.
"""


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
    note: str
    """Of the run, in Markdown; `track` adds where the report and the version are."""
    description: str
    """Of the model version, in Markdown; `track` adds where the report is."""
    version_tags: dict[str, str]
    """Of the version alone; it has the run's as well."""


@dataclass(frozen=True)
class DatasetInput:
    name: str
    context: str
    digest: str
    source: str | None
    """Where it is published; None when nowhere."""
    rows: dict[str, list[Any]]


def track(record: RunRecord, records: Records) -> Tracked:
    """Record a run and register its context vectors as a version with the alias `candidate`.

    The version is registered only after everything is uploaded, and the alias is set last, so that a kill
    leaves no half-written version in anybody's way; the next call makes a new record.
    """
    with records.asked(way_out=", then run `dvc repro`: only this stage is left to do") as client:
        import mlflow

        experiment_id = records.find_experiment(client, records.experiment)
        settings = records.settings
        name = settings.registered_model or name_after(record.tags["dataset"], project=settings.project_name)
        earlier = _find(client, experiment_id, record.key, name)
        if earlier is not None:
            log.info("this run is on record already: %s", earlier.info.run_id)
            number = earlier.data.tags["coop.version"]
            client.set_registered_model_alias(name, CANDIDATE, number)  # other runs may have come between
            return Tracked(earlier.info.run_id, experiment_id, name, number)
        tags = {**record.tags, "coop.key": record.key, **signs_of_life()}
        with (
            mlflow.start_run(experiment_id=experiment_id, run_name=record.name, tags=tags) as run,
            heartbeat(records, [run.info.run_id]),
        ):
            return _record_and_register(client, run.info, record, name)


def _record_and_register(client: Any, run: Any, record: RunRecord, name: str) -> Tracked:
    import mlflow

    _log(client, run.run_id, record)
    model = log_model(mlflow, record.prompt)
    registered = mlflow.register_model(model.model_uri, name, tags=record.tags | record.version_tags)
    tracked = Tracked(run.run_id, run.experiment_id, name, str(registered.version))
    _describe(client, tracked, record)
    mlflow.log_metrics(record.metrics, model_id=model.model_id)
    mlflow.set_tags({"coop.model": name, "coop.version": tracked.model_version})
    client.set_registered_model_alias(name, CANDIDATE, tracked.model_version)
    return tracked


def _describe(client: Any, tracked: Tracked, record: RunRecord) -> None:
    """What the pages of the run, its version and the model say; links stay within MLflow, whatever its address."""
    run = run_route(tracked.experiment_id, tracked.run_id)
    name, number = tracked.model_name, tracked.model_version
    report = f"[The report]({fragment(f'{run}/artifacts/{_REPORT}')}) is the run's artifact `{_REPORT}`."
    version = f"Registered as [{name} version {number}]({fragment(f'models/{name}/versions/{number}')})."
    client.set_tag(tracked.run_id, "mlflow.note.content", f"{record.note}\n\n{report} {version}")
    client.update_model_version(name, number, description=f"{record.description}\n\n{report}")
    if not client.get_registered_model(name).description:  # what a person wrote there stays
        client.update_registered_model(name, _MODEL_DESCRIPTION)


def run_link(tracked: Tracked, records: Records) -> str:
    """The run's page; of the page that `make ui` opens when there is no server."""
    return page(records.settings, run_route(tracked.experiment_id, tracked.run_id))


def compare_link(rows: list[dict[str, Any]], records: Records) -> str:
    """The page on which MLflow compares the runs of `list_runs`."""
    experiments = sorted({row["experiment_id"] for row in rows})
    return compare_page(records.settings, [row["run_id"] for row in rows], experiments)


def list_runs(records: Records, *, limit: int) -> list[dict[str, Any]]:
    """Finished runs, the newest first: tags, metrics and the registered version."""
    with records.asked() as client:
        experiment = client.get_experiment_by_name(records.experiment)
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


def tie_run(run_id: str, tags: dict[str, str], lock: Path, records: Records) -> None:
    """Tie a run and its version to what made them: tags on both, and dvc.lock as it was when all was done."""
    with records.asked() as client:
        client.log_artifact(run_id, str(lock))
        own = client.get_run(run_id).data.tags
        for name, value in tags.items():
            client.set_tag(run_id, name, value)
            if "coop.version" in own:
                model = own.get("coop.model") or records.model
                client.set_model_version_tag(model, own["coop.version"], name, value)


def is_tied(run_id: str, records: Records) -> bool:
    """Whether `tie_run` was carried out for a run, or can not be: the run is in another server's records."""
    with records.asked() as client:
        from mlflow.exceptions import MlflowException

        try:
            return "dvc_lock" in client.get_run(run_id).data.tags
        except MlflowException as error:
            if error.error_code not in MISSING:
                raise
            return True


def _find(client: Any, experiment_id: str, key: str, name: str) -> Any:
    """The finished run with this key whose version is still in the registry, under this name."""
    from mlflow.exceptions import MlflowException

    runs = client.search_runs([experiment_id], f"attributes.status = 'FINISHED' and tags.`coop.key` = '{key}'")
    for run in runs:
        if run.data.tags.get("coop.model") != name:  # under another, or never registered
            continue
        try:
            client.get_model_version(run.data.tags["coop.model"], run.data.tags["coop.version"])
        except MlflowException as error:  # registered, and deleted since
            if error.error_code not in MISSING:
                raise
            continue
        return run
    return None


def _log(client: Any, run_id: str, record: RunRecord) -> None:
    import mlflow
    import pandas as pd
    from mlflow.data.pandas_dataset import from_pandas
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
        source: Any = data.source                                                 # None where it is published nowhere
        dataset = from_pandas(frame, source=source, name=data.name, digest=data.digest[:36])
        mlflow.log_input(dataset, context=data.context, tags={"sha256": data.digest})
    mlflow.log_table(pd.DataFrame(record.per_class), "per_class.json")
    for path, folder in record.files:
        log_any = mlflow.log_artifacts if path.is_dir() else mlflow.log_artifact
        log_any(str(path), folder or None)

"""Watches: looks at what the champion is sent -> MLflow runs in an experiment of their own, and the last one back."""

import time
from dataclasses import dataclass
from pathlib import Path

from pipelines.records.server import Records, pages

_VERSION, _NEWEST, _ALARM = "coop.watched_run", "coop.newest_record", "coop.alarm"


@dataclass(frozen=True)
class LastLook:
    """Of a version."""

    newest: float
    """When the newest image was answered that any look saw, in seconds since 1970."""
    alarm: float
    """When the last alarm was raised; 0 without one."""


def last_look(records: Records, *, version_run: str) -> LastLook | None:
    """What is on record of the looks at a version, which MLflow's run made; None before the first."""
    with records.asked() as client:
        experiment = client.get_experiment_by_name(records.watches)
        if experiment is None:
            return None
        wanted = f"attributes.status = 'FINISHED' and tags.`{_VERSION}` = '{version_run}'"
        tags = [run.data.tags for run in pages(client, experiment.experiment_id, wanted)]
    if not tags:
        return None
    return LastLook(max(float(its[_NEWEST]) for its in tags), max(float(its[_ALARM]) for its in tags))


def log_look(
    records: Records,
    *,
    name: str,
    version_run: str,
    newest: float,
    alarm: bool,
    tags: dict[str, str],
    metrics: dict[str, float],
    note: str,
    folder: Path,
) -> str:
    """A finished run with the files of a folder -> its id; only what is whole counts as a look."""
    with records.asked() as client:
        experiment = records.find_experiment(client, records.watches)
        own = {_VERSION: version_run, _NEWEST: f"{newest:.3f}", _ALARM: f"{time.time() if alarm else 0:.0f}"}
        run = client.create_run(experiment, run_name=name, tags={**own, **tags, "mlflow.note.content": note})
        for key, value in metrics.items():
            client.log_metric(run.info.run_id, key, float(value))
        client.log_artifacts(run.info.run_id, str(folder))
        client.set_terminated(run.info.run_id)
        return str(run.info.run_id)

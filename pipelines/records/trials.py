"""Tracking of sweeps: a sweep is an MLflow run, its trials are the runs below it; and what was left open is closed.

A run that is under way carries a heartbeat. One whose heart has stopped belongs to a process that is gone, on
whatever machine, and is closed by `reconcile`.
"""

import json
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coop_core.errors import ServiceError
from coop_core.files import digest_json
from coop_core.training import Epoch
from pipelines.links import page, run_route
from pipelines.records.server import Records, compare_page, is_lost, pages, signs_of_life

LOST_SECONDS = 300
"""A run without a heartbeat for so long has lost its process, on whatever machine."""
TRIAL = "coop.trial"
"""Tag of a trial's run: its key."""
_SWEEP, _CODE, _REASON = "coop.sweep", "coop.code", "coop.reason"


@dataclass(frozen=True)
class FinishedTrial:
    key: str
    run_id: str
    metrics: dict[str, float]


def open_sweep(records: Records, *, name: str, key: str, params: dict[str, Any], tags: dict[str, str]) -> str:
    """The sweep's run, begun or taken up again -> its id. Of one sweep there is one run."""
    with records.asked() as client:
        experiment = records.find_experiment(client, records.sweeps)
        found = client.search_runs([experiment], f"tags.`{_SWEEP}` = '{key}'", max_results=1)
        beat = {**signs_of_life(), "mlflow.note.content": f"`coop sweep`: {name}"}
        if found:
            run_id = str(found[0].info.run_id)
            client.update_run(run_id, status="RUNNING")
            if _REASON in found[0].data.tags:
                client.delete_tag(run_id, _REASON)
            for tag, value in {**beat, **tags}.items():
                client.set_tag(run_id, tag, value)
            return run_id
        run = client.create_run(experiment, run_name=name, tags={_SWEEP: key, **beat, **tags})
        _log_params(client, run.info.run_id, params)
        return str(run.info.run_id)


def close_run(records: Records, run_id: str, status: str, *, reason: str = "") -> None:
    """FINISHED, FAILED or KILLED, with the reason as a tag."""
    with records.asked() as client:
        if reason:
            client.set_tag(run_id, _REASON, reason[:4000])
        client.set_terminated(run_id, status)


def close_lost(records: Records, run_id: str, status: str, *, reason: str) -> None:
    """Close a run whose process has ended, unless it is finished; what the process said itself is kept."""
    with records.asked() as client:
        run = client.get_run(run_id)
        if run.info.status != "FINISHED":
            if _REASON not in run.data.tags:
                client.set_tag(run_id, _REASON, reason[:4000])
            client.set_terminated(run_id, status)


def finish_sweep(
    records: Records, run_id: str, *, metrics: dict[str, float], params: dict[str, Any], files: Iterable[Path]
) -> None:
    """Log what came of a sweep and close its run."""
    with records.asked() as client:
        for name, value in metrics.items():
            client.log_metric(run_id, name, value)
        client.set_tag(run_id, "coop.winner", json.dumps(params))
        for path in files:
            client.log_artifact(run_id, str(path))
        client.set_terminated(run_id)


def read_sweep(records: Records, *, flow_run: str, file: str) -> tuple[str, dict[str, Any]]:
    """The finished sweep that a run of Prefect's did -> the id of its run, and what a JSON file of it holds.

    Raises
    ------
    ServiceError
        When there is no such sweep, or it has no such file.
    """
    with records.asked() as client:
        experiment = client.get_experiment_by_name(records.sweeps)
        wanted = f"tags.`prefect.flow_run_id` = '{flow_run}' and attributes.status = 'FINISHED'"
        found = client.search_runs([experiment.experiment_id], wanted, max_results=1) if experiment else []
        run_id = str(found[0].info.run_id) if found else ""
        if not found or file not in {artifact.path for artifact in client.list_artifacts(run_id)}:
            raise ServiceError(f"MLflow at {records.address} has no record of the sweep that Prefect's run "
                               f"{flow_run} did: give COOP_TRACKING_URI the workers' value, and the workers this "
                               "code")  # fmt: skip
        import mlflow

        return run_id, mlflow.artifacts.load_dict(f"runs:/{run_id}/{file}")


def finished_trials(records: Records, *, code: str) -> dict[str, FinishedTrial]:
    """Every trial that was finished by this code, in whichever sweep, by key."""
    with records.asked() as client:
        experiment = client.get_experiment_by_name(records.sweeps)
        if experiment is None:
            return {}
        wanted = f"attributes.status = 'FINISHED' and tags.`{_CODE}` = '{code}'"
        runs = pages(client, experiment.experiment_id, wanted)
        return {
            run.data.tags[TRIAL]: FinishedTrial(run.data.tags[TRIAL], run.info.run_id, dict(run.data.metrics))
            for run in runs
            if TRIAL in run.data.tags
        }


@dataclass(frozen=True)
class TrialState:
    """What MLflow has of a trial."""

    key: str
    run_id: str
    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    reason: str
    metrics: dict[str, float]


def trial_states(records: Records, *, parent: str, but: Collection[str] = ()) -> list[TrialState]:
    """The trials of a sweep, each by the run of it that says most; runs in `but` belong to an earlier attempt.

    No clock is asked: trials may run on other machines than the one that asks.
    """
    with records.asked() as client:
        experiment = client.get_run(parent).info.experiment_id
        runs = [run for run in pages(client, experiment, f"tags.`mlflow.parentRunId` = '{parent}'")
                if run.info.run_id not in but]  # fmt: skip
        says_most = {run.data.tags.get(TRIAL, ""): run for run in sorted(runs, key=lambda run: _says(run.info.status))}
        return [
            TrialState(key, run.info.run_id, run.info.status, run.data.tags.get(_REASON, ""),
                       dict(run.data.metrics))
            for key, run in says_most.items()
        ]  # fmt: skip


def _says(status: str) -> int:
    """A killed run is tried again; one that runs is watched; one that failed or finished is the answer."""
    return ["KILLED", "SCHEDULED", "RUNNING", "FAILED", "FINISHED"].index(status)


class TrialRun:
    """A trial's run while it is under way."""

    def __init__(self, records: Records, run_id: str) -> None:
        self.records, self.run_id = records, run_id
        self.open = True

    def finish(self, metrics: dict[str, float], curve: Iterable[Epoch]) -> None:
        """Log everything in a few calls, and close the run last: a finished run is whole."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        points = [Metric(name, value, now, 0) for name, value in metrics.items()]
        for epoch in curve:
            for name in ("loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"):
                value = getattr(epoch, name)
                if value is not None:
                    points.append(Metric(f"epoch/{name}", value, now, epoch.epoch))
        with self.records.asked() as client:
            for start in range(0, len(points), 1000):  # MLflow's limit a call
                client.log_batch(self.run_id, metrics=points[start : start + 1000])
            client.set_terminated(self.run_id)
        self.open = False

    def fail(self, reason: str, *, status: str = "FAILED") -> None:
        if self.open:
            self.open = False
            close_run(self.records, self.run_id, status, reason=reason)


def start_trial(
    records: Records, *, parent: str, key: str, code: str, name: str, params: dict[str, Any], tags: dict[str, str]
) -> TrialRun:
    with records.asked() as client:
        experiment = records.find_experiment(client, records.sweeps)
        own = {TRIAL: key, _CODE: code, "mlflow.parentRunId": parent, **signs_of_life()}
        run = client.create_run(experiment, run_name=name, tags={**tags, **own})
        _log_params(client, run.info.run_id, params)
        return TrialRun(records, str(run.info.run_id))


def reconcile(records: Records, *, lost_after: float = LOST_SECONDS) -> list[str]:
    """Close runs whose process is gone as KILLED -> their ids. Finished work of theirs is kept."""
    with records.asked() as client:
        lost: list[str] = []
        for name in (records.experiment, records.sweeps):
            experiment = client.get_experiment_by_name(name)
            for run in pages(client, experiment.experiment_id, "attributes.status = 'RUNNING'") if experiment else []:
                known = client.get_run(run.info.run_id)  # as it is now: it may have ended meanwhile
                if known.info.status == "RUNNING" and is_lost(known.data.tags, after=lost_after):
                    client.set_tag(run.info.run_id, _REASON, "its process is gone: the heartbeat stopped")
                    client.set_terminated(run.info.run_id, "KILLED")
                    lost.append(str(run.info.run_id))
        return lost


def sweep_key(tree: dict[str, Any], code: str) -> str:
    return digest_json([tree, code])[:32]


def _log_params(client: Any, run_id: str, params: dict[str, Any]) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in params.items()])


def sweep_links(records: Records, run_id: str, trials: Sequence[str]) -> tuple[str, str]:
    """The page of a sweep's run, and the one that compares its trials (at most 100 fit into an address)."""
    with records.asked() as client:
        experiment = client.get_experiment_by_name(records.sweeps).experiment_id
    compare = compare_page(records.settings, trials[:100], [experiment])
    return page(records.settings, run_route(experiment, run_id)), compare

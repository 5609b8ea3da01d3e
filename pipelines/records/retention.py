"""What MLflow keeps and nothing needs -> a list; and each entry of it -> away.

Runs in MLflow's bin, trials that failed, models of such runs, and folders of runs that no record knows. Never what a
registered version, the champion's history or this checkout's last run refers to. `mlflow gc` asks for none of that,
and removes whole experiments beside it. Only a store that opens the database itself can remove for good; through a
server a run can be moved to the bin and no further.
"""

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from coop_core.files import read_json
from pipelines import paths
from pipelines.records.names import find_model_name
from pipelines.records.registry import list_events
from pipelines.records.server import Records, pages
from pipelines.records.trials import TRIAL

DAY = 86_400
"""Seconds."""
TRIALS, BIN, FOLDERS = "failed trials", "deleted runs", "files of unknown runs"
"""Kinds of what is spent: the first are moved to MLflow's bin, the others are removed for good."""
_ID = re.compile(r"(m-)?[0-9a-f]{32}")


@dataclass(frozen=True)
class Spent:
    """Something in MLflow that nothing needs."""

    kind: str
    id: str
    place: Path | None = None
    """Its files on this machine, or None where they are elsewhere."""


@dataclass(frozen=True)
class Found:
    spent: list[Spent]
    kept: int
    """Runs that would go, if nothing referred to them."""
    refused: str
    """Why nothing can be removed for good, or nothing."""


def find_spent(records: Records, *, days: int) -> Found:
    """What has been spent for so many days, in the experiments of these records.

    Raises
    ------
    ServiceError
        When MLflow does not answer.
    """
    with records.asked() as client:
        store, before = _store(), time.time() - days * DAY
        referred = _referred(client, records)
        refused = "" if store else (
            f"MLflow at {records.address} lets its clients move runs to its bin and no further: whoever has its "
            "database gives COOP_TRACKING_URI that address, and then `coop gc`"
        )  # fmt: skip
        failed = [Spent(TRIALS, run.info.run_id, _local(run.info.artifact_uri))
                  for run in _failed_trials(client, records, before)]  # fmt: skip
        binned = list(_in_bin(client, store, records, days)) if store else []
        orphans = list(_orphans(client, store, records, before)) if store else []
        found = [*failed, *binned, *orphans]
    spent = [one for one in found if one.id not in referred]
    return Found(spent, len(found) - len(spent), refused)


def discard(spent: Sequence[Spent], records: Records) -> int:
    """Move trials to MLflow's bin, and remove what is in it -> how many went.

    What refers to them is asked again: much may have happened since the list was made.
    """
    with records.asked() as client:
        store, gone = _store(), 0
        referred = _referred(client, records)
        for one in spent:
            if one.id in referred:
                continue
            if one.kind == TRIALS:
                client.delete_run(one.id)
            elif one.kind == BIN:
                _remove(client, store, one, referred)
            elif one.place and not _is_known(store, one.id):
                shutil.rmtree(one.place)
            gone += 1
        return gone


def finished_sweeps(records: Records) -> set[str]:
    """Names of sweeps whose results MLflow has."""
    with records.asked() as client:
        experiment = client.get_experiment_by_name(records.sweeps)
        wanted = "attributes.status = 'FINISHED' and tags.`coop.winner` != ''"
        return {run.info.run_name for run in pages(client, experiment.experiment_id, wanted)} if experiment else set()


def _referred(client: Any, records: Records) -> set[str]:
    """Ids of runs and models behind every version of the registry, this model's history and this checkout."""
    found, token = set(), None
    while True:
        versions = client.search_model_versions(max_results=1000, page_token=token)
        for version in versions:
            found |= {version.run_id, *(match[0] for match in _ID.finditer(version.source or ""))}
        token = versions.token
        if not token:
            break
    if find_model_name(records.settings):
        # A version that was champion may be gone from the registry, and its run be there.
        champions = {str(number) for event in list_events(records) for number in (event["version"], event["previous"])}
        experiment = client.get_experiment_by_name(records.experiment)
        for deleted in (False, True):
            for run in pages(client, experiment.experiment_id, "", deleted=deleted) if experiment else ():
                if run.data.tags.get("coop.version") in champions:
                    found |= {run.info.run_id, *_models_of(run)}
    if paths.TRACKED.exists():
        found.add(read_json(paths.TRACKED)["run_id"])
    return found


def _failed_trials(client: Any, records: Records, before: float) -> Iterator[Any]:
    experiment = client.get_experiment_by_name(records.sweeps)
    for status in ("FAILED", "KILLED") if experiment else ():
        ended = f"attributes.status = '{status}' and attributes.end_time < {1000 * before:.0f}"
        yield from pages(client, experiment.experiment_id, f"{ended} and tags.`{TRIAL}` != ''")


def _in_bin(client: Any, store: Any, records: Records, days: int) -> Iterator[Spent]:
    """Runs that were deleted so many days ago, and the models that they logged."""
    old = set(store._get_deleted_runs(older_than=1000 * DAY * days))
    for name in (records.experiment, records.sweeps):
        experiment = client.get_experiment_by_name(name)
        for run in pages(client, experiment.experiment_id, "", deleted=True) if experiment else ():
            if run.info.run_id in old:
                yield Spent(BIN, run.info.run_id, _local(run.info.artifact_uri))


def _orphans(client: Any, store: Any, records: Records, before: float) -> Iterator[Spent]:
    """Folders of runs and models below this machine's mlruns/ that no record knows, as a killed upload leaves them."""
    roots = set()
    for name in (records.experiment, records.sweeps):
        experiment = client.get_experiment_by_name(name)
        if experiment and (root := _local(experiment.artifact_location)):
            roots |= {root, root / "models"}
    for root in sorted(roots):
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            old = _ID.fullmatch(folder.name) and newest(folder) < before
            if old and not _is_known(store, folder.name):
                yield Spent(FOLDERS, folder.name, folder)


def _is_known(store: Any, id: str) -> bool:
    """Whether a run or a model is on record, in the bin or not."""
    from mlflow.exceptions import MlflowException

    try:
        store.get_logged_model(id, allow_deleted=True) if id.startswith("m-") else store.get_run(id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _remove(client: Any, store: Any, one: Spent, referred: set[str]) -> None:
    """A run in the bin, with its files and the models that it logged."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    run = client.get_run(one.id)
    if run.info.lifecycle_stage != "deleted":  # somebody took it out again
        return
    for model in set(_models_of(run)) - referred:
        if _is_known(store, model):
            where = store.get_logged_model(model, allow_deleted=True).artifact_location
            get_artifact_repository(where).delete_artifacts()
            store._hard_delete_logged_model(model)
    get_artifact_repository(run.info.artifact_uri).delete_artifacts()
    store._hard_delete_run(one.id)
    if one.place and one.place.parent.name == one.id and not any(one.place.parent.iterdir()):
        one.place.parent.rmdir()


def _models_of(run: Any) -> list[str]:
    return [output.model_id for output in (run.outputs.model_outputs if run.outputs else [])]


def _store() -> Any | None:
    """The tracking store, where it opens the database itself."""
    from mlflow.tracking._tracking_service.utils import _get_store

    store = _get_store()
    return store if hasattr(store, "_hard_delete_run") else None


def _local(address: str) -> Path | None:
    """The folder of an address, where it is one of this machine's."""
    parts = urlsplit(address)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") and parts.path else None


def newest(place: Path) -> float:
    """When a file, or anything in a folder, was last written: seconds since 1970."""
    return max(found.lstat().st_mtime for found in (place, *place.rglob("*")))

"""Probes of MLflow: settings -> whether runs, versions and files can be written. Nothing that is tried stays."""

import contextlib
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from coop_core.errors import ServiceError
from pipelines.finding import Finding, unused, well, wrong
from pipelines.records.server import Records, require_answer
from pipelines.settings import Settings

TRACKING, REGISTRY, FILES = "tracking", "registry write", "artifacts write"
_SECONDS = 5.0
_NAME = "coop-doctor-"


def probe_mlflow(settings: Settings) -> Iterator[Finding]:
    """Tracking, and where it answers the registry and the files."""
    records = Records(settings)
    try:
        said = _answer(records)
    except ServiceError as error:
        yield wrong(TRACKING, str(error))
        yield from (unused(name, "not tried: tracking does not answer") for name in (REGISTRY, FILES))
        return
    yield said
    if said.state == "unused":
        yield from (unused(name, "not tried: there are no records yet") for name in (REGISTRY, FILES))
        return
    for name, probe in ((REGISTRY, _write_version), (FILES, _write_file)):
        try:
            yield probe(records)
        except ServiceError as error:
            yield wrong(name, str(error))


def _answer(records: Records) -> Finding:
    """Whether the settings' store answers; a missing SQLite file is not made."""
    scheme, _, path = records.address.partition(":///")
    if scheme == "sqlite" and not Path(path).exists():
        return unused(TRACKING, f"{path} is not there yet: the first `dvc repro` makes it")
    require_answer(records.settings)
    parts = urlsplit(records.address)
    if parts.scheme.startswith("postgresql"):
        _require_port(parts.hostname or "", parts.port or 5432)
    with records.asked() as client:
        client.search_experiments(max_results=1)
    return well(TRACKING, records.address)


def _require_port(host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except OSError as error:
        reason = error.strerror or f"nothing in {_SECONDS:g} s"
        raise ServiceError(f"PostgreSQL at {host}:{port} does not answer ({reason}): correct COOP_TRACKING_URI or "
                           "start it") from None  # fmt: skip


def _write_version(records: Records) -> Finding:
    with records.asked() as client:
        name = f"{_NAME}{uuid.uuid4().hex}"
        client.create_registered_model(name)
        client.delete_registered_model(name)
    return well(REGISTRY, "a model was made and removed")


def _write_file(records: Records) -> Finding:
    """Where the settings' experiment keeps its files; one that does not exist yet is not made."""
    with records.asked() as client:
        experiment = client.get_experiment_by_name(records.experiment)
        location = experiment.artifact_location if experiment else records.settings.artifact_location
        if location is None:
            return unused(FILES, f"not tried: there is no experiment {records.experiment} yet")
        place = f"{location.rstrip('/')}/{_NAME}{uuid.uuid4().hex}"
        try:
            if urlsplit(location).scheme in ("", "file"):
                _write_here(Path(unquote(urlsplit(location).path)))
            else:
                _write_there(place)
        except OSError as error:
            raise ServiceError(f"{location} cannot be written ({error.strerror or error}): correct "
                               "COOP_ARTIFACT_LOCATION, or the rights there") from error  # fmt: skip
    return well(FILES, f"{location}: a file was written and removed")


def _write_here(folder: Path) -> None:
    """In the nearest folder that is there, because none is made."""
    while not folder.is_dir():
        folder = folder.parent
    with tempfile.NamedTemporaryFile(dir=folder, prefix=_NAME):
        os.stat(folder)


def _write_there(place: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    store: Any = get_artifact_repository(place)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.txt"
        file.write_text("coop doctor\n", encoding="utf-8")
        with contextlib.ExitStack() as undo:
            undo.callback(store.delete_artifacts)
            store.log_artifact(str(file))

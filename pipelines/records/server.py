"""The MLflow server: settings -> records that are opened once and passed on; experiments, and signs of life."""

import json
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

from coop_core.errors import CoopError, ServiceError
from pipelines.console import require_project
from pipelines.environment import first_answer_within, use_store_keys, use_tracking_login
from pipelines.links import page
from pipelines.records.names import model_name
from pipelines.settings import Settings, load_settings, refusal, store_address, store_keys, tracking_login

log = logging.getLogger(__name__)

HEARTBEAT = "coop.heartbeat"
"""Tag of a run under way: when its process was last alive."""
OWNER = "coop.owner"
"""Tag of a run under way: the host and number of its process."""
BEAT_SECONDS = 20


@contextmanager
def connected(settings: Settings, *, way_out: str = "") -> Iterator[Any]:
    """The mlflow module, pointed at the settings' server; its faults become sentences.

    Raises
    ------
    ServiceError
        When the server does not answer or refuses.
    """
    _require_database(settings)
    import mlflow
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    login = tracking_login(settings)
    if login is not None:
        use_tracking_login(login)
    use_store_keys(store_keys(settings))
    in_store = _store_faults(settings)
    faults: tuple[type[Exception], ...] = (MlflowException, RequestException, SQLAlchemyError, *in_store)
    mlflow.set_tracking_uri(store_address(settings))
    mlflow.set_registry_uri(store_address(settings))
    try:
        yield mlflow
    except ModuleNotFoundError as error:
        raise ServiceError(f"MLflow at {settings.tracking_uri} needs the Python module {error.name}: install it, "
                           "or name a server in COOP_TRACKING_URI") from error  # fmt: skip
    except faults as error:
        if isinstance(error, in_store):
            said = " ".join(str(error).split())[:300]
            raise ServiceError(f"the store of MLflow's files at {settings.artifact_location} says: {said}; correct "
                               f"COOP_ARTIFACT_LOCATION or the COOP_S3_ settings{way_out}") from error  # fmt: skip
        where = f"MLflow at {settings.tracking_uri}"
        status = error.get_http_status_code() if isinstance(error, MlflowException) else None
        refused = refusal(status, "COOP_TRACKING_USERNAME and COOP_TRACKING_PASSWORD")
        if refused:
            raise ServiceError(f"{where} {refused}") from error
        reason = " ".join(str(error).split())
        for secret in (login[1], quote(login[1], safe="")) if login else ():
            reason = reason.replace(secret, "***")  # a database's driver may quote the address that it was given
        raise ServiceError(
            f"{where} says: {reason[:300]}; correct COOP_TRACKING_URI or start the server{way_out}"
        ) from error


class Records:
    """MLflow's records where the settings say: opened once, and handed to whoever reads or writes there."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.address = settings.tracking_uri
        """As it may be shown: without a login."""
        self.experiment = settings.experiment
        self.sweeps = f"{settings.experiment}-sweeps"
        self.watches = f"{settings.experiment}-watch"
        """Sweeps and looks have experiments of their own, so that `coop compare` shows registered runs alone."""
        self._client: Any = None

    @property
    def model(self) -> str:
        """The registered model of this project (`records.names.model_name`, with its errors)."""
        return model_name(self.settings)

    @contextmanager
    def asked(self, *, way_out: str = "") -> Iterator[Any]:
        """MLflow's client, while something is asked of it; its faults become sentences.

        Raises
        ------
        ServiceError
            When the server does not answer or refuses; `way_out` ends the sentence.
        """
        with connected(self.settings, way_out=way_out) as mlflow:
            self._client = self._client or mlflow.MlflowClient(store_address(self.settings))
            yield self._client

    def find_experiment(self, client: Any, name: str) -> str:
        """The experiment called so, made when it is not there, by whichever process is first."""
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        location = self.settings.artifact_location
        if location is None and self.address.startswith("sqlite:///"):
            database = Path(self.address.removeprefix("sqlite:///"))
            location = (database.parent / "mlruns").resolve().as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return str(client.get_experiment_by_name(name).experiment_id)


def open_records() -> Records:
    """The records of this process's settings."""
    return Records(load_settings())
def _store_faults(settings: Settings) -> tuple[type[Exception], ...]:
    """What goes wrong with files in an S3 store; importing these takes longer than most answers."""
    if not (settings.artifact_location or "").startswith("s3://"):
        return ()
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    return Boto3Error, BotoCoreError, ClientError


def require_answer(settings: Settings) -> None:
    """Where nobody wants the server asked for minutes, it must answer now; what it answers, MLflow's client judges.

    Raises
    ------
    ServiceError
        Also where a database would be made outside the project's folder.
    """
    _require_database(settings)
    within = first_answer_within()
    if within is None or not settings.tracking_uri.startswith("http"):
        return
    if said := silence(f"{settings.tracking_uri.rstrip('/')}/health", within=within):
        raise ServiceError(f"MLflow at {settings.tracking_uri} does not answer ({said}): correct COOP_TRACKING_URI or "
                           "start the server")  # fmt: skip


def silence(address: str, *, within: float) -> str:
    """Why a server says nothing in so many seconds; empty where it says anything at all."""
    try:
        urlopen(address, timeout=within).close()
    except HTTPError as error:
        error.close()
    except OSError as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # certificates are its client's business
            return getattr(reason, "strerror", None) or f"nothing in {within:g} s"
    except (HTTPException, ValueError) as error:
        log.debug("%s answers in another way than HTTP's: %s", address, error)
    return ""


def _require_database(settings: Settings) -> None:
    """MLflow makes the file that it does not find; outside the project's folder nobody wants it."""
    path = Path(settings.tracking_uri.removeprefix("sqlite:///"))
    if settings.tracking_uri.startswith("sqlite:///") and not path.is_absolute() and not path.exists():
        require_project(", or name MLflow's server in COOP_TRACKING_URI")


def compare_page(settings: Settings, runs: Sequence[str], experiments: Sequence[str]) -> str:
    """The page on which MLflow compares runs."""
    named = {"runs": runs, "experiments": experiments}
    query = {key: json.dumps(list(ids), separators=(",", ":")) for key, ids in named.items()}
    return page(settings, "compare-runs", **query)


@contextmanager
def heartbeat(records: Records, run_ids: Iterable[str]) -> Iterator[None]:
    """Keep runs alive while the block runs; a server that does not answer now may answer at the next beat."""
    ids, stopped = list(run_ids), threading.Event()

    def beat() -> None:
        while not stopped.wait(BEAT_SECONDS):
            try:
                with records.asked() as client:
                    for run_id in ids:
                        client.set_tag(run_id, HEARTBEAT, now())
            except CoopError as error:
                log.warning("no heartbeat: %s", error)

    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        stopped.set()


def pages(client: Any, experiment: str, wanted: str, *, deleted: bool = False) -> Iterator[Any]:
    """Every run that is wanted, however many there are; those in MLflow's bin only with `deleted`, and then alone."""
    from mlflow.entities import ViewType

    view, token = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY, None
    while True:
        found = client.search_runs([experiment], wanted, view, max_results=1000, page_token=token)
        yield from found
        token = found.token
        if not token:
            return


def signs_of_life() -> dict[str, str]:
    """Tags of a run that begins in this process."""
    return {HEARTBEAT: now(), OWNER: f"{socket.gethostname()}:{os.getpid()}"}


def is_lost(tags: dict[str, str], *, after: float) -> bool:
    """Whether a run's process is gone: silent for `after` seconds, or for two beats and not among this host's."""
    if HEARTBEAT not in tags:
        return False
    silent = time.time() - float(tags[HEARTBEAT])
    host, _, number = tags.get(OWNER, "").rpartition(":")
    here = host == socket.gethostname() and number.isdigit()
    return silent > after or (here and silent > 2 * BEAT_SECONDS and not _exists(int(number)))


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def now() -> str:
    """For a heartbeat: seconds since 1970."""
    return f"{time.time():.0f}"

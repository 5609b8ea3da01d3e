"""What libraries take from the environment: defaults, addresses and logins; the only module that writes to it."""

import gc
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipelines.logins import find_login

SERVICE_OF = "COOP_SERVICE_OF"
"""Marks every process that `make up` starts, and theirs; no setting, so that no shell carries it by chance."""
LOOPBACK = ("127.0.0.1", "localhost")
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
}
"""Libraries' telemetry, progress bars that would run through ours, and MLflow's idle job runner."""
_PREFECT_DATABASE = ("PREFECT_API_DATABASE_", "PREFECT_SERVER_DATABASE_")
"""Where Prefect's server keeps its records, and how it asks there: alone of a person's PREFECT_ variables, these reach
the server of `make up`."""
_RETRIES, _TIMEOUT = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"
_HASTE = {_RETRIES: "0", _TIMEOUT: "10"}
"""MLflow's client asks a silent server for minutes, which suits a training and no person."""
_FIRST_ANSWER_SECONDS = 5.0
_SECRETS = ("PASSWORD", "API_AUTH", "AUTH_STRING", "SECRET_KEY", "SECRET_ACCESS_KEY")
"""How variables end that are secrets as a whole."""


def quiet_libraries() -> None:
    """Set defaults that a person's own environment overrides, and silence what our own sentence says better."""
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # Pillow's, before we refuse the image
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def let_idle_threads_sleep() -> None:
    """For who answers single images: torch's threads sleep between layers instead of spinning, which beside any other
    busy process makes hundreds of short waits into seconds. Before torch is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def without_collecting() -> Iterator[None]:
    """Inside the block, which imports libraries, Python does not look for garbage: what is imported stays, and is not
    looked through afterwards either. A tenth of the time that torch takes."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()
            gc.enable()


@contextmanager
def hurried() -> Iterator[None]:
    """Inside the block MLflow's client gives up within seconds, unless a person's own environment says otherwise.

    For commands that a person waits for; what starts workers or trainers stands outside, because they inherit it.
    """
    own = {name: value for name, value in _HASTE.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)


def first_answer_within() -> float | None:
    """Seconds that MLflow's server has for its first answer; None where it is asked again for minutes."""
    if os.environ.get(_RETRIES) != "0":
        return None
    given = os.environ.get(_TIMEOUT, "")
    return min(_FIRST_ANSWER_SECONDS, float(given)) if given.isdigit() else _FIRST_ANSWER_SECONDS


def service_environment(folder: Path, *, prefect_api_url: str, tracking_uri: str) -> dict[str, str]:
    """What the services of `make up` run with, on top of `inherited_environment`; `folder` keeps their state.

    It holds no secret, because it is written into supervisord's file.
    """
    parts = urlsplit(prefect_api_url)
    origins = [f"http://{host}:{parts.port}" for host in LOOPBACK] if parts.hostname in LOOPBACK else []
    return {
        **_QUIET,
        SERVICE_OF: str(folder),
        "COOP_SERVICES_FOLDER": str(folder),
        "COOP_PREFECT_API_URL": prefect_api_url,
        "COOP_TRACKING_URI": tracking_uri,
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": prefect_api_url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # By default a page of any origin may ask the server.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins),
        # In memory, a slot held while the server restarts would be taken for ever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "pipelines,coop_core",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    }


def service_secrets(login: str, prefect: str | None, tracking: tuple[str, str] | None) -> dict[str, str]:
    """What the services are handed beside that: the login of our own servers, and those of Prefect's and MLflow's,
    which may be elsewhere."""
    found = {"PREFECT_SERVER_API_AUTH_STRING": login, **prefect_database()}
    if prefect is not None:
        found |= {"COOP_PREFECT_API_AUTH": prefect, "PREFECT_API_AUTH_STRING": prefect}
    if tracking is not None:
        name, password = tracking
        found |= {"COOP_TRACKING_USERNAME": name, "COOP_TRACKING_PASSWORD": password}
        found |= {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}
    return found


def prefect_database() -> dict[str, str]:
    """A person's variables about the database of Prefect's server."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PREFECT_DATABASE)}


def without_secrets(text: str, variables: Mapping[str, str]) -> str:
    """A sentence that quotes a log, without logins, addresses that hold a password, or the passwords in them."""
    hidden: set[str] = set()
    for name, value in variables.items():
        with suppress(ValueError):
            if password := urlsplit(value).password:
                hidden |= {value, password, unquote(password)}
        if name.endswith(_SECRETS):
            hidden |= {value, value.partition(":")[2] or value}
    for secret in sorted(hidden - {""}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def inherited_environment() -> dict[str, str]:
    """This process's variables for what it starts: without a person's own PREFECT_ ones, and no proxy for loopback.

    This Python comes first on the path, because the stages of dvc.yaml begin with `python`.
    """
    found = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    found["PATH"] = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), found.get("PATH")]))
    for name in ("NO_PROXY", "no_proxy"):
        found[name] = ",".join(filter(None, [found.get(name), "127.0.0.1,localhost"]))
    return found


def variable_names() -> list[str]:
    return list(os.environ)


def server_variables() -> dict[str, str]:
    """What a team's servers are started with, where it is set here: whose database it is -> its address, and more."""
    names = {"mlflow": ("MLFLOW_BACKEND_STORE_URI",), "users": ("MLFLOW_AUTH_CONFIG_PATH",),
             "artifacts": ("MLFLOW_ARTIFACTS_DESTINATION",),
             "prefect": ("PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL")}  # fmt: skip
    return {key: os.environ[name] for key, named in names.items() for name in reversed(named) if os.environ.get(name)}


def visible_devices() -> list[str] | None:
    """The CUDA devices that a person leaves visible; None when they set no limit."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def trainer_environment(*, device: str | None, threads: int | None) -> dict[str, str]:
    """What a trainer runs with, on top of `inherited_environment`."""
    # Threads that wait sleep: beside other processes, busy waiting makes a step several times slower.
    found = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    if device is not None:
        found |= {"CUDA_VISIBLE_DEVICES": device, "COOP_DEVICE": "cuda"}  # the only one it sees
    if threads is not None:
        found["OMP_NUM_THREADS"] = found["MKL_NUM_THREADS"] = str(threads)
    return found


def use_prefect(api_url: str, home: Path, login: str | None = None) -> None:
    """Point Prefect's client at a server; before prefect is first imported. A person's own profile is left alone.

    Without a login, a server on this machine gets the one that lies beside `home`, which is the services' folder.
    """
    if login is None and urlsplit(api_url).hostname in LOOPBACK:
        login = find_login(home.parent)
    if login is not None:
        os.environ["PREFECT_API_AUTH_STRING"] = login
    home.mkdir(parents=True, exist_ok=True)
    os.environ["PREFECT_API_URL"] = api_url
    os.environ["PREFECT_HOME"] = str(home.absolute())
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")


def use_prefect_server(api_url: str) -> None:
    """For the programs of Prefect that this process starts."""
    os.environ["PREFECT_API_URL"] = api_url


def prefect_access() -> dict[str, str]:
    """The server and the login that Prefect's own programs were given, which `inherited_environment` leaves out."""
    names = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_HOME")
    return {name: os.environ[name] for name in names if name in os.environ}


def use_store_keys(keys: dict[str, str]) -> None:
    """Keys of an S3 store for MLflow's client, here and in what this process starts; a person's own win."""
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        os.environ.update(keys)


def use_tracking_login(login: tuple[str, str]) -> None:
    """Name and password for MLflow's client, here and in what this process starts."""
    os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = login


def is_service() -> bool:
    """Whether this process was started by the services of `make up`, below a supervisor."""
    return SERVICE_OF in os.environ


def service_name() -> str:
    """What the supervisor calls the service this process belongs to, such as gpu-worker-0."""
    return os.environ.get("SUPERVISOR_PROCESS_NAME", "worker")

"""Defaults for libraries that are set through the environment; the only module that writes to it."""

import os
from pathlib import Path

SERVICE_OF = "COOP_SERVICE_OF"
"""Marks every process that `make up` starts, and theirs; no setting, so that no shell carries it by chance."""
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


def quiet_libraries() -> None:
    """Set defaults that a person's own environment overrides."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def service_environment(folder: Path, *, prefect_api_url: str, tracking_uri: str) -> dict[str, str]:
    """What the services of `make up` run with, on top of `inherited_environment`; `folder` keeps their state."""
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
        # In memory, a slot held while the server restarts would be taken for ever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "pipelines,coop_core",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    }


def inherited_environment() -> dict[str, str]:
    """This process's variables for services: without a person's own PREFECT_ ones, and no proxy for loopback."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    for name in ("NO_PROXY", "no_proxy"):
        found[name] = ",".join(filter(None, [found.get(name), "127.0.0.1,localhost"]))
    return found


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


def use_prefect(api_url: str, home: Path) -> None:
    """Point Prefect's client at a server; before prefect is first imported. A person's own profile is left alone."""
    home.mkdir(parents=True, exist_ok=True)
    os.environ["PREFECT_API_URL"] = api_url
    os.environ["PREFECT_HOME"] = str(home.absolute())
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")


def is_service() -> bool:
    """Whether this process was started by the services of `make up`, below a supervisor."""
    return SERVICE_OF in os.environ


def service_name() -> str:
    """What the supervisor calls the service this process belongs to, such as gpu-worker-0."""
    return os.environ.get("SUPERVISOR_PROCESS_NAME", "worker")

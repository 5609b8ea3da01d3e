"""Settings -> the services of this machine: those servers that the settings name nowhere else, workers, and answers."""

import importlib.util
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from coop_core.errors import ServiceError
from pipelines.environment import LOOPBACK, visible_devices
from pipelines.links import answering
from pipelines.logins import mlflow_users
from pipelines.services.supervision import Service
from pipelines.settings import Settings, is_own, named, store_address

ASKED_OF_PREFECT = "/api/admin/version"
"""Whatever the server itself calls its health, it tells to anybody."""
ASKED_OF_MLFLOW = "/api/2.0/mlflow/experiments/search?max_results=1"
_DATABASES = ("sqlite", "postgresql")


def plan(settings: Settings, devices: Sequence[str]) -> list[Service]:
    """The services that these settings ask for, servers first; one GPU worker a device, or one without any."""
    python, found = sys.executable, []
    if serves_prefect(settings):
        start = (python, "-m", "prefect", "server", "start",
                 "--host", "127.0.0.1", "--port", str(settings.prefect_port))  # fmt: skip
        found.append(Service("prefect-server", start, port=settings.prefect_port,
                             health=prefect_address(settings) + ASKED_OF_PREFECT))  # fmt: skip
    if serves_mlflow(settings):
        # Files lie where everybody on this machine finds them, with the server or without.
        files = ("--default-artifact-root", artifact_root(settings), "--no-serve-artifacts")
        found.append(Service("mlflow-server", (*mlflow_server(settings.mlflow_port), *files),
                             mlflow_users(settings.services_folder.absolute()), port=settings.mlflow_port,
                             health=mlflow_address(settings) + ASKED_OF_MLFLOW))  # fmt: skip
    serve = (python, "-m", "pipelines.commands.cli", "serve", "--port", str(settings.serve_port))
    found.append(Service("serve", serve, port=settings.serve_port, health=f"{answering(settings)}/health"))
    found.append(Service("cpu-worker", _worker(named(settings, "cpu"), "cpu")))
    gpu = named(settings, "gpu")
    for i, device in enumerate(devices):
        # The worker sees one device alone, so that COOP_DEVICE=cuda:3 would be out of range.
        alone = {"CUDA_VISIBLE_DEVICES": device, "COOP_DEVICE": "cuda"}
        found.append(Service(f"gpu-worker-{i}", (*_worker(gpu, f"gpu-{i}"), "--limit", "1"), alone))
    if not devices:
        found.append(Service("gpu-worker-0", (*_worker(gpu, "gpu-0"), "--limit", "1")))
    return found


def find_devices(settings: Settings) -> list[str]:
    """The CUDA devices to work on, as CUDA_VISIBLE_DEVICES names them."""
    kind, _, index = settings.device.partition(":")
    if kind == "cpu" or index:
        return [index] if index else []
    limited = visible_devices()
    if limited is not None:
        return limited
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        import torch

        return [str(i) for i in range(torch.cuda.device_count())]
    return re.findall(r"^GPU (\d+):", listed, re.MULTILINE)


def serves_prefect(settings: Settings) -> bool:
    """Whether Prefect's server is ours: the settings name none, or the very address that ours has."""
    return settings.prefect_api_url is None or is_own(settings.prefect_api_url, settings.prefect_port)


def serves_mlflow(settings: Settings) -> bool:
    """Whether MLflow's server is ours: the settings name a database, or the very address that ours has."""
    return not settings.tracking_uri.startswith("http") or is_own(settings.tracking_uri, settings.mlflow_port)


def prefect_address(settings: Settings) -> str:
    """The server of `make up`, or the one that the settings name, without the `/api` of its clients."""
    if settings.prefect_api_url is None:
        return f"http://127.0.0.1:{settings.prefect_port}"
    return settings.prefect_api_url.rstrip("/").removesuffix("/api")


def mlflow_address(settings: Settings) -> str:
    """The server of `make up`, or the one that the settings name."""
    return f"http://127.0.0.1:{settings.mlflow_port}" if serves_mlflow(settings) else settings.tracking_uri.rstrip("/")


def mlflow_server(port: int) -> tuple[str, ...]:
    """MLflow's server on loopback, for whoever has the login, under no other name and for no other page.

    Its database comes in MLFLOW_BACKEND_STORE_URI, because its address may hold a password.
    """
    hosts = [f"{host}:{port}" for host in LOOPBACK]
    return (sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--app-name", "basic-auth", "--allowed-hosts", ",".join(hosts),
            "--cors-allowed-origins", ",".join(f"http://{host}" for host in hosts))  # fmt: skip


def database_address(settings: Settings) -> str:
    """What MLflow's server of `make up` keeps its records in, with the login of a database. Never to be shown.

    Raises
    ------
    ServiceError
        Where the settings name what this server cannot use, or its driver is not installed.
    """
    if settings.tracking_uri.startswith("http"):
        return f"sqlite:///{_file(settings)}"
    scheme = settings.tracking_uri.partition(":")[0]
    if scheme.partition("+")[0] not in _DATABASES or "://" not in settings.tracking_uri:
        raise ServiceError(f"COOP_TRACKING_URI is a {scheme} address: `make up` takes sqlite:///FILE, "
                           "postgresql+psycopg://NAME:PASSWORD@HOST/DATABASE or http://SERVER")  # fmt: skip
    if scheme == "sqlite":
        return f"sqlite:///{_file(settings)}"
    driver = scheme.partition("+")[2] or "psycopg2"
    if importlib.util.find_spec(driver) is None:
        raise ServiceError(f"COOP_TRACKING_URI is a {scheme} address, and the Python module {driver} is not "
                           "installed: name postgresql+psycopg://..., and install it by "
                           "`python -m pip install -c constraints.txt -e '.[server]'`")  # fmt: skip
    return store_address(settings)


def artifact_root(settings: Settings) -> str:
    """Where experiments that the server makes keep their files: as set, or mlruns/ beside the database."""
    if settings.artifact_location:
        return settings.artifact_location
    return (_file(settings).parent / "mlruns").as_uri()


def _file(settings: Settings) -> Path:
    """The SQLite file of the settings, or the one that is meant without; the project's folder is the current one."""
    path = settings.tracking_uri.removeprefix("sqlite:///")
    return Path("mlflow.db" if path == settings.tracking_uri else path).absolute()


def _worker(pool: str, name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process",
            "--name", f"{platform.node()}-{name}", "--install-policy", "never")  # fmt: skip

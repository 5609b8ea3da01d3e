"""Settings -> all services on this machine: up, down, status.

Prefect's server, MLflow's server and the workers run below one supervisor; all listen on loopback alone, and the
servers answer nobody without the login of the services' folder: whoever may use them can run commands as this user.
"""

import hashlib
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit
from xmlrpc.client import Fault

from rich import box
from rich.table import Table

from coop_core.errors import ServiceError
from pipelines.console import console
from pipelines.environment import (
    LOGIN,
    LOOPBACK,
    find_login,
    inherited_environment,
    mlflow_server_secrets,
    mlflow_users,
    prepare_login,
    service_environment,
    service_secrets,
    visible_devices,
)
from pipelines.links import answering, page
from pipelines.services import supervision
from pipelines.services.supervision import Service, fault, last_words, log_file
from pipelines.services.workspace import mend_workspace
from pipelines.settings import Settings, is_own, store_address, tracking_login

DEPLOYMENTS = Path("infra/prefect.yaml")
READY_WITHIN = 120
"""Seconds for a service to be well."""
_ASKED_OF_PREFECT = "/api/admin/version"
"""Whatever the server itself calls its health, it tells to anybody."""
_ASKED_OF_MLFLOW = "/api/2.0/mlflow/experiments/search?max_results=1"


def plan(settings: Settings, devices: Sequence[str]) -> list[Service]:
    """The services that these settings ask for, servers first; one GPU worker a device, or one without any."""
    python, prefect, mlflow = sys.executable, _prefect(settings), _mlflow(settings)
    prefect_start = (python, "-m", "prefect", "server", "start",
                     "--host", "127.0.0.1", "--port", str(settings.prefect_port))  # fmt: skip
    found = [Service("prefect-server", prefect_start, port=settings.prefect_port, health=prefect + _ASKED_OF_PREFECT)]
    if _serves_mlflow(settings):
        database = _database(settings)
        store = ("--backend-store-uri", f"sqlite:///{database}",
                 # Files lie where everybody on this machine finds them, with the server or without.
                 "--default-artifact-root", (database.parent / "mlruns").as_uri(), "--no-serve-artifacts")  # fmt: skip
        found.append(Service("mlflow-server", (*_mlflow_server(settings.mlflow_port), *store),
                             mlflow_users(settings.services_folder.absolute()), port=settings.mlflow_port,
                             health=mlflow + _ASKED_OF_MLFLOW))  # fmt: skip
    serve = (python, "-m", "pipelines.commands.cli", "serve", "--port", str(settings.serve_port))
    found.append(Service("serve", serve, port=settings.serve_port, health=f"{answering(settings)}/health"))
    found.append(Service("cpu-worker", _worker("cpu", "cpu")))
    for i, device in enumerate(devices):
        # The worker sees one device alone, so that COOP_DEVICE=cuda:3 would be out of range.
        alone = {"CUDA_VISIBLE_DEVICES": device, "COOP_DEVICE": "cuda"}
        found.append(Service(f"gpu-worker-{i}", (*_worker("gpu", f"gpu-{i}"), "--limit", "1"), alone))
    if not devices:
        found.append(Service("gpu-worker-0", (*_worker("gpu", "gpu-0"), "--limit", "1")))
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


def up(settings: Settings) -> None:
    """Start what does not run, wait until it is well, deploy the flows; a start that fails leaves nothing running.

    Raises
    ------
    ServiceError
        When a port is taken, a service does not come up, or the settings changed since the start.
    """
    if not DEPLOYMENTS.exists():
        raise ServiceError(f"there is no {DEPLOYMENTS} in {Path.cwd()}: run this in the project's folder")
    mend_workspace()
    folder = settings.services_folder.absolute()
    services = plan(settings, find_devices(settings))
    environment = service_environment(
        folder, prefect_api_url=f"{_prefect(settings)}/api", tracking_uri=_mlflow(settings)
    )
    with supervision.alone(folder), ExitStack() as undo:
        login = prepare_login(folder)
        secrets = _secrets(settings, login)
        # Secrets are handed on, not written down; their digest, which the random login salts, tells of a change.
        digest = hashlib.sha256(repr(sorted(secrets.items())).encode()).hexdigest()
        text = supervision.configuration(services, folder, environment) + f"; {digest}\n"
        environment |= secrets
        supervisor, flags = supervision.connect(folder), []
        if supervisor is None:
            flags = ["--without-workers"]
            supervision.end_processes(folder)
            _require_ports(services)
            undo.callback(supervision.stop, folder)
            supervisor = supervision.launch(folder, text, secrets)
        elif (folder / supervision.CONFIGURATION).read_text(encoding="utf-8") != text:
            raise ServiceError("the services run with other settings or devices: `make down`, then `make up`")
        else:
            console.print("the services are up already; what is missing is repaired")
        _bring_up(supervisor, [service for service in services if service.port is not None], folder, login)
        _call("bootstrap", "-m", "pipelines.flows.bootstrap", f"{_prefect(settings)}/api", *flags,
              folder=folder, environment=environment)  # fmt: skip
        _bring_up(supervisor, [service for service in services if service.port is None], folder, login)
        undo.pop_all()
        _call("deploy", "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(DEPLOYMENTS),
              folder=folder, environment=environment | _placeholders(settings))  # fmt: skip
    text = f"""
Prefect  {_prefect(settings)}
MLflow   {page(settings, "experiments")}
answers  {answering(settings)} (once there is a champion)
login    NAME:PASSWORD stands in {settings.services_folder / LOGIN}; Prefect's page takes it whole
logs     {settings.services_folder / "logs"}

For `coop sweep` to use the workers, put into .env:
COOP_PREFECT_API_URL={_prefect(settings)}/api"""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def down(settings: Settings) -> None:
    """End all that `up` started, with or without its supervisor."""
    folder = settings.services_folder.absolute()
    with supervision.alone(folder), console.status("stopping"):
        ended = supervision.stop(folder)
    console.print("ended: " + ", ".join(ended) if ended else "nothing is running", highlight=False)


def status(settings: Settings) -> bool:
    """Show every service; whether all run and answer."""
    folder = settings.services_folder.absolute()
    supervisor = supervision.connect(folder)
    if supervisor is None:
        left = supervision.marked_processes(folder)
        console.print(f"the supervisor is gone, but {len(left)} processes run: `make down` ends them"
                      if left else "not running: `make up` starts it", highlight=False)  # fmt: skip
        return False
    servers = {service.name: service.health for service in plan(settings, []) if service.health}
    login = find_login(folder)
    table, well = Table("service", "state", "pid", "since", box=box.SIMPLE_HEAD, pad_edge=False), True
    table.add_column("address or log", overflow="fold")
    for info in supervisor.getAllProcessInfo():
        name, state = info["name"], info["statename"].lower()
        if state == "running" and name in servers:
            state = fault(servers[name], login) or state
        runs = state == "running"
        well &= runs
        since = f"{datetime.fromtimestamp(info['start']):%m-%d %H:%M}" if runs else "-"
        address = f"http://{urlsplit(servers[name]).netloc}" if runs and name in servers else ""
        place = address or str(log_file(settings.services_folder, name))
        table.add_row(name, state, str(info["pid"] or "-"), since, place, style=None if runs else "red")
    if not _serves_mlflow(settings):
        wrong = fault(_mlflow(settings) + _ASKED_OF_MLFLOW, ":".join(tracking_login(settings) or ()))
        well &= not wrong
        table.add_row("MLflow", wrong or "running", "-", "-", _mlflow(settings), style="red" if wrong else None)
    console.print(table)
    console.print(f"MLflow's pages: {page(settings, 'experiments')}", highlight=False, soft_wrap=True)
    if not well:
        console.print("not all is well: the logs say why, and `make up` repairs what it can", highlight=False)
    return well


def show_pages(settings: Settings, port: int) -> NoReturn:
    """Become MLflow's server for the settings' database, until Ctrl-C; with the login of the services' folder."""
    folder = settings.services_folder.absolute()
    with supervision.alone(folder):
        login = prepare_login(folder)
    store = {"MLFLOW_BACKEND_STORE_URI": store_address(settings)}  # not on the command line: it may hold a password
    command, own = _mlflow_server(port), mlflow_users(folder) | mlflow_server_secrets(login)
    os.execve(command[0], command, inherited_environment() | store | own)


def _bring_up(supervisor: Any, services: Sequence[Service], folder: Path, login: str) -> None:
    """Start those that do not run, and wait until all are well."""
    waiting, begin = list(services), time.monotonic()
    pids: dict[str, int] = {}
    for service in waiting:
        with suppress(Fault):  # it runs already; or it cannot start, which its state tells below
            supervisor.startProcess(service.name, False)
    with console.status("starting " + ", ".join(service.name for service in waiting)):
        while waiting:
            for service in list(waiting):
                info, log = supervisor.getProcessInfo(service.name), log_file(folder, service.name)
                died = info["statename"] in ("BACKOFF", "FATAL", "EXITED", "STOPPED")
                if died or info["pid"] != pids.setdefault(service.name, info["pid"]):
                    said = last_words(folder, service.name) or info["spawnerr"]
                    raise ServiceError(f"{service.name} does not run: {said}; see {log}")
                seconds = time.monotonic() - begin
                wrong = "starts" if info["statename"] != "RUNNING" else fault(service.health, login)
                if "(40" in wrong:
                    raise ServiceError(f"{service.name} {wrong}: `make down`, then `make up`; see {log}")
                if not wrong:
                    console.print(f"{service.name}  ready after {seconds:.0f} s", highlight=False)
                    waiting.remove(service)
                elif seconds > READY_WITHIN:
                    raise ServiceError(f"{service.name} does not answer after {READY_WITHIN} s; see {log}")
            time.sleep(0.3)


def _call(name: str, *arguments: str, folder: Path, environment: dict[str, str]) -> None:
    """Run a Python command to its end, its words in a log of its own."""
    log, begin = log_file(folder, name), time.monotonic()
    with console.status(f"running {name}"), log.open("w", encoding="utf-8") as out:
        command = [sys.executable, *arguments]
        ended = subprocess.run(command, env=inherited_environment() | environment, stdout=out, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise ServiceError(f"{name} failed: {last_words(folder, name)}; see {log}, then run `make up` again")
    console.print(f"{name}  done in {time.monotonic() - begin:.0f} s", highlight=False)


def _require_ports(services: Sequence[Service]) -> None:
    for service in (service for service in services if service.port is not None):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
            try:
                probe.bind(("127.0.0.1", service.port))
            except OSError as error:
                variable = f"COOP_{service.name.split('-')[0].upper()}_PORT"
                raise ServiceError(
                    f"port {service.port} for {service.name} cannot be had ({error.strerror}): "
                    f"end what uses it or set {variable} to another; nothing was started"
                ) from None


def _secrets(settings: Settings, login: str) -> dict[str, str]:
    name, _, password = login.partition(":")
    tracking = (name, password) if _serves_mlflow(settings) else tracking_login(settings)
    return service_secrets(login, tracking) | mlflow_server_secrets(login)


def _mlflow_server(port: int) -> tuple[str, ...]:
    """MLflow's server on loopback, for whoever has the login, under no other name and for no other page."""
    hosts = [f"{host}:{port}" for host in LOOPBACK]
    return (sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--app-name", "basic-auth", "--allowed-hosts", ",".join(hosts),
            "--cors-allowed-origins", ",".join(f"http://{host}" for host in hosts))  # fmt: skip


def _worker(pool: str, name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process",
            "--name", f"{platform.node()}-{name}", "--install-policy", "never")  # fmt: skip


def _placeholders(settings: Settings) -> dict[str, str]:
    """What infra/prefect.yaml leaves open."""
    return {"COOP_PROJECT": str(Path.cwd()), "COOP_RETRAIN_CRON": settings.retrain_cron,
            "COOP_WATCH_CRON": settings.watch_cron, "COOP_WATCH_ACTIVE": settings.watch_active}  # fmt: skip


def _prefect(settings: Settings) -> str:
    return f"http://127.0.0.1:{settings.prefect_port}"


def _serves_mlflow(settings: Settings) -> bool:
    """Whether MLflow's server is ours: the settings name a file, or the very address that ours has."""
    return not settings.tracking_uri.startswith("http") or is_own(settings.tracking_uri, settings.mlflow_port)


def _mlflow(settings: Settings) -> str:
    """The server of `make up`, or the one that the settings name."""
    return f"http://127.0.0.1:{settings.mlflow_port}" if _serves_mlflow(settings) else settings.tracking_uri.rstrip("/")


def _database(settings: Settings) -> Path:
    """The SQLite file of the settings; the project's folder is the current one."""
    if settings.tracking_uri.startswith("http"):
        return Path("mlflow.db").absolute()
    scheme, path = settings.tracking_uri.split(":")[0], settings.tracking_uri.removeprefix("sqlite:///")
    if path in ("", settings.tracking_uri):
        raise ServiceError(f"COOP_TRACKING_URI is a {scheme} address: `make up` takes sqlite:///FILE or http://SERVER")
    return Path(path).absolute()

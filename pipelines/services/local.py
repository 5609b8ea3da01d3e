"""Settings -> all services on this machine: up, down, status.

Prefect's server, MLflow's server and the workers run below one supervisor; all listen on loopback alone, and the
servers answer nobody without the login of the services' folder: whoever may use them can run commands as this user.
"""

import hashlib
import os
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
from pipelines.environment import inherited_environment, service_environment, service_secrets, without_secrets
from pipelines.links import answering, page
from pipelines.logins import LOGIN, find_login, mlflow_server_secrets, mlflow_users, prepare_login
from pipelines.services import supervision
from pipelines.services.planning import (
    ASKED_OF_MLFLOW,
    ASKED_OF_PREFECT,
    database_address,
    find_devices,
    mlflow_address,
    mlflow_server,
    plan,
    prefect_address,
    serves_mlflow,
    serves_prefect,
)
from pipelines.services.supervision import Service, fault, last_words, log_file
from pipelines.services.workspace import mend_workspace
from pipelines.settings import Settings, prefect_login, store_address, store_keys, tracking_login

DEPLOYMENTS = Path("infra/prefect.yaml")
READY_WITHIN = 120
"""Seconds for a service to be well."""

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
        folder, prefect_api_url=f"{prefect_address(settings)}/api", tracking_uri=mlflow_address(settings)
    )
    with supervision.alone(folder):
        login = prepare_login(folder)
        secrets = _secrets(settings, login)
        try:
            _start(settings, services, folder, environment, secrets)
        except ServiceError as error:  # it may quote a log, and that an address of a database
            raise ServiceError(without_secrets(str(error), secrets)) from None
    text = f"""
Prefect  {prefect_address(settings)}
MLflow   {page(settings, "experiments")}
answers  {answering(settings)} (once there is a champion)
login    {_whose_login(settings)}
logs     {settings.services_folder / "logs"}"""
    if settings.prefect_api_url is None:
        text += f"""

For `coop sweep` to use the workers, put into .env:
COOP_PREFECT_API_URL={prefect_address(settings)}/api"""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _start(
    settings: Settings, services: Sequence[Service], folder: Path, environment: dict[str, str], secrets: dict[str, str]
) -> None:
    """Bring all up in order; a start that fails ends what it began."""
    # Secrets are handed on, not written down; their digest, which the random login salts, tells of a change.
    digest = hashlib.sha256(repr(sorted(secrets.items())).encode()).hexdigest()
    text = supervision.configuration(services, folder, environment) + f"; {digest}\n"
    environment = environment | secrets
    login, flags = find_login(folder) or "", ["--without-deployments"]
    with ExitStack() as undo:
        supervisor = supervision.connect(folder)
        if supervisor is None:
            if serves_prefect(settings):  # on a server of the team, others' workers are alive
                flags.append("--without-workers")
            supervision.end_processes(folder)
            _require_ports(services)
            undo.callback(supervision.stop, folder)
            supervisor = supervision.launch(folder, text, secrets)
        elif (folder / supervision.CONFIGURATION).read_text(encoding="utf-8") != text:
            raise ServiceError("the services run with other settings or devices: `make down`, then `make up`")
        else:
            console.print("the services are up already; what is missing is repaired")
        _bring_up(supervisor, [service for service in services if service.port is not None], folder, login)
        _call("bootstrap", "-m", "pipelines.flows.bootstrap", f"{prefect_address(settings)}/api", *flags,
              folder=folder, environment=environment)  # fmt: skip
        _bring_up(supervisor, [service for service in services if service.port is None], folder, login)
        undo.pop_all()
    _call("deploy", "-m", "pipelines.flows.deploying", folder=folder, environment=environment)


def _whose_login(settings: Settings) -> str:
    own = f"NAME:PASSWORD stands in {settings.services_folder / LOGIN}"
    if serves_prefect(settings):
        return f"{own}; Prefect's page takes it whole"
    return own if serves_mlflow(settings) else "that of your servers"


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
    for server, address, wrong in _servers_elsewhere(settings):
        well &= not wrong
        table.add_row(server, wrong or "running", "-", "-", address, style="red" if wrong else None)
    console.print(table)
    console.print(f"MLflow's pages: {page(settings, 'experiments')}", highlight=False, soft_wrap=True)
    if not well:
        console.print("not all is well: the logs say why, and `make up` repairs what it can", highlight=False)
    return well


def _servers_elsewhere(settings: Settings) -> list[tuple[str, str, str]]:
    """Servers that are not ours: name, address, and what is wrong."""
    found = []
    if not serves_prefect(settings):
        address = prefect_address(settings)
        found.append(("Prefect", address, fault(address + ASKED_OF_PREFECT, prefect_login(settings))))
    if not serves_mlflow(settings):
        address = mlflow_address(settings)
        found.append(("MLflow", address, fault(address + ASKED_OF_MLFLOW, ":".join(tracking_login(settings) or ()))))
    return found


def show_pages(settings: Settings, port: int) -> NoReturn:
    """Become MLflow's server for the settings' database, until Ctrl-C; with the login of the services' folder."""
    folder = settings.services_folder.absolute()
    with supervision.alone(folder):
        login = prepare_login(folder)
    store = {"MLFLOW_BACKEND_STORE_URI": store_address(settings)}  # not on the command line: it may hold a password
    command, own = mlflow_server(port), mlflow_users(folder) | mlflow_server_secrets(login)
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
    """What the services are handed beside their environment: logins, keys, and where records are kept."""
    name, _, password = login.partition(":")
    prefect = login if serves_prefect(settings) else prefect_login(settings)
    found = store_keys(settings)
    if not serves_mlflow(settings):
        return found | service_secrets(login, prefect, tracking_login(settings))
    found["MLFLOW_BACKEND_STORE_URI"] = database_address(settings)
    return found | service_secrets(login, prefect, (name, password)) | mlflow_server_secrets(login)

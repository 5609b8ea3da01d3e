"""Services -> processes below one supervisord, which starts again what dies; and back to none.

Every process carries a mark in its environment, so that what lost its parent is found and ended too.
"""

import base64
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener
from xmlrpc.client import Fault, ServerProxy

import psutil
from supervisor.xmlrpc import SupervisorTransport

from coop_core.errors import ServiceError
from pipelines import locks
from pipelines.environment import LOOPBACK, SERVICE_OF, inherited_environment
from pipelines.logins import write_private

CONFIGURATION, PID = "supervisord.conf", "supervisord.pid"
STOPPED_WITHIN = 10
"""Seconds for a left-over process to end before it is killed."""
_SOCKET_LENGTH = 90
"""Bytes; the system refuses paths over 107."""
_NEARLY_FULL = 1_000_000
"""Bytes free on a disk."""

_REFUSED = "supervisord's configuration cannot hold"


@dataclass(frozen=True)
class Service:
    """One process that the supervisor keeps."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    """What it has beyond what all share."""
    port: int | None = None
    """Servers have one; workers have none."""
    health: str = ""
    """The address that answers 200 to our login when the server is well."""


def configuration(services: Sequence[Service], folder: Path, environment: dict[str, str]) -> str:
    """supervisord's file; `environment` is what all services share, `folder` keeps state and logs."""
    where = _escaped(socket_path(folder))
    lines = [
        "; written by `make up`",
        "[supervisord]", f"directory={_escaped(Path.cwd())}", f"pidfile={_escaped(folder / PID)}", "nocleanup=true",
        f"logfile={_escaped(log_file(folder, 'supervisord'))}", "logfile_maxbytes=10MB", "logfile_backups=2",
        "[unix_http_server]", f"file={where}", "chmod=0700",
        "[rpcinterface:supervisor]", "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
        "[supervisorctl]", f"serverurl=unix://{where}",
    ]  # fmt: skip
    for service in services:
        command = service.command
        if service.port is not None:
            command = (sys.executable, "-m", "pipelines.services.supervision", str(folder), str(service.port), *command)
        own = environment | service.environment
        lines += [
            f"[program:{service.name}]",
            f"command={_escaped(shlex.join(command))}",
            "environment=" + ",".join(f'{name}="{_unquoted(value)}"' for name, value in own.items()),
            # Started in order by us: a worker that finds no server would only fill its log.
            "autostart=false", "autorestart=true", "startsecs=5", "startretries=20",
            "stopasgroup=true", "killasgroup=true", "stopwaitsecs=20",
            f"priority={10 if service.port is not None else 20}",  # the highest is stopped first
            # Expanded twice, unlike the others.
            "redirect_stderr=true", f"stdout_logfile={_escaped(_escaped(log_file(folder, service.name)))}",
            "stdout_logfile_maxbytes=10MB", "stdout_logfile_backups=2",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _escaped(value: str | Path) -> str:
    if re.search(r"[\n\r]|\s[;#]", str(value)):
        raise ServiceError(f"{_REFUSED} {str(value)!r}: use a folder without ; and #")
    return str(value).replace("%", "%%")


def _unquoted(value: str) -> str:
    if re.search(r"""\"|^'|'$""", value):
        raise ServiceError(f"{_REFUSED} {value!r}: use a folder without quotes")
    return _escaped(value)


def fault(url: str, login: str | None) -> str:
    """What is wrong with a server that is asked with NAME:PASSWORD; nothing when all is well, or there is no address.

    Loopback is never asked through a proxy, and the login is never sent on to where an answer may point.
    """
    if not url:
        return ""
    request = Request(url)
    if login:
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    try:
        with opener(url).open(request, timeout=5):
            return ""
    except HTTPError as error:
        error.close()
        meaning = {401: "refuses the login (401)", 403: "forbids us to ask (403)"}
        return meaning.get(error.code, f"answers {error.code}")
    except OSError:
        return "no answer"


def opener(url: str) -> OpenerDirector:
    """Who asks an address: through a person's proxy, but never loopback."""
    return build_opener(*([ProxyHandler({})] if urlsplit(url).hostname in LOOPBACK else []))


def log_file(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def last_line(text: str) -> str:
    """What a log says at its end, for a sentence; the last line that names an error, where one of the last ten does."""
    lines = [line.strip() for line in text.splitlines() if line.strip()][-10:]
    return next((line for line in reversed(lines) if re.search("Error|ERROR", line)), lines[-1] if lines else "")[:300]


def last_words(folder: Path, name: str) -> str:
    """Why a service ended: what its log says at its end, or that the disk is full, which a log cannot say."""
    if shutil.disk_usage(folder).free < _NEARLY_FULL:
        return f"the disk of {folder} is full"
    log = log_file(folder, name)
    return last_line(log.read_text(encoding="utf-8", errors="replace")) if log.exists() else ""


def socket_path(folder: Path) -> Path:
    """The supervisor's socket: in the folder, or in a private one of the system's when that path is too long."""
    near = folder / "supervisor.sock"
    if len(os.fsencode(near)) <= _SOCKET_LENGTH:
        return near
    private = Path(tempfile.gettempdir()) / f"coop-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    if private.lstat().st_uid != os.getuid():
        raise ServiceError(f"{private} belongs to somebody else: set COOP_SERVICES_FOLDER to a shorter path")
    return private / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.sock"


def alone(folder: Path) -> AbstractContextManager[None]:
    """Hold the folder's lock, so that no two of us start or end the same services; no other user may look inside."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)  # an earlier version left it open
    told = f"another `make up` or `make down` is at work in {folder}: wait for it"
    return locks.alone(folder / "lock", otherwise=told)


def connect(folder: Path) -> Any | None:
    """The running supervisor's interface, or None."""
    transport = _Transport(serverurl=f"unix://{socket_path(folder)}")
    supervisor = ServerProxy("http://127.0.0.1", transport=transport).supervisor
    try:
        supervisor.getState()
    except OSError:
        return None
    return supervisor


class _Transport(SupervisorTransport):
    """A connection a call, so that none is left open."""

    def request(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().request(*arguments, **options)
        finally:
            self.close()


def launch(folder: Path, text: str, secrets: dict[str, str]) -> Any:
    """Start supervisord with this configuration, no service yet -> its interface; services inherit the secrets."""
    (folder / "logs").mkdir(exist_ok=True)
    file = folder / CONFIGURATION
    write_private(file, text)
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(file)]
    environment = inherited_environment() | secrets | {SERVICE_OF: str(folder)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    supervisor = connect(folder)
    if ended.returncode or supervisor is None:
        said = last_line(ended.stdout + ended.stderr)
        raise ServiceError(f"supervisord did not start: {said}; see {log_file(folder, 'supervisord')}")
    return supervisor


def stop(folder: Path) -> list[str]:
    """Shut the supervisor down, then end whatever still carries the mark -> the names of what ended."""
    ended, supervisor = [], connect(folder)
    if supervisor is not None:
        ended = [info["name"] for info in supervisor.getAllProcessInfo() if info["pid"]]
        process = psutil.Process(supervisor.getPID())
        with suppress(psutil.TimeoutExpired, Fault):  # it is on its way down already, or the mark finds it
            supervisor.shutdown()
            process.wait(timeout=60)
    ended += end_processes(folder)
    for file in (socket_path(folder), folder / PID):
        file.unlink(missing_ok=True)
    return ended


def end_processes(folder: Path, *, port: int | None = None) -> list[str]:
    """End what carries the folder's mark, or what of it listens on a port -> how each was called."""
    ended: dict[int, str] = {}
    begin = time.monotonic()
    while found := [process for process in marked_processes(folder) if port is None or _listens(process, port)]:
        seconds = time.monotonic() - begin
        if seconds > 2 * STOPPED_WITHIN:
            raise ServiceError(f"processes {[process.pid for process in found]} do not end: end them by hand")
        for process in found:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if process.pid not in ended:  # its parent may have started it in the meantime
                    service = process.environ().get("SUPERVISOR_PROCESS_NAME", process.name())
                    ended[process.pid] = f"{service} (process {process.pid})"
                    process.terminate()
                elif seconds > STOPPED_WITHIN:
                    process.kill()
        psutil.wait_procs(found, timeout=0.5)
    return list(ended.values())


def marked_processes(folder: Path) -> list[psutil.Process]:
    """This user's processes that `make up` started, and theirs; without this one and those above it."""
    own = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone, a zombie, or somebody else's
            if process.pid not in own and process.environ().get(SERVICE_OF) == str(folder):
                found.append(process)
    return found


def _listens(process: psutil.Process, port: int) -> bool:
    with suppress(psutil.Error):
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in process.net_connections("tcp"))
    return False


def _become_server() -> None:
    """`FOLDER PORT COMMAND...`: end what an earlier run of a server left on its port, then become the server.

    MLflow's server is a child of its command: killed alone, the command would leave the port taken.
    """
    folder, port, *command = sys.argv[1:]
    end_processes(Path(folder), port=int(port))
    os.execv(command[0], command)


if __name__ == "__main__":
    _become_server()

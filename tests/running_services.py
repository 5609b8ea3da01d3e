"""Services as `coop up` starts them, on free ports in a folder of their own; for tests that ask real servers."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

from pipelines.logins import LOGIN
from pipelines.settings import Settings

ROOT = Path(__file__).parents[1]


class Running(NamedTuple):
    settings: Settings
    folder: Path
    coop: Callable[..., subprocess.CompletedProcess]
    said: str
    """What `coop up` printed."""

    @property
    def login(self) -> str:
        return (self.folder / LOGIN).read_text().strip()

    @property
    def prefect(self) -> str:
        return f"http://127.0.0.1:{self.settings.prefect_port}/api"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.settings.mlflow_port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


_SELDOM = "0 0 29 2 *"


@contextmanager
def brought_up(folder: Path, **more: str) -> Iterator[Running]:
    """`coop up` with more variables, and `coop down` in the end."""
    settings = Settings(_env_file=None, services_folder=folder, prefect_port=free_port(), mlflow_port=free_port(),
                        serve_port=free_port())  # fmt: skip
    environment = os.environ | {
        "COOP_SERVICES_FOLDER": str(folder), "COOP_PREFECT_PORT": str(settings.prefect_port), "COLUMNS": "200",
        "COOP_MLFLOW_PORT": str(settings.mlflow_port), "COOP_SERVE_PORT": str(settings.serve_port),
        "COOP_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        # No schedule's own hour may come in the middle of a test: of two runs at once Prefect cancels the second.
        "COOP_RETRAIN_CRON": _SELDOM, "COOP_WATCH_CRON": _SELDOM, **more,
    }  # fmt: skip

    def coop(*words: str, **variables: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pipelines.commands.cli", *words]
        return subprocess.run(
            command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=300
        )

    try:
        begun = coop("up")
        assert begun.returncode == 0, begun.stderr + begun.stdout
        yield Running(settings, folder, coop, begun.stdout)
    finally:
        coop("down")


def wait_until(fulfilled: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not fulfilled():
        assert time.monotonic() < end, f"not fulfilled in {seconds} s"
        time.sleep(0.5)


def request(
    url: str, body: dict | None = None, *, login: str | None = None, method: str | None = None, **headers: str
) -> tuple[int, dict, bytes]:
    """-> status, headers and content; a body makes it a POST."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if login is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"} | headers, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def wait_for_run(running: Running, run_id: str) -> None:
    """Until a flow run is completed; one that ends otherwise fails the test with what it said."""

    def ended() -> bool:
        state = ask(running, f"flow_runs/{run_id}")["state"]
        assert state["type"] not in ("FAILED", "CRASHED", "CANCELLED"), state["message"]
        return state["type"] == "COMPLETED"

    wait_until(ended, 60)


def ask(running: Running, path: str, body: dict | None = None):
    """Prefect's answer to whoever has the login."""
    status, content = ask_again(running, path, body, login=running.login)
    assert status < 300, content
    return json.loads(content) if content else None


def ask_again(running: Running, path: str, body: dict | None = None, *, login: str | None) -> tuple[int, bytes]:
    """Prefect's status and content; asked again while its database is busy (503), as Prefect's own client does."""
    for _ in range(20):
        status, _, content = request(f"{running.prefect}/{path}", body, login=login)
        if status != 503:
            break
        time.sleep(1)
    return status, content

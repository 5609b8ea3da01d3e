"""Haste: a command that a person waits for gives up on a silent MLflow server in seconds; what works long does not."""

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from toy_images import paint, paint_classes

from coop_core.errors import ServiceError
from pipelines import console
from pipelines.commands import cli
from pipelines.commands import sweep as sweeping
from pipelines.environment import first_answer_within, hurried
from pipelines.records.registry import find_version
from pipelines.records.server import Records, connected
from pipelines.settings import Settings
from pipelines.sweeps.trainers import LocalTrainers

ROOT = Path(__file__).parents[1]
NAMES = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
TRAINER = """
import json, os, sys
json.dump(dict(os.environ), open("environment.json", "w"))
for line in sys.stdin:
    for order in json.loads(line):
        print(json.dumps({"event": "failed", "key": order["key"], "reason": "a trainer of a test"}), flush=True)
"""
COMMANDS = {
    "history": ["history"], "rollback": ["rollback"], "promote": ["promote"], "compare": ["compare"],
    "reconcile": ["reconcile"], "predict": ["predict", "a.png", "--model", "coop-prompt@champion"],
    "card": ["card", "--model", "coop-prompt@champion"], "sweep": ["sweep", "--local"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@contextmanager
def server(kind: str) -> Iterator[str]:
    """The address of a server that is gone, or of one that takes a connection and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen(50)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the commands need of a project."""
    paint(tmp_path / "a.png", 1)
    paint_classes(tmp_path / "toys", {"cat": 6, "dog": 6})
    text = (ROOT / "params.yaml").read_text().replace("data/source/fashion-mnist.yaml", "toys")
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_gives_up_at_once_on_a_server_that_is_gone(folder, command):
    with server("gone") as address:
        _gives_up(folder, address, command)


@pytest.mark.parametrize(
    "command", [name if name == "rollback" else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_a_command_gives_up_on_a_silent_server_within_15_seconds(folder, command):
    with server("silent") as address:
        _gives_up(folder, address, command)


def _gives_up(folder: Path, server: str, command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COOP_", "MLFLOW_"))}
    words = [sys.executable, "-m", "pipelines.commands.cli", *COMMANDS[command]]
    begun = time.monotonic()
    ended = subprocess.run(
        words, cwd=folder, env=environment | {"COOP_TRACKING_URI": server, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    assert time.monotonic() - begun < 15
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: MLflow at {server} does not answer (")
    assert ended.stderr.endswith("): correct COOP_TRACKING_URI or start the server\n")
    assert ended.stderr.count("\n") == 1


def test_what_a_person_sets_counts(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    with hurried():
        assert [os.environ[name] for name in NAMES] == ["0", "3"]
        assert first_answer_within() == 3
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    with hurried():
        assert first_answer_within() is None


def test_haste_ends_with_its_block():
    assert first_answer_within() is None
    with hurried():
        assert first_answer_within() == 5
    assert not set(NAMES) & set(os.environ)


@pytest.mark.slow
def test_a_sweep_and_its_trainers_are_patient(folder, monkeypatch):
    """They live for hours, and MLflow's server may be started again meanwhile."""
    monkeypatch.chdir(folder)
    trainers = partial(LocalTrainers, command=(sys.executable, "-c", TRAINER))
    monkeypatch.setattr(sweeping, "LocalTrainers", trainers)
    monkeypatch.setenv("COOP_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    own: list[dict[str, str]] = []
    monkeypatch.setattr(sweeping, "details", lambda standing: own.append(dict(os.environ)) or "")

    with pytest.raises(ServiceError, match="a trainer of a test"):
        cli.app(["sweep", "--local", "--jobs", "1"])

    assert not set(NAMES) & set(json.loads((folder / "environment.json").read_text()))
    assert own
    assert not any(set(NAMES) & set(environment) for environment in own)


def test_requests_that_are_tried_again_are_one_plain_line(caplog):
    console.prepare()
    logger = logging.getLogger("urllib3.connectionpool")
    for left in (2, 1):
        logger.warning("Retrying (%r) after connection broken by '%r': %s", left, OSError("refused"), "/api")
    logger.warning("another line")

    said = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert said == ["a server does not answer: it is asked again, for some minutes at most", "another line"]


def test_a_server_that_falls_silent_later_is_not_asked_for_minutes(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        settings = Settings(_env_file=None, tracking_uri=address, registered_model="coop-prompt")
        with connected(settings):  # MLflow is imported
            begun = time.monotonic()
        with hurried(), pytest.raises(ServiceError, match=r"says: .*; correct COOP_TRACKING_URI or start the server"):
            find_version("champion", Records(settings))
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("command", ["predict", "compare", "promote", "sweep"])
def test_help_asks_no_server(monkeypatch, capsys, command):
    monkeypatch.setenv("COOP_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.app([command, "--help"])
    assert f"{command} [OPTIONS]" in capsys.readouterr().out

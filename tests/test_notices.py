"""Notifications: what happens to the champion reaches COOP_NOTIFY_URL, and nobody is held up when it does not."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import psutil
import pytest
from running_services import Running, ask, brought_up, free_port, wait_until

from coop_core.errors import ServiceError
from pipelines.champion import promotion
from pipelines.records.registry import RegisteredVersion
from pipelines.records.server import Records
from pipelines.services.announcing import CHAMPION_CHANGED, GATE_REFUSED, announce
from pipelines.settings import Settings

SECRET = "token-that-nobody-may-see"


class Listener:
    """What was posted to it, as JSON, with the login that came along."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.heard: list = []
        self.logins: list[str | None] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def listening() -> Iterator[Listener]:
    found = Listener(free_port())

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.heard.append(json.loads(body))
            found.logins.append(self.headers["Authorization"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", found.port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


def settings(tmp_path, **changes: object) -> Settings:
    return Settings(_env_file=None, services_folder=tmp_path / "services", registered_model="coop-toys", **changes)


def test_a_new_champion_is_an_event_for_prefect(monkeypatch, tmp_path):
    monkeypatch.setattr(promotion, "set_champion", lambda *_: None)
    with listening() as prefect:
        there = settings(tmp_path, prefect_api_url=f"{prefect.address}/api", prefect_api_auth="me:word")
        promotion._move(RegisteredVersion("3", "run"), RegisteredVersion("2", "run"), "promote", Records(there),
                        SimpleNamespace(), "ann", None)  # fmt: skip
    ((event,),) = prefect.heard
    assert event["event"] == CHAMPION_CHANGED
    assert event["resource"]["prefect.resource.id"] == "coop.model.coop-toys"
    assert event["payload"] == {"text": "coop-toys: version 3 answers instead of 2 (promote, by ann)",
                                "model": "coop-toys", "version": "3", "previous": "2", "action": "promote"}  # fmt: skip
    assert prefect.logins == ["Basic bWU6d29yZA=="]


def test_a_prefect_that_does_not_answer_is_a_line_in_the_log(tmp_path, caplog):
    there = settings(tmp_path, prefect_api_url=f"http://127.0.0.1:{free_port()}/api", notify_url=SECRET)
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING):
        announce(GATE_REFUSED, there, model="coop-toys", text="no")
    assert time.monotonic() - begun < 5
    assert "nobody is notified" in caplog.text
    assert SECRET not in caplog.text + repr(there)


def test_without_prefect_nothing_is_asked(tmp_path, caplog):
    announce(GATE_REFUSED, settings(tmp_path, notify_url=SECRET), model="coop-toys", text="no")
    assert caplog.text == ""


@pytest.mark.parametrize("address", ["localhost/hook", f"ftp://host/{SECRET}", "https:///x"])
def test_what_is_no_address_is_a_sentence_that_does_not_show_it(address):
    from pipelines.flows.notices import arrange

    with pytest.raises(ServiceError, match=r"^COOP_NOTIFY_URL is no address: write https://HOST/PATH") as told:
        arrange(None, address)
    assert SECRET not in str(told.value)


@pytest.fixture(scope="module")
def heard(tmp_path_factory) -> Iterator[tuple[Running, Listener]]:
    """One `coop up` that tells a listener."""
    with (
        listening() as listener,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("COOP_NOTIFY_URL", f"{listener.address}/{SECRET}")
        with brought_up(tmp_path_factory.mktemp("services")) as running:
            yield running, listener


def told(listener: Listener, event: str) -> str:
    wait_until(lambda: any(one["event"] == event for one in listener.heard), 90)
    return next(one["text"] for one in listener.heard if one["event"] == event)


def fail_a_run(running: Running, name: str, message: str) -> None:
    """A run of a deployment that fails with this message."""
    deployment = ask(running, f"deployments/name/{name}")
    run = ask(running, f"deployments/{deployment['id']}/create_flow_run", {"state": {"type": "PENDING"}})
    failed = {"state": {"type": "FAILED", "name": "Failed", "message": message}, "force": True}
    ask(running, f"flow_runs/{run['id']}/set_state", failed)


@pytest.mark.slow
def test_what_happens_is_sent_on_with_its_sentence(heard):
    running, listener = heard
    for event, text in ((CHAMPION_CHANGED, 'version 3 "answers"'), (GATE_REFUSED, "the gate refused it")):
        own = running.settings.model_copy(update={"prefect_api_url": running.prefect})
        announce(event, own, model="coop-toys", text=text)
        assert told(listener, event) == text
    fail_a_run(running, "reconcile/reconcile", "of no interest")
    fail_a_run(running, "retrain/retrain", "dvc repro failed: no images")
    assert told(listener, "prefect.flow-run.Failed").endswith("Failed: dvc repro failed: no images")
    assert not any("of no interest" in one["text"] for one in listener.heard)


@pytest.mark.slow
def test_the_address_is_nowhere_to_be_read(heard):
    running, listener = heard
    told(listener, CHAMPION_CHANGED)
    logs = "".join(log.read_text(errors="replace") for log in (running.folder / "logs").iterdir())
    commands = " ".join(" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
    records = b"".join(file.read_bytes() for file in (running.folder / "prefect").glob("prefect.db*"))
    assert SECRET not in logs + commands + running.said + str(ask(running, "block_documents/filter", {}))
    assert SECRET.encode() not in records


@pytest.mark.slow
def test_without_the_setting_the_next_up_takes_the_automations_away(heard):
    running, _ = heard
    names = {one["name"] for one in ask(running, "automations/filter", {})}
    assert {"notify-champion", "notify-gate", "notify-retrain"} <= names
    ended = running.coop("up", COOP_NOTIFY_URL="")
    assert ended.returncode == 0, ended.stderr
    assert {one["name"] for one in ask(running, "automations/filter", {})} == {"crash-zombies", "retrain-on-drift"}

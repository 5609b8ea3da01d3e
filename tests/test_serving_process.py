"""A server as `coop serve` starts it: swaps and a kill cost no answer, and its page works in a browser."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import pytest
from registered import make_champion, register, registry_settings, renamed
from serving import NAMES, Server, ask, body_of, clients, coop_serve
from toy_images import toy_image

from pipelines.settings import Settings

pytestmark = [
    pytest.mark.slow,
    # MLflow's own, of its pages on agents; it appears once, in whichever test imports mlflow.pyfunc first.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]

WITHIN = 120
"""Seconds for whatever must happen."""
CHROMIUM = shutil.which("chromium")


class Registry(NamedTuple):
    folder: Path
    settings: Settings
    picture: Path

    @property
    def body(self) -> bytes:
        return body_of(self.picture.read_bytes())


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Registry:
    """Two versions with class names of their own, the first of them champion; and a third that is damaged."""
    folder = tmp_path_factory.mktemp("registry")
    settings = registry_settings(folder)
    for number, names in NAMES.items():
        assert register(renamed(names, folder / number), settings) == number
    broken = renamed(NAMES["1"], folder / "3")
    (broken / "context.safetensors").write_bytes(b"nothing of the kind")
    assert register(broken, settings) == "3"
    toy_image(1, size=(80, 60)).save(folder / "picture.jpg")
    return Registry(folder, settings, folder / "picture.jpg")


@pytest.fixture
def server(registry) -> Iterator[Server]:
    make_champion("1", registry.settings)
    with coop_serve(registry.folder, registry.settings) as running:
        yield running


def until(fulfilled: Callable[[], Any], seconds: float = WITHIN) -> Any:
    end = time.monotonic() + seconds
    while not (found := fulfilled()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def metric(server: Server, line: str) -> float:
    with urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    found = re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_no_request_fails_or_mixes_versions_while_the_champion_changes(registry, server) -> None:
    going, answers = threading.Event(), []
    going.set()
    load = threading.Thread(
        target=lambda: answers.extend(clients(server.port, [registry.body], count=4, each=going.is_set))
    )
    load.start()
    try:
        for number in ("2", "1", "2"):
            make_champion(number, registry.settings)
            until(lambda number=number: metric(server, f'coop_version{{version="{number}"}}') == 1)
    finally:
        going.clear()
        load.join()
    assert {answer.status for answer in answers} == {200}
    assert {answer.version for answer in answers} == {"1", "2"}
    assert all(set(answer.labels) <= set(NAMES[answer.version]) for answer in answers)


def test_a_damaged_version_leaves_the_old_one_answering_and_is_counted(registry, server) -> None:
    make_champion("3", registry.settings)
    until(lambda: metric(server, 'coop_reloads_total{outcome="failed"}') == 1)
    answer = ask_once(server, registry)
    assert (answer.status, answer.version) == (200, "1")
    assert "version 3 cannot be loaded, so version 1 answers on" in (registry.folder / "serve.log").read_text()


def test_told_to_stop_it_answers_what_is_under_way_first(registry, server) -> None:
    answers = []
    asking = [threading.Thread(target=lambda: answers.append(ask_once(server, registry))) for _ in range(12)]
    for thread in asking:
        thread.start()
    until(lambda: metric(server, "coop_requests_in_flight") > 0 or len(answers) == 12)
    server.process.send_signal(signal.SIGTERM)
    for thread in asking:
        thread.join()
    assert [answer.status for answer in answers] == [200] * 12
    assert server.process.wait(WITHIN) == 0


def test_after_a_kill_the_same_command_answers_again(registry, server) -> None:
    server.process.kill()
    server.process.wait()
    with coop_serve(registry.folder, registry.settings) as again:
        assert ask_once(again, registry).status == 200


def test_a_port_that_is_taken_is_a_sentence(registry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = subprocess.run(
            [*_coop(), "serve", "--port", str(taken.getsockname()[1])], cwd=registry.folder, capture_output=True,
            text=True, timeout=WITHIN,
        )  # fmt: skip
    assert ended.returncode == 2
    assert re.match(r"error: port \d+ on 127.0.0.1 cannot be had \(Address already in use\)", ended.stderr)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_shows_labels_and_the_version_of_a_picture_that_is_chosen(registry, server, tmp_path) -> None:
    with browser(tmp_path, f"http://127.0.0.1:{server.port}/") as page:
        page.choose("#file", registry.picture)
        said = until(lambda: _not_waiting(page.value("document.getElementById('said').textContent")))
        assert re.fullmatch(r"Version 1 says: one [abc]", said)
        rows = page.value("[...document.querySelectorAll('#answer tr')].map(row => row.cells[0].textContent)")
        assert sorted(rows) == sorted(NAMES["1"])
        (tmp_path / "text.png").write_text("no picture")
        page.choose("#file", tmp_path / "text.png")
        said = until(lambda: _not_waiting(page.value("document.querySelector('#said.fault')?.textContent")))
        assert said.startswith("the image cannot be read (no picture in one of the formats")
        assert page.value("document.querySelectorAll('#answer tr').length") == 0
        assert page.faults == []


def ask_once(server: Server, registry: Registry) -> Any:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=WITHIN)) as connection:
        return ask(connection, registry.body)


def _tabs(port: str) -> list[dict[str, Any]]:
    with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=20) as answer:
        return json.load(answer)


def _coop() -> list[str]:
    return [sys.executable, "-m", "pipelines.commands.cli"]


def _not_waiting(text: str | None) -> str:
    return "" if text in (None, "", "...") else str(text)


def _is_error(said: dict[str, Any]) -> bool:
    return said.get("method") == "Log.entryAdded" and said["params"]["entry"]["level"] == "error"


class Page:
    """A page in a browser, by Chromium's own protocol."""

    def __init__(self, connection: Any) -> None:
        self._connection, self._number, self.faults = connection, 0, list[str]()
        for domain in ("Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            said = json.loads(self._connection.recv(timeout=WITHIN))
            if said.get("method") == "Runtime.exceptionThrown" or _is_error(said):
                self.faults.append(json.dumps(said["params"]))
            if said.get("id") == self._number:
                return said["result"]

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def choose(self, selector: str, file: Path) -> None:
        def place() -> int:
            root = self.call("DOM.getDocument")["root"]["nodeId"]
            return int(self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"])

        node = until(place)                                                       # 0 before the page has loaded
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])


class browser:  # noqa: N801
    """Chromium without a window on one address; `with` gives its page."""

    def __init__(self, folder: Path, address: str) -> None:
        self._profile, self._address = folder / "profile", address

    def __enter__(self) -> Page:
        from websockets.sync.client import connect

        words = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
                 f"--user-data-dir={self._profile}", "--disable-dev-shm-usage", "--window-size=900,1000",
                 self._address]  # fmt: skip
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file = self._profile / "DevToolsActivePort"
        until(port_file.exists)
        port = until(lambda: port_file.read_text().split("\n")[0])
        found = until(lambda: [tab for tab in _tabs(port) if tab["type"] == "page" and tab["url"] == self._address])
        self._connection = connect(found[0]["webSocketDebuggerUrl"], max_size=None)
        self.page = Page(self._connection)
        until(lambda: self.page.value("document.readyState") == "complete")
        return self.page

    def __exit__(self, *error: object) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.wait()

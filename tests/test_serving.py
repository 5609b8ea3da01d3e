"""Serving: requests are bounded, batched and answered by one version each, and every fault is one sentence."""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from toy_images import toy_image

from coop_core.data.images import decoded
from coop_core.errors import DatasetError, ServiceError
from coop_core.predictor import Prediction
from pipelines.records.registry import RegisteredVersion
from pipelines.serving.batching import Batcher
from pipelines.serving.metrics import Metrics
from pipelines.serving.versions import Champion, Version
from pipelines.settings import Settings

# MLflow's own, of its pages on agents; it appears once, in whichever test imports mlflow.pyfunc first.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")

WITHIN = 20
"""Seconds for whatever must happen."""


class Names:
    """A predictor that answers with its own name, after its tower was let go."""

    def __init__(self, name: str) -> None:
        self.name, self.batches = name, list[int]()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.fault: Exception | None = None
        self.threshold = 0.0

    def view(self, image: bytes) -> Any:
        try:
            with decoded(image) as found:
                return np.asarray(found.image.resize((2, 2)), np.float32).transpose(2, 0, 1)
        except DatasetError as error:
            return error

    def rank(self, views: np.ndarray) -> list[Prediction]:
        assert self.may_answer.wait(WITHIN)
        if self.fault:
            raise self.fault
        self.batches.append(len(views))
        return [Prediction((self.name, "other"), (0.75, 0.25), self.threshold) for _ in views]


def png() -> bytes:
    buffer = io.BytesIO()
    toy_image(1, size=(40, 30)).save(buffer, format="PNG")
    return buffer.getvalue()


PICTURE = base64.b64encode(png()).decode()


def body(*images: Any, **more: Any) -> bytes:
    table = {"columns": ["image"], "data": [[image] for image in images]}
    return json.dumps({"dataframe_split": table, **more}).encode()


class Asked:
    """A server in this process, with what it is made of."""

    def __init__(self, *, queue: int = 8, token: str | None = None) -> None:
        from starlette.testclient import TestClient

        from pipelines.serving.app import Limits, make_app

        self.metrics, self.wanted = Metrics(), RegisteredVersion("1", "run")
        self.names = {"1": Names("one"), "2": Names("two")}
        self.champion = Champion(lambda: self.wanted, self.load, self.metrics)
        limits = Limits(batch_size=4, wait_seconds=0.05, queue=queue)
        app = make_app(self.champion, self.metrics, limits=limits, token=token)
        self.client = TestClient(app, base_url="http://127.0.0.1:5001", raise_server_exceptions=False)

    def load(self, wanted: RegisteredVersion, before: Version | None) -> Version:
        if wanted.number not in self.names:
            raise ServiceError("its file is damaged")
        return Version(wanted.number, wanted.run_id, self.names[wanted.number])

    def swap(self, number: str) -> None:
        self.wanted = RegisteredVersion(number, "run")
        self.champion.look()

    def post(self, content: bytes | None = None, **headers: str) -> Any:
        given = {"Content-Type": "application/json"} | {name.replace("_", "-"): v for name, v in headers.items()}
        return self.client.post("/invocations", content=body(PICTURE) if content is None else content, headers=given)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def running() -> Iterator[Callable[..., Asked]]:
    """Servers that have started, the champion being version 1."""
    entered = []

    def start(**options: Any) -> Asked:
        asked = Asked(**options)
        asked.champion.look()
        asked.client.__enter__()
        entered.append(asked.client)
        return asked

    yield start
    for client in entered:
        client.__exit__(None, None, None)


def until(fulfilled: Callable[[], bool]) -> None:
    end = time.monotonic() + WITHIN
    while not fulfilled():
        assert time.monotonic() < end
        time.sleep(0.01)


def problem_of(answer: Any, status: int) -> str:
    """The sentence of a problem with this status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert found["status"] == status
    assert "Traceback" not in answer.text
    return found["detail"]


def test_an_answer_names_its_version_in_the_row_and_in_the_head(running) -> None:
    answer = running().post()
    assert answer.status_code == 200
    assert answer.headers["x-coop-version"] == "1"
    assert answer.json() == {"predictions": [{"label": "one", "probability": 0.75, "labels": ["one", "other"],
                                              "probabilities": [0.75, 0.25], "error": "", "answer": "one",
                                              "version": "1"}]}  # fmt: skip


def test_top_says_how_many_classes_are_shown(running) -> None:
    answer = running().post(body(PICTURE, params={"top": 1}))
    assert answer.json()["predictions"][0]["labels"] == ["one"]


def test_a_bad_image_gets_its_sentence_and_the_others_their_answers(running) -> None:
    rows = running().post(body(PICTURE, base64.b64encode(b"text").decode(), 7, PICTURE)).json()["predictions"]
    assert [row["label"] for row in rows] == ["one", "", "", "one"]
    assert rows[1]["error"].startswith("the image cannot be read (no picture in one of the formats")
    assert rows[2]["error"] == "the image is given as int, not as base64 text"


def test_requests_at_the_same_time_share_a_batch(running) -> None:
    asked = running()
    names = asked.names["1"]
    names.may_answer.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(asked.post)
        until(lambda: asked.metric("coop_batch_images_count") == 1)               # the tower is busy with it
        rest = [pool.submit(asked.post) for _ in range(4)]
        until(lambda: asked.metric("coop_requests_in_flight") == 5)
        time.sleep(0.1)
        names.may_answer.set()
        assert {future.result(WITHIN).status_code for future in [first, *rest]} == {200}
    assert names.batches == [1, 4]


def test_beyond_the_queue_a_caller_is_told_when_to_come_back(running) -> None:
    asked = running(queue=2)
    asked.names["1"].may_answer.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(asked.post) for _ in range(2)]
        until(lambda: asked.metric("coop_requests_in_flight") == 2)
        turned = asked.post()
        asked.names["1"].may_answer.set()
        assert {future.result(WITHIN).status_code for future in waiting} == {200}
    assert problem_of(turned, 503) == "2 requests wait already: ask again in a second"
    assert turned.headers["retry-after"] == "1"
    assert asked.metric("coop_refused_total", why="queue full") == 1
    assert asked.post().status_code == 200


def test_a_request_keeps_the_version_that_it_began_with(running) -> None:
    asked = running()
    asked.names["1"].may_answer.clear()
    with ThreadPoolExecutor(1) as pool:
        old = pool.submit(asked.post, body(*[PICTURE] * 6))                       # two batches
        until(lambda: asked.metric("coop_batch_images_count") == 1)
        asked.swap("2")
        new = asked.champion.current
        asked.names["1"].may_answer.set()
        answer = old.result(WITHIN)
    assert {row["label"] for row in answer.json()["predictions"]} == {"one"}
    assert answer.headers["x-coop-version"] == "1"
    assert new is not None
    assert asked.post().json()["predictions"][0]["version"] == new.number == "2"


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_answering(running, caplog) -> None:
    asked = running()
    asked.swap("3")
    asked.swap("3")
    assert asked.post().headers["x-coop-version"] == "1"
    assert asked.metric("coop_reloads_total", outcome="failed") == 1               # and is not tried at every look
    assert caplog.text.count("version 3 cannot be loaded, so version 1 answers on: its file is damaged") == 1
    asked.swap("2")
    assert asked.post().headers["x-coop-version"] == "2"
    assert asked.metric("coop_version", version="2") == 1
    assert asked.metric("coop_version", version="1") == 0


def test_a_registry_that_does_not_answer_changes_nothing(running, caplog) -> None:
    asked = running()

    def silent() -> RegisteredVersion:
        raise ServiceError("MLflow does not answer")

    asked.champion._find = silent
    asked.champion.look()
    assert asked.post().status_code == 200
    assert asked.metric("coop_registry_faults_total") == 1
    assert "the registry cannot be asked: MLflow does not answer" in caplog.text


def test_before_there_is_a_champion_it_is_alive_and_not_ready() -> None:
    asked = Asked()
    asked.wanted = None
    with asked.client as client:
        assert client.get("/health").text == "alive\n"
        assert problem_of(client.get("/ready"), 503) == "no version answers yet"
        answer = asked.post()
        assert "no version answers yet" in problem_of(answer, 503)
        assert answer.headers["retry-after"] == "5"
        asked.swap("1")
        assert client.get("/ready").text == "version 1 answers\n"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the body is not JSON: send"),
        (b"{", "the body is not JSON: send"),
        (b"\xff\xfe", "the body is not JSON: send"),
        (b"[]", "the body is not what is asked for: send"),
        (b"null", "the body is not what is asked for: send"),
        (b'{"image": "abc"}', "the body is not what is asked for: send"),
        (b'{"dataframe_split": 3}', "Dataframe split format must be a dictionary"),
        (b'{"dataframe_split": {"columns": ["picture"], "data": [["a"]]}}', "Model is missing inputs ['image']"),
        (body(PICTURE, params={"top": -1}), "top is -1, but counts the classes"),
        (body(PICTURE, params={"top": "all"}), "Invalid parameters found"),
        (body(PICTURE, params=3), "Parameters must be a dictionary"),
        (body(*["a"] * 65), "the request has 65 images, and one may have 64: send them in several"),
        (b"[" * 100_000, "the body"),
    ],
)
def test_a_body_that_is_not_understood_is_a_sentence(running, content, sentence) -> None:
    detail = problem_of(running().post(content), 400)
    assert sentence in detail
    assert len(detail) < 400
    assert "\n" not in detail


def test_a_long_body_is_not_repeated_in_the_answer(running) -> None:
    content = b'{"dataframe_split": {"columns": ["x"], "data": [["' + b"a" * 5000 + b'"]]}}'
    assert "aaaa" not in running().post(content).text


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_too_large_is_refused_before_it_is_parsed(running, monkeypatch, announced) -> None:
    monkeypatch.setattr("pipelines.serving.entrance.MAX_BODY", 1 << 20)
    asked, content = running(), b"{" * (3 << 20)
    given = content if announced else iter([content[: 1 << 20]] * 3)
    detail = problem_of(asked.post(given), 413)
    assert detail == "the body is larger than 1 MB: send fewer or smaller images"
    assert asked.metric("coop_refused_total", why="body too large") == 1


def test_another_type_than_json_is_refused(running) -> None:
    assert "application/json" in problem_of(running().post(b"image\nabc", Content_Type="text/csv"), 415)


def test_a_fault_of_ours_is_not_the_callers(running, caplog) -> None:
    asked = running()
    asked.names["1"].fault = RuntimeError("secret detail")
    answer = asked.post()
    assert problem_of(answer, 500).startswith("the server failed to answer")
    assert "secret detail" not in answer.text
    assert "secret detail" in caplog.text
    asked.names["1"].fault = None
    assert asked.post().status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/invocations", 405), ("GET", "/etc/passwd", 404)])
def test_another_way_in_is_a_sentence(running, method, path, status) -> None:
    problem_of(running().client.request(method, path), status)


def test_with_a_token_only_its_bearer_is_answered(running) -> None:
    asked = running(token="correct horse battery")
    for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic correct horse battery"},
                  {"Authorization": "Bearer "}):  # fmt: skip
        answer = asked.post(**wrong)
        assert problem_of(answer, 401).startswith("the token is missing or wrong")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert asked.client.get("/metrics").status_code == 401
    assert {asked.client.get(path).status_code for path in ("/", "/health", "/ready")} == {200}
    assert asked.post(Authorization="Bearer correct horse battery").status_code == 200


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}])
def test_a_page_of_another_origin_is_refused(running, headers) -> None:
    problem_of(running().post(**headers), 403)


def test_our_own_page_is_answered(running) -> None:
    assert running().post(Origin="http://127.0.0.1:5001").status_code == 200


def test_metrics_are_prometheus_text(running) -> None:
    asked = running()
    asked.post(body(PICTURE, "no image"))
    text = asked.client.get("/metrics").text
    for line in ('coop_requests_total{status="200"} 1.0', 'coop_images_total{outcome="answered"} 1.0',
                 'coop_images_total{outcome="unreadable"} 1.0', 'coop_version{version="1"} 1.0',
                 'coop_answer_probability_bucket{le="0.8"} 1.0', "coop_batch_images_sum 1.0",
                 "coop_request_seconds_count 1.0", 'coop_reloads_total{outcome="failed"} 0.0'):  # fmt: skip
        assert line in text.splitlines()


def test_a_version_that_is_not_sure_enough_answers_null_with_its_guesses(running) -> None:
    asked = running()
    asked.names["1"].threshold = 0.8
    (said,) = asked.post().json()["predictions"]

    assert (said["answer"], said["label"], said["probability"]) == (None, "one", 0.75)
    assert asked.metric("coop_images_total", outcome="abstained") == 1
    asked.names["1"].threshold = 0.7
    assert asked.post().json()["predictions"][0]["answer"] == "one"


def test_the_page_loads_nothing_from_elsewhere(running) -> None:
    answer = running().client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http" not in answer.text.replace("<!doctype html>", "").lower().replace("meta http", "")


def test_a_batch_is_of_one_model_and_never_too_large() -> None:
    first, second, view = Names("one"), Names("two"), np.zeros((3, 2, 2), np.float32)
    batcher = Batcher(size=2, wait_seconds=0.2)
    first.may_answer.clear()
    futures = [batcher.submit(model, view) for model in (first, first, first, second, first)]
    first.may_answer.set()
    assert [future.result(WITHIN).labels[0] for future in futures] == ["one", "one", "one", "two", "one"]
    batcher.close()
    assert (first.batches, second.batches) == ([2, 1, 1], [1])


def test_what_was_submitted_is_answered_before_the_end() -> None:
    model = Names("one")
    batcher = Batcher(size=2, wait_seconds=0.01)
    futures = [batcher.submit(model, np.zeros((3, 2, 2), np.float32)) for _ in range(7)]
    batcher.close()
    assert all(future.done() for future in futures)


def test_others_are_let_in_with_a_token_alone() -> None:
    from pipelines.serving.app import Limits
    from pipelines.serving.server import serve

    with pytest.raises(ServiceError, match=r"^on 0.0.0.0 whoever reaches this machine gets answers: set COOP_SERVE_T"):
        serve(Settings(_env_file=None), host="0.0.0.0", port=1, limits=Limits())


def test_an_answer_in_two_pieces_waits_for_nobody() -> None:
    """With Nagle's algorithm the second piece waits 40 ms, until the first is acknowledged."""
    from pipelines.serving.server import listen

    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

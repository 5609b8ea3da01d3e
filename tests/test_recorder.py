"""Recorder: what is answered is on record, whole, bounded and private; and answering never suffers from it."""

import base64
import hashlib
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_serving import PICTURE, WITHIN, Names, body, png

from coop_core.errors import ServiceError
from coop_core.predictor import Prediction
from pipelines.serving import recorder as recording
from pipelines.serving.answered import Row, as_line, files_of, parsed, read_recorded
from pipelines.serving.metrics import Metrics
from pipelines.serving.recorder import Recorder
from pipelines.serving.versions import Version

# MLflow's own, of its pages on agents; it appears once, in whichever test imports mlflow.pyfunc first.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")

FEATURE = np.array([0.6, 0.8], np.float16)
VERSION = Version("3", "run-3", None)


def said(confidence: float = 0.75, *, threshold: float = 0.5, feature: np.ndarray = FEATURE) -> Prediction:
    return Prediction(("cat", "dog"), (confidence, 1 - confidence), threshold, feature)


def row(number: int, **changes: Any) -> Row:
    values = {"time": 1000.0 + number, "version": "3", "run": "run-3", "image": f"{number:064x}", "label": "cat",
              "confidence": 0.75, "answered": True, "feature": FEATURE}  # fmt: skip
    return Row(**values | changes)


def until(fulfilled: Callable[[], bool], seconds: float = WITHIN) -> None:
    end = time.monotonic() + seconds
    while not fulfilled():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def record(tmp_path):
    """A recorder in a folder of its own, ended with the test."""
    made = []

    def make(*, megabytes: int = 1, pictures: bool = False) -> tuple[Recorder, Metrics]:
        metrics = Metrics()
        made.append(Recorder(tmp_path / "records", metrics, megabytes=megabytes, pictures=pictures))
        return made[-1], metrics

    yield make
    for each in made:
        each.close()


def count(metrics: Metrics, outcome: str) -> float:
    return metrics.registry.get_sample_value("coop_records_total", {"outcome": outcome}) or 0.0


def test_an_answer_is_a_row_without_the_picture(record, tmp_path):
    recorder, metrics = record()
    recorder.put(VERSION, b"a picture", said(threshold=0.8))
    until(lambda: count(metrics, "kept") == 1)
    (found,) = read_recorded(tmp_path / "records", run="run-3", at_most=10).rows

    assert (found.version, found.label, found.confidence, found.answered) == ("3", "cat", 0.75, False)
    assert found.image == hashlib.sha256(b"a picture").hexdigest()
    assert abs(found.time - time.time()) < WITHIN
    assert found.feature.tolist() == FEATURE.tolist()
    assert [path.suffix for path in (tmp_path / "records").iterdir()] == [".jsonl"]
    assert b"a picture" not in files_of(tmp_path / "records")[0].read_bytes()


def test_nobody_else_can_read_what_is_recorded(record, tmp_path):
    recorder, metrics = record(pictures=True)
    recorder.put(VERSION, b"a picture", said())
    until(lambda: count(metrics, "kept") == 1)
    every = [tmp_path / "records", *(tmp_path / "records").rglob("*")]

    assert len(every) == 4
    assert {(path.is_dir(), path.stat().st_mode & 0o777) for path in every} == {(True, 0o700), (False, 0o600)}


def test_pictures_are_kept_where_that_is_asked_for_once_each(record, tmp_path):
    recorder, metrics = record(pictures=True)
    for picture in (b"one", b"two", b"one"):
        recorder.put(VERSION, picture, said())
    until(lambda: count(metrics, "kept") == 3)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "records").glob("*.pictures/*")}

    assert kept == {hashlib.sha256(picture).hexdigest(): picture for picture in (b"one", b"two")}


def test_the_newest_row_of_each_image_of_a_version_is_read(tmp_path):
    lines = [row(1), row(2), row(3, run="another"), row(1, label="dog")]
    (tmp_path / "answers-1.jsonl").write_bytes(b"".join(map(as_line, lines)))
    (tmp_path / "answers-2.jsonl").write_bytes(as_line(row(4)))
    found = read_recorded(tmp_path, run="run-3", at_most=10)

    assert [(its.image[-1], its.label) for its in found.rows] == [("4", "cat"), ("1", "dog"), ("2", "cat")]
    assert [its.image[-1] for its in read_recorded(tmp_path, run="run-3", at_most=2).rows] == ["4", "1"]


@pytest.mark.parametrize(
    "damage",
    [b'{"time": 1', b"\x00" * 50, b"[]", b"null", b'{"time": 1000.0}', as_line(row(1, confidence=2.0)),
     as_line(row(1, feature=FEATURE[:0])), as_line(row(1, feature=FEATURE * np.nan)), as_line(row(1, image="zz")),
     as_line(row(1)).replace(b'"cat"', b"7"), as_line(row(1)).replace(b'"label"', b'"more"'), as_line(row(1))[:-9]],
)  # fmt: skip
def test_what_is_no_whole_row_is_skipped_and_counted(tmp_path, damage):
    (tmp_path / "answers-1.jsonl").write_bytes(as_line(row(5)) + damage.rstrip(b"\n") + b"\n" + as_line(row(6)))
    found = read_recorded(tmp_path, run="run-3", at_most=10)

    assert [its.image[-1] for its in found.rows] == ["6", "5"]
    assert found.torn == 1


def test_a_kill_leaves_one_torn_row_at_most(tmp_path):
    """Wherever it strikes: what was written before is read, and a new server goes on beside it."""
    writing = (
        "import numpy as np, sys\nfrom pathlib import Path\nfrom pipelines.serving.metrics import Metrics\n"
        "from pipelines.serving.recorder import Recorder\nfrom pipelines.serving.versions import Version\n"
        "from coop_core.predictor import Prediction\n"
        "recorder = Recorder(Path(sys.argv[1]), Metrics(), megabytes=50, pictures=False)\n"
        "said = Prediction(('cat', 'dog'), (0.75, 0.25), 0.5, np.full(1280, 0.02, np.float16))\n"
        "n = 0\n"
        "while True:\n    recorder.put(Version('3', 'run-3', None), str(n).encode(), said)\n    n += 1\n"
    )
    with subprocess.Popen([sys.executable, "-c", writing, str(tmp_path)]) as process:
        until(lambda: sum(file.stat().st_size for file in files_of(tmp_path)) > 10**6, 120)
        process.send_signal(signal.SIGKILL)
    found = read_recorded(tmp_path, run="run-3", at_most=10**6)

    assert len(found.rows) > 200
    assert found.torn <= 1


def test_files_are_bounded_and_the_oldest_go(record, tmp_path):
    recorder, metrics = record(megabytes=1)
    feature = np.full(1280, 0.02, np.float16)
    for number in range(900):                                                     # 3.3 MB
        recorder.put(VERSION, str(number).encode(), said(feature=feature))
        until(lambda number=number: count(metrics, "kept") == number + 1)
    found = read_recorded(tmp_path / "records", run="run-3", at_most=1000)

    assert sum(file.stat().st_size for file in files_of(tmp_path / "records")) <= 1.01e6
    assert len(files_of(tmp_path / "records")) > 8
    assert 200 < len(found.rows) < 300
    assert found.rows[0].image == hashlib.sha256(b"899").hexdigest()


def test_pictures_count_and_go_with_their_rows(record, tmp_path):
    recorder, metrics = record(megabytes=1, pictures=True)
    for number in range(40):
        recorder.put(VERSION, str(number).encode() * 50_000, said())
        until(lambda number=number: count(metrics, "kept") == number + 1)
    left = [path for path in (tmp_path / "records").rglob("*") if path.is_file()]

    assert sum(path.stat().st_size for path in left) <= 1.1e6
    assert {path.with_suffix(".jsonl").exists() for path in (tmp_path / "records").glob("*.pictures")} == {True}


def test_a_server_that_is_started_often_keeps_so_many_files(record, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.serving.recorder._FILES", 3)
    for number in range(5):
        recorder, metrics = record()
        recorder.put(VERSION, str(number).encode(), said())
        until(lambda metrics=metrics: count(metrics, "kept") == 1)
    found = read_recorded(tmp_path / "records", run="run-3", at_most=10).rows

    assert len(files_of(tmp_path / "records")) == 3
    assert found[0].image == hashlib.sha256(b"4").hexdigest()


def test_a_server_that_is_started_often_leaves_no_empty_files(record, tmp_path):
    for _ in range(5):
        record()

    assert len(files_of(tmp_path / "records")) == 1


def test_rows_go_on_in_a_new_file_when_somebody_removed_the_old_one(record, tmp_path):
    recorder, metrics = record()
    recorder.put(VERSION, b"one", said())
    until(lambda: count(metrics, "kept") == 1)
    for file in files_of(tmp_path / "records"):
        file.unlink()
    recorder.put(VERSION, b"two", said())
    until(lambda: count(metrics, "kept") == 2)

    assert len(read_recorded(tmp_path / "records", run="run-3", at_most=10).rows) == 1


def test_a_full_disk_stops_the_recording_with_one_line_and_goes_on_when_there_is_space(
    record, tmp_path, caplog, monkeypatch
):
    """A limit of the process's files stands for the disk: the kernel takes the beginning of a row and no more."""
    monkeypatch.setattr(recording, "AGAIN_SECONDS", 0.0)
    recorder, metrics = record()
    feature, before = np.full(1280, 0.02, np.float16), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, before[1]))
        for number in range(4):
            recorder.put(VERSION, str(number).encode(), said(feature=feature))
        until(lambda: count(metrics, "kept") + count(metrics, "dropped") == 4)
        stopped = metrics.registry.get_sample_value("coop_recording")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (count(metrics, "kept"), count(metrics, "dropped"), stopped) == (2, 2, 0)
    assert caplog.text.count("answers are given on, but no longer recorded") == 1
    recorder.put(VERSION, b"again", said(feature=feature))
    until(lambda: count(metrics, "kept") == 3)
    found = read_recorded(tmp_path / "records", run="run-3", at_most=10)

    assert metrics.registry.get_sample_value("coop_recording") == 1
    assert (len(found.rows), found.torn) == (3, 0)                                 # the beginning was taken back


def test_a_refusing_disk_is_left_alone_for_a_while(record, monkeypatch):
    recorder, metrics = record()
    tried = []

    def refuse(item: Any) -> None:
        tried.append(item)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recorder, "_write", refuse)
    for number in range(5):
        recorder.put(VERSION, str(number).encode(), said())
    until(lambda: count(metrics, "dropped") == 5)

    assert len(tried) == 1


def test_nobody_waits_for_a_disk_that_hangs(record, monkeypatch):
    recorder, metrics = record()
    going_on = threading.Event()
    monkeypatch.setattr(recorder, "_write", lambda item: going_on.wait(WITHIN))
    begin = time.monotonic()
    for number in range(2000):
        recorder.put(VERSION, str(number).encode(), said())
    seconds = time.monotonic() - begin
    going_on.set()

    assert seconds < WITHIN / 2
    assert count(metrics, "dropped") > 900                                         # beyond the 1024 that wait


def test_a_folder_that_cannot_be_had_is_a_sentence_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ServiceError, match=r"^answers cannot be recorded in .* \(File exists\): correct COOP_SERVE_R"):
        Recorder(tmp_path / "file", Metrics(), megabytes=1, pictures=False)


class Featured(Names):
    """Answers with a feature, as a predictor does that was told to."""

    def rank(self, views: np.ndarray) -> list[Prediction]:
        return [said(feature=FEATURE) for _ in super().rank(views)]


def test_a_running_server_records_what_it_answers_and_nothing_else(record, tmp_path):
    from starlette.testclient import TestClient

    from pipelines.serving.app import Limits, make_app
    from pipelines.serving.versions import Champion

    recorder, metrics = record()
    champion = Champion(lambda: None, lambda wanted, now: VERSION, metrics)
    champion.current = Version("3", "run-3", Featured("cat"))
    app = make_app(champion, metrics, limits=Limits(batch_size=4, queue=8), token=None, recorder=recorder)
    with TestClient(app, base_url="http://127.0.0.1:5001") as client:
        sent = body(PICTURE, base64.b64encode(b"text").decode(), params={"top": 1})
        answer = client.post("/invocations", content=sent, headers={"Content-Type": "application/json"})
        until(lambda: count(metrics, "kept") == 1)
        shown = client.get("/metrics").text
    (found,) = read_recorded(tmp_path / "records", run="run-3", at_most=10).rows

    assert [its["label"] for its in answer.json()["predictions"]] == ["cat", ""]
    assert found.image == hashlib.sha256(png()).hexdigest()
    assert 'coop_records_total{outcome="kept"} 1.0' in shown.splitlines()
    assert "coop_recording 1.0" in shown.splitlines()


def test_a_row_is_one_line_of_json_that_other_programs_can_read():
    line = as_line(row(1, label='a "cat"\nwith ünï'))

    assert line.count(b"\n") == 1
    found = json.loads(line)
    assert np.frombuffer(base64.b64decode(found["feature"]), "<f2").tolist() == FEATURE.tolist()
    assert parsed(line).label == found["label"] == 'a "cat"\nwith ünï'


def test_the_predictor_hands_out_the_feature_that_it_answered_from(backbone, tmp_path):
    import torch
    from toy_images import toy_image
    from toy_prompt import write_prompt

    from coop_core.artifact import read_artifact
    from coop_core.judging.seen import small
    from coop_core.predictor import Predictor

    artifact = read_artifact(write_prompt(tmp_path / "prompt", backbone, ("cat", "dog")))
    views = np.stack([Predictor(artifact, backbone).view(toy_image(number, size=(40, 30))) for number in range(3)])
    plain, featured = (Predictor(artifact, backbone, with_features=told).rank(views) for told in (False, True))

    assert plain == featured
    assert [its.feature for its in plain] == [None] * 3
    wanted = small(backbone.encode_images(torch.from_numpy(views)))
    assert (np.stack([its.feature for its in featured]) == wanted).all()

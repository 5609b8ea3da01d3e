"""`coop gc`: what nothing needs goes, when it is asked for; what anything refers to stays."""

import fcntl
import os
import sqlite3
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coop_core.features.store import LOCK, FeatureStore
from coop_core.files import write_json
from pipelines import paths
from pipelines.commands.cli import app
from pipelines.records import retention
from pipelines.records.retention import BIN, DAY, FOLDERS, TRIALS, Spent
from pipelines.records.server import Records, connected
from pipelines.settings import Settings
from pipelines.upkeep import leavings

LONG_AGO = int(1000 * (time.time() - 40 * DAY))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Settings:
    """One SQLite file for all tests: making its tables takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    return Settings(_env_file=None, tracking_uri=f"sqlite:///{folder}/mlflow.db", cache_folder=folder / "cache",
                    artifact_location=(folder / "mlruns").as_uri())  # fmt: skip


@pytest.fixture
def settings(server, monkeypatch, tmp_path) -> Settings:
    """Experiments and a model of its own for each test, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    name = uuid.uuid4().hex[:8]
    return server.model_copy(update={
        "experiment": name, "registered_model": f"model-{name}", "cache_folder": tmp_path / "cache",
        "artifact_location": (tmp_path / "mlruns").as_uri(),
    })  # fmt: skip


@pytest.fixture
def run(settings) -> Callable[..., str]:
    """A run that ended forty days ago, with a file -> its id."""

    def make(
        status: str = "FINISHED", *, trial: bool = False, sweep: bool = False, deleted: bool = False, **tags: str
    ) -> str:
        with connected(settings) as mlflow:
            client = mlflow.MlflowClient()
            name = settings.experiment + ("-sweeps" if trial or sweep else "")
            tags = tags | ({retention.TRIAL: "key"} if trial else {})
            found = client.create_run(Records(settings).find_experiment(client, name), tags=tags).info.run_id
            client.log_text(found, "x" * 1000, "file.txt")
            client.set_terminated(found, status, end_time=LONG_AGO)
            if deleted:
                client.delete_run(found)
        with sqlite3.connect(settings.tracking_uri.removeprefix("sqlite:///")) as database:
            database.execute("UPDATE runs SET deleted_time = ? WHERE run_uuid = ? AND deleted_time IS NOT NULL",
                             (LONG_AGO, found))  # fmt: skip
        return found

    return make


def spent(settings: Settings, days: int = 30) -> list[tuple[str, str]]:
    return [(one.kind, one.id) for one in retention.find_spent(Records(settings), days=days).spent]


def ids(settings: Settings) -> set[str]:
    with sqlite3.connect(settings.tracking_uri.removeprefix("sqlite:///")) as database:
        return {name for (name,) in database.execute("SELECT run_uuid FROM runs")}


def discard(settings: Settings) -> int:
    return retention.discard(retention.find_spent(Records(settings), days=30).spent, Records(settings))


def register(settings: Settings, run_id: str, tag: Callable[..., Any] = lambda client, name: None) -> None:
    """A version whose run this is."""
    with connected(settings) as mlflow:
        client, name = mlflow.MlflowClient(), settings.registered_model
        client.create_registered_model(name)
        client.create_model_version(name, f"runs:/{run_id}/file.txt", run_id)
        tag(client, name)


def test_failed_trials_go_to_the_bin_and_out_of_it_when_they_have_lain_there_as_long(settings, run):
    failed, killed = run("FAILED", trial=True), run("KILLED", trial=True)
    run(trial=True)  # finished
    run("FAILED"), run("FAILED", sweep=True)  # no trials
    assert sorted(spent(settings)) == sorted([(TRIALS, failed), (TRIALS, killed)])
    assert spent(settings, days=50) == []

    assert discard(settings) == 2
    assert spent(settings) == []  # they have been in the bin for seconds
    assert {failed, killed} <= ids(settings)


def test_what_was_deleted_long_ago_goes_with_its_files(settings, run, tmp_path):
    gone, there = run(deleted=True), run()
    assert spent(settings) == [(BIN, gone)]
    assert discard(settings) == 1
    assert gone not in ids(settings)
    assert [place.name for place in (tmp_path / "mlruns").iterdir()] == [there]


def test_a_run_that_somebody_took_out_of_the_bin_meanwhile_stays(settings, run):
    back = run(deleted=True)
    found = retention.find_spent(Records(settings), days=30).spent
    with connected(settings) as mlflow:
        mlflow.MlflowClient().restore_run(back)
    retention.discard(found, Records(settings))

    assert back in ids(settings)


def test_a_sweep_is_finished_when_its_winner_is_on_record(settings, run):
    for name, tags in {"whole": {"coop.winner": "seed 1"}, "without": {}, "killed": {"coop.winner": "seed 2"}}.items():
        run("KILLED" if name == "killed" else "FINISHED", sweep=True, **{"mlflow.runName": name}, **tags)

    assert retention.finished_sweeps(Records(settings)) == {"whole"}


def test_a_run_that_a_version_refers_to_stays_even_in_the_bin(settings, run):
    kept = run(deleted=True)
    register(settings, kept)
    found = retention.find_spent(Records(settings), days=30)
    assert (found.spent, found.kept) == ([], 1)
    assert retention.discard([Spent(BIN, kept)], Records(settings)) == 0
    assert kept in ids(settings)


def test_a_run_of_a_version_that_was_champion_stays_when_the_version_is_gone(settings, run):
    before, other = run(deleted=True, **{"coop.version": "3"}), run(deleted=True, **{"coop.version": "4"})
    event = '{"time": "1", "action": "promote", "version": "5", "previous": "3", "by": "me"}'
    register(settings, run(), lambda client, name: client.set_registered_model_tag(name, "promotion.1", event))
    assert spent(settings) == [(BIN, other)]
    assert before in ids(settings)


def test_the_run_of_the_last_dvc_repro_stays(settings, run):
    last = run(deleted=True)
    assert spent(settings) == [(BIN, last)]
    write_json(paths.TRACKED, {"run_id": last, "model_name": settings.registered_model})
    assert spent(settings) == []


def test_the_model_that_a_deleted_run_logged_goes_unless_a_version_has_it(settings, run, tmp_path):
    runs = []
    for _ in range(2):
        with connected(settings) as mlflow:
            from mlflow.entities import LoggedModelOutput

            client = mlflow.MlflowClient()
            run_id = run()
            model = client.create_logged_model(client.get_run(run_id).info.experiment_id, "prompt", run_id)
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
            client.delete_run(run_id)
        runs.append((run_id, model.model_id))
    with sqlite3.connect(settings.tracking_uri.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE runs SET deleted_time = ? WHERE deleted_time IS NOT NULL", (LONG_AGO,))
    with connected(settings) as mlflow:
        client = mlflow.MlflowClient()
        client.create_registered_model(settings.registered_model)
        client.create_model_version(settings.registered_model, f"models:/{runs[1][1]}", None)
    with sqlite3.connect(settings.tracking_uri.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE model_versions SET run_id = NULL WHERE name = ?", (settings.registered_model,))
    assert discard(settings) == 2
    with sqlite3.connect(settings.tracking_uri.removeprefix("sqlite:///")) as database:
        left = {name for (name,) in database.execute("SELECT model_id FROM logged_models")}
    assert left & {runs[0][1], runs[1][1]} == {runs[1][1]}


def test_a_folder_that_no_record_knows_goes_when_it_is_old(settings, run, tmp_path):
    there = run()
    for name in ("a" * 32, "b" * 32, "no-run"):
        (tmp_path / "mlruns" / name / "artifacts").mkdir(parents=True)
    age(tmp_path / "mlruns", but={"b" * 32})
    assert spent(settings) == [(FOLDERS, "a" * 32)]
    assert discard(settings) == 1
    assert sorted(place.name for place in (tmp_path / "mlruns").iterdir()) == sorted([there, "b" * 32, "no-run"])


def age(folder: Path, *, but: set[str] = frozenset()) -> None:
    """Everything in a folder is forty days old; but some entries of it."""
    for place in folder.iterdir():
        if place.name not in but:
            for found in (*place.rglob("*"), place):
                os.utime(found, (LONG_AGO / 1000,) * 2)


def touched(place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    return place


def test_checkpoints_and_logs_go_when_nothing_has_written_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    old = [touched(tmp_path / "checkpoints/a.safetensors"), touched(tmp_path / "trainers/one/trainer-0.log").parent]
    age(tmp_path)
    touched(tmp_path / "checkpoints/b.safetensors"), touched(tmp_path / "trainers/two/trainer-0.log")
    found = leavings.find_leavings(tmp_path, days=30, sweeps=[])
    assert [one.place for one in found] == old
    old[0].touch()  # its training goes on meanwhile
    assert [leavings.remove(one, days=30) for one in found] == [False, True]
    assert [place.exists() for place in old] == [True, False]


def test_a_feature_store_goes_when_nobody_has_opened_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "three"):
        FeatureStore(tmp_path / "features" / name)
    touched(tmp_path / "features/of somebody else/file")
    age(tmp_path / "features")
    FeatureStore(tmp_path / "features/two")  # read, and nothing is written
    found = leavings.find_leavings(tmp_path, days=30, sweeps=[])
    assert [one.place.name for one in found] == ["one", "three"]
    with (tmp_path / "features/one" / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [leavings.remove(one, days=30) for one in found] == [False, True]
    FeatureStore(tmp_path / "features/one")  # opened since the list was made
    assert not leavings.remove(found[0], days=30)
    age(tmp_path / "features")
    assert leavings.remove(found[0], days=30)


def test_artifacts_stay_while_dvc_lock_or_mlflow_does_not_have_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("judged/own", "judged/before", "sweeps/known", "sweeps/unknown", "choice/one", "reproduce/one"):
        touched(tmp_path / "artifacts" / name / "file")
    age(tmp_path / "artifacts")
    gone = [one.place for one in leavings.find_leavings(tmp_path, days=30, sweeps={"known"})]
    assert gone == [paths.SWEEPS / "known"]
    Path("dvc.lock").write_text("stages:\n  evaluate:\n    outs:\n    - path: artifacts/judged/own\n")
    gone = [one.place for one in leavings.find_leavings(tmp_path, days=30, sweeps=())]
    assert gone == [paths.JUDGED / "before"]


def test_it_shows_first_and_removes_when_it_is_told(settings, run, monkeypatch, tmp_path):
    Path("params.yaml").touch()
    run("FAILED", trial=True), run(deleted=True)
    for name in ("experiment", "registered_model", "tracking_uri", "cache_folder"):
        monkeypatch.setenv(f"COOP_{name.upper()}", str(getattr(settings, name)))
    touched(tmp_path / "cache/checkpoints/a.safetensors")
    age(tmp_path / "cache")

    shown = CliRunner().invoke(app, ["gc"], catch_exceptions=False).output
    assert [kind for kind in (TRIALS, BIN, leavings.CHECKPOINTS, FOLDERS) if kind in shown] == [
        TRIALS, BIN, leavings.CHECKPOINTS]  # fmt: skip
    assert "coop gc --days 30 --delete" in shown
    assert "removed" not in shown
    assert "removed 3" in CliRunner().invoke(app, ["gc", "--delete"]).output
    assert "nothing has been out of use for 30 days" in CliRunner().invoke(app, ["gc"]).output


def test_a_server_keeps_its_bin_and_says_who_may_empty_it(settings, run, monkeypatch):
    run(deleted=True)
    monkeypatch.setattr(retention, "_store", lambda: None)
    found = retention.find_spent(Records(settings), days=30)
    assert found.spent == []
    assert "lets its clients move runs to its bin and no further" in found.refused

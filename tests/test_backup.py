"""`coop backup` and `coop restore`: what is kept comes back, elsewhere too; what is wrong is one sentence."""

import os
import shutil
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coop_core.errors import ArtifactError, ServiceError
from coop_core.files import read_json, write_json
from pipelines import paths
from pipelines.commands.cli import app
from pipelines.settings import Settings, load_settings
from pipelines.upkeep import bucket, databases
from pipelines.upkeep.backup import backup
from pipelines.upkeep.restore import Restored, restore

ROOT = Path(__file__).parents[1]


def write_database(file: Path, *values: str) -> Path:
    """A database with the one table of MLflow's that a backup reads, and another beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE experiments (id INTEGER, artifact_location VARCHAR(256))")
        database.execute("CREATE TABLE runs (artifact_uri VARCHAR(200), note TEXT)")
        database.executemany("INSERT INTO experiments VALUES (1, ?)", [(value,) for value in values])
        database.commit()
    return file


def read_values(file: Path) -> list[str]:
    with closing(sqlite3.connect(file)) as database:
        return [value for (value,) in database.execute("SELECT artifact_location FROM experiments ORDER BY 1")]


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.fixture
def project(monkeypatch, tmp_path) -> Path:
    """A project with records, in the current folder."""
    for name in ("MLFLOW_BACKEND_STORE_URI", "PREFECT_API_DATABASE_CONNECTION_URL"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "old place"
    write_database(folder / "mlflow.db", (folder / "mlruns").as_uri(), str(folder / "mlruns/0"))
    write_database(folder / ".services/prefect/prefect.db", "of Prefect")
    write(folder / "mlruns/1/artifacts/file.txt", "of a run")
    write(folder / ".dvc-storage/files/ab", "of DVC")
    write(folder / "params.yaml", "seed: 1\n")
    write(folder / ".env", f"COOP_TRACKING_URI=sqlite:///{folder}/mlflow.db\n")
    write_json(folder / paths.TRACKED, {"model_name": "coop-toys", "tracking_uri": f"sqlite:///{folder}/mlflow.db"})
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def kept(project, tmp_path) -> Path:
    backup(load_settings(), tmp_path / "backup.tar", secrets=True)
    return tmp_path / "backup.tar"


@pytest.fixture
def elsewhere(project, monkeypatch, tmp_path) -> Path:
    folder = tmp_path / "new place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def put_back(file: Path, *, agreed: bool = False, asked: list[str] | None = None) -> Restored:
    def agree(there):
        (asked if asked is not None else []).extend(there)
        return agreed

    return restore(load_settings(), file, agree=agree)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_everything_comes_back_in_another_folder_and_names_it(project, kept, elsewhere):
    shutil.rmtree(project)
    found = put_back(kept)

    assert read_values(elsewhere / "mlflow.db") == sorted([(elsewhere / "mlruns").as_uri(), f"{elsewhere}/mlruns/0"])
    assert found.changed == 2
    assert read_values(elsewhere / ".services/prefect/prefect.db") == ["of Prefect"]
    assert (elsewhere / "mlruns/1/artifacts/file.txt").read_text() == "of a run"
    assert (elsewhere / ".dvc-storage/files/ab").read_text() == "of DVC"
    assert (elsewhere / ".env").read_text() == f"COOP_TRACKING_URI=sqlite:///{elsewhere}/mlflow.db\n"
    assert (elsewhere / ".env").stat().st_mode & 0o777 == 0o600
    assert read_json(elsewhere / paths.TRACKED)["tracking_uri"] == f"sqlite:///{elsewhere}/mlflow.db"
    assert found.aside is None
    assert not list(elsewhere.glob(".restore-*"))


def test_in_the_same_folder_nothing_is_written_anew(project, kept):
    before = files(project)
    shutil.rmtree(project / "mlruns")
    (project / "mlflow.db").unlink()
    assert put_back(kept, agreed=True).changed == 0
    assert read_values(project / "mlflow.db")
    assert files(project / "mlruns") == {"1/artifacts/file.txt": before["mlruns/1/artifacts/file.txt"]}


def test_what_is_there_stays_until_somebody_agrees_and_is_moved_aside_then(kept, elsewhere):
    write_database(elsewhere / "mlflow.db", "mine")
    write(elsewhere / "mlflow.db-wal", "mine")  # what SQLite had yet to write into it, and would into the next
    write(elsewhere / "mlruns/2/artifacts/other.txt", "mine")
    write(elsewhere / "params.yaml", "seed: 1\n")  # as in the backup
    before, asked = files(elsewhere), []
    with pytest.raises(ServiceError, match=r"nothing was restored, because .*/mlflow\.db.* would be replaced"):
        put_back(kept, asked=asked)
    assert files(elsewhere) == before
    assert asked == [str(elsewhere / "mlflow.db"), str(elsewhere / "mlruns")]

    found = put_back(kept, agreed=True)
    assert (found.aside / "mlflow.db-wal").read_text() == "mine"
    (found.aside / "mlflow.db-wal").unlink()
    assert read_values(found.aside / "mlflow.db") == ["mine"]
    assert read_values(elsewhere / "mlflow.db") != ["mine"]
    assert not (elsewhere / "mlflow.db-wal").exists()
    assert files(found.aside / "mlruns") == {"2/artifacts/other.txt": b"mine"}
    assert files(elsewhere / "mlruns") == {"1/artifacts/file.txt": b"of a run"}


def test_nothing_is_put_below_services_that_run(kept, elsewhere, monkeypatch):
    monkeypatch.setattr("pipelines.services.supervision.connect", lambda folder: object())
    with pytest.raises(ServiceError, match="the services run here: `make down`, then restore"):
        put_back(kept, agreed=True)
    assert list(elsewhere.iterdir()) == []


def test_an_archive_that_was_cut_or_changed_is_a_sentence_and_changes_nothing(kept, elsewhere):
    whole = kept.read_bytes()
    for size in (0, 100, 512, 5000, len(whole) // 2, len(whole) - 15000):
        kept.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"backup\.tar is .*(cut short|no backup)"):
            put_back(kept)
    at = whole.index(b"of a run")
    kept.write_bytes(whole[:at] + b"on" + whole[at + 2 :])
    with pytest.raises(ArtifactError, match="not every file in it is as it was"):
        put_back(kept)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", ["../outside", "/etc/outside"])
def test_a_member_that_leads_out_of_the_folder_is_refused(elsewhere, tmp_path, name):
    file = write(tmp_path / "file", "text")
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        about = tar.gettarinfo(file)
        about.name = name
        with file.open("rb") as stream:
            tar.addfile(about, stream)
    with pytest.raises(ArtifactError, match="which no backup does"):
        put_back(tmp_path / "bad.tar")


def test_no_archive_and_one_that_is_there_are_sentences(project, tmp_path):
    with pytest.raises(ArtifactError, match="there is no backup"):
        put_back(tmp_path / "none.tar")
    mine = write(tmp_path / "mine.tar", "mine")
    with pytest.raises(ArtifactError, match="is there already: name another file"):
        backup(load_settings(), mine, secrets=True)
    assert mine.read_text() == "mine"


def test_a_compressed_archive_comes_back_too_and_a_cut_one_is_a_sentence(project, elsewhere, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    file = tmp_path / "backup.tar.gz"
    backup(load_settings(), file, secrets=True)
    monkeypatch.chdir(elsewhere)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="cut short"):
        put_back(file)
    file.write_bytes(whole)
    assert put_back(file).changed == 2


def test_a_backup_is_for_its_user_alone_and_leaves_secrets_out_when_told(project, kept, tmp_path):
    assert kept.stat().st_mode & 0o777 == 0o600
    assert b"COOP_TRACKING_URI" in kept.read_bytes()
    backup(load_settings(), tmp_path / "open.tar", secrets=False)
    assert b"COOP_TRACKING_URI" not in (tmp_path / "open.tar").read_bytes()


def test_a_backup_that_fails_leaves_no_file(project, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.upkeep.backup.roots", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backup(load_settings(), tmp_path / "new/backup.tar", secrets=True)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_backup_has_its_name_once_it_is_on_the_disk(project, tmp_path, monkeypatch):
    file, seen = tmp_path / "backup.tar", []
    monkeypatch.setattr("os.fsync", lambda handle: seen.append((os.fstat(handle).st_size, file.exists())))
    backup(load_settings(), file, secrets=True)

    assert seen == [(file.stat().st_size, False)]


def test_a_database_that_is_written_to_is_copied_as_it_was_at_one_moment(project, tmp_path):
    with closing(sqlite3.connect(project / "mlflow.db")) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("INSERT INTO experiments VALUES (2, 'committed')")
        writer.commit()
        writer.execute("INSERT INTO experiments VALUES (3, 'half done')")
        databases.dump(databases.parse(f"sqlite:///{project}/mlflow.db"), tmp_path / "copy")
    assert "committed" in read_values(tmp_path / "copy")
    assert "half done" not in read_values(tmp_path / "copy")


def test_an_address_is_written_anew_where_it_is_the_place_or_below_it_and_nowhere_else(tmp_path):
    values = ["/a/mlruns", "/a/mlruns/0", "file:///a/mlruns/1", "/a/mlruns-other", "see /a/mlruns", "/b/a/mlruns"]
    url = databases.parse(f"sqlite:///{write_database(tmp_path / 'x.db', *values)}")
    assert databases.relocate(url, {"/a/mlruns": "/new", "file:///a/mlruns": "file:///new"}) == 3
    assert read_values(tmp_path / "x.db") == sorted(["/new", "/new/0", "file:///new/1", *values[3:]])


def test_a_password_goes_to_postgresql_s_programs_in_their_environment_alone(monkeypatch, tmp_path):
    told = tmp_path / "told"
    fake = write(tmp_path / "bin/pg_dump", f'#!/bin/sh\necho "$@ | $PGHOST $PGUSER $PGPASSWORD" > {told}\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    url = databases.parse("postgresql://me:hidden@db.example/records")
    with pytest.raises(ServiceError, match=r"pg_dump failed for postgresql://me:\*\*\*@db.example/records"):
        databases.dump(url, tmp_path / "copy")
    words, _, environment = told.read_text().strip().partition(" | ")

    assert "hidden" not in words
    assert environment == "db.example me hidden"


@pytest.mark.parametrize(
    ("address", "said"),
    [(None, r"there is no bucket no-such \(404 NoSuchBucket\): correct its name, or AWS_ENDPOINT_URL_S3$"),
     ("http://127.0.0.1:1", r"http://127\.0\.0\.1:1 does not answer .*: check the network and AWS_ENDPOINT_URL_S3$"),
     ("127.0.0.1", r"Invalid endpoint: 127\.0\.0\.1: AWS_ENDPOINT_URL_S3 is http://HOST:PORT or https://HOST$")],
)  # fmt: skip
def test_a_bucket_that_does_not_answer_is_a_sentence_with_its_variables(monkeypatch, s3_endpoint, address, said):
    given = {"AWS_ENDPOINT_URL_S3": address or s3_endpoint, "AWS_ACCESS_KEY_ID": "key", "NO_PROXY": "127.0.0.1",
             "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    with pytest.raises(ServiceError, match=f"^s3://no-such/files: {said}"):
        bucket.is_empty("s3://no-such/files")


def test_a_restore_has_a_connection_for_each_thread_of_its_uploads():
    """With fewer, urllib3 throws connections away and warns of each."""
    from boto3.s3.transfer import TransferConfig

    with bucket._client("s3://no-such/files") as (client, _, _):
        assert client.meta.config.max_pool_connections >= TransferConfig().max_concurrency
        assert (client.meta.config.retries or {}).get("total_max_attempts", 5) >= 5


def test_a_backup_of_other_versions_says_so_when_it_comes_back(project, elsewhere, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    monkeypatch.setattr("pipelines.upkeep.backup.version", lambda name: "0.1")
    backup(load_settings(), tmp_path / "old.tar", secrets=True)
    monkeypatch.chdir(elsewhere)

    assert [note.partition(" and ")[0] for note in put_back(tmp_path / "old.tar").notes] == [
        "the backup was made with mlflow 0.1", "the backup was made with prefect 0.1"]  # fmt: skip


def test_records_of_a_server_elsewhere_are_kept_on_its_machine(project, tmp_path):
    there = Settings(_env_file=None, tracking_uri="http://mlflow.example:5000")
    with pytest.raises(ServiceError, match="on its machine, with the variables"):
        backup(there, tmp_path / "x.tar", secrets=True)


def test_another_kind_of_database_is_a_sentence_without_its_password(kept, elsewhere, monkeypatch):
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "mysql://me:hidden@host/db")
    with pytest.raises(ServiceError, match="only SQLite and PostgreSQL") as told:
        put_back(kept)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql://me:hidden@127.0.0.1:1/db")
    with pytest.raises(ArtifactError, match="a sqlite database for mlflow, and here is one of postgresql") as other:
        put_back(kept)
    assert "hidden" not in str(told.value) + str(other.value)


def test_the_commands_say_what_was_kept_and_what_came_back(project, monkeypatch, tmp_path):
    said = CliRunner().invoke(app, ["backup", str(tmp_path / "b.tar")], catch_exceptions=False).output
    assert f"mlflow: sqlite:///{project}/mlflow.db" in said
    assert "which you alone can read; it may hold passwords" in said
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    write(Path("params.yaml"), "seed: 2\n")
    refused = CliRunner().invoke(app, ["restore", str(tmp_path / "b.tar")])
    assert "would be replaced" in str(refused.exception)
    assert Path("params.yaml").read_text() == "seed: 2\n"
    said = CliRunner().invoke(app, ["restore", str(tmp_path / "b.tar"), "--yes"], catch_exceptions=False).output
    assert "2 addresses in MLflow's records were written anew" in said
    assert "coop predict --model coop-toys@champion" in said

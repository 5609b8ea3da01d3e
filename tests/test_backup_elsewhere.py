"""A project is kept, destroyed, and put back under another path and host name: its champion answers, from SQLite and
PostgreSQL."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from running_services import free_port
from toy_images import paint
from toy_prompt import write_prompt

from coop_core.backbone import load_backbone
from coop_core.files import write_json
from pipelines import paths
from pipelines.records.registry import CHAMPION
from pipelines.records.served import log_model
from pipelines.records.server import Records, connected
from pipelines.settings import Settings

pytestmark = [
    pytest.mark.slow,
    # MLflow's own, of its pages on agents; it appears once, in whichever test imports mlflow.pyfunc first.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]
ROOT = Path(__file__).parents[1]
PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
BUCKET = "s3://records/mlflow"
OTHER_HOST = ("unshare", "--uts", "sh", "-c", 'hostname other-host && exec "$@"', "sh") if os.geteuid() == 0 else ()
"""Before a command: it runs on a machine of another name; for root alone."""


@pytest.fixture(scope="module", autouse=True)
def _own_environment() -> Iterator[None]:
    """No telemetry, no progress bars, and no login of one test's database in another's."""
    before = dict(os.environ)
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false")
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def prompt(tmp_path_factory) -> Path:
    return write_prompt(tmp_path_factory.mktemp("prompt") / "prompt", load_backbone("mini", None), ("cat", "dog"))


def make_project(folder: Path, prompt: Path, address: str, location: str | None = None) -> None:
    """A project whose champion is in these records."""
    folder.mkdir()
    (folder / "params.yaml").write_text("seed: 1\n")
    settings = Settings(_env_file=None, tracking_uri=address, artifact_location=location)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with connected(settings) as mlflow:
            client = mlflow.MlflowClient()
            with mlflow.start_run(experiment_id=Records(settings).find_experiment(client, "coop")):
                model = log_model(mlflow, prompt)
            version = mlflow.register_model(model.model_uri, "coop-toys")
            client.set_registered_model_alias("coop-toys", CHAMPION, version.version)
        write_json(paths.TRACKED, {"model_name": "coop-toys", "run_id": version.run_id})
    finally:
        os.chdir(before)


def coop(folder: Path, *words: str, on: Sequence[str] = (), **variables: str) -> str:
    """What a command of ours says, in a folder, as another process."""
    command = [*on, sys.executable, "-m", "pipelines.commands.cli", *words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COOP_", "MLFLOW_"))}
    ended = subprocess.run(command, cwd=folder, env=environment | {"PYTHONPATH": PATH} | variables,
                           capture_output=True, text=True, timeout=300)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def answer(folder: Path, *, on: Sequence[str] = (), **variables: str) -> str:
    paint(folder / "photo.png", 1)
    words = ("predict", "--model", "coop-toys@champion", str(folder / "photo.png"))
    return coop(folder, *words, on=on, **variables)


def test_the_champion_answers_from_another_path_and_host(prompt, tmp_path):
    name = [sys.executable, "-c", "import socket; print(socket.gethostname())"]
    here, there = (subprocess.check_output([*on, *name], text=True).strip() for on in ((), OTHER_HOST))
    assert (here != there) == (os.geteuid() == 0)
    old, new = tmp_path / "old place", tmp_path / "new place"
    make_project(old, prompt, f"sqlite:///{old}/mlflow.db")
    said = answer(old)
    coop(old, "backup", str(tmp_path / "backup.tar"))
    shutil.rmtree(old)
    new.mkdir()
    (new / "dvc.yaml").touch()
    put = coop(new, "restore", str(tmp_path / "backup.tar"), on=OTHER_HOST)
    assert put.startswith(f"from {here}:{old}, ")
    assert f"files: {new}/mlruns" in put
    assert answer(new, on=OTHER_HOST).split("\t", 1)[1] == said.split("\t", 1)[1]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory) -> Iterator[str]:
    """A server of PostgreSQL's on a free port -> the address without a database."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").is_dir() else []
    if not binaries:
        pytest.skip("PostgreSQL's server is not installed (Debian: postgresql)")
    pytest.importorskip("psycopg", reason="the extra `server` is not installed")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="pg-") as place:
        folder, port = Path(place) / "data", free_port()
        user = []
        if os.getuid() == 0:  # PostgreSQL does not run as root
            shutil.chown(place, "postgres")
            user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        password = Path(place) / "password"
        password.write_text("hidden-word\n")
        password.chmod(0o644)

        def run(*words: str) -> None:
            done = subprocess.run([*user, str(binaries[-1] / words[0]), *words[1:]], capture_output=True, text=True,
                                  cwd=place, timeout=120)  # fmt: skip
            assert done.returncode == 0, done.stderr

        run("initdb", "-D", str(folder), "-U", "mlflow", "-A", "scram-sha-256", f"--pwfile={password}", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {place} -c fsync=off"
        run("pg_ctl", "-D", str(folder), "-l", str(folder / "log"), "-w", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://mlflow:hidden-word@127.0.0.1:{port}"
        finally:
            run("pg_ctl", "-D", str(folder), "-m", "immediate", "stop")


def new_database(postgres: str, name: str) -> str:
    import psycopg

    with psycopg.connect(f"{postgres.replace('+psycopg', '')}/postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {name}")
    return f"{postgres}/{name}"


def variables(records: str, prefect: str, folder: Path) -> dict[str, str]:
    return {"MLFLOW_BACKEND_STORE_URI": records, "COOP_TRACKING_URI": records,
            "PREFECT_API_DATABASE_CONNECTION_URL": prefect.replace("psycopg", "asyncpg"),
            "COOP_SERVICES_FOLDER": str(folder / "services")}  # fmt: skip


def test_records_in_postgresql_answer_from_another_path_and_database(prompt, postgres, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    records, prefect = new_database(postgres, "records"), new_database(postgres, "prefect")
    make_project(old, prompt, records, (old / "mlruns").as_uri())
    said = answer(old, **variables(records, prefect, old))
    kept = coop(old, "backup", str(tmp_path / "b.tar"), **variables(records, prefect, old))
    assert "hidden-word" not in kept
    shutil.rmtree(old)
    for name in ("records", "prefect"):
        new_database(postgres, name)
    new.mkdir()
    (new / "dvc.yaml").touch()
    there = variables(new_database(postgres, "records_anew"), prefect, new)
    put = coop(new, "restore", str(tmp_path / "b.tar"), **there)
    assert "written anew" in put
    assert answer(new, **there).split("\t", 1)[1] == said.split("\t", 1)[1]

    command = [sys.executable, "-m", "pipelines.commands.cli", "restore", str(tmp_path / "b.tar")]
    refused = subprocess.run(command, cwd=new, env=os.environ | {"PYTHONPATH": PATH} | there,
                             capture_output=True, text=True, stdin=subprocess.DEVNULL)  # fmt: skip
    assert refused.returncode == 2
    assert "nothing was restored" in refused.stderr
    assert "hidden-word" not in refused.stderr + refused.stdout


def test_files_in_a_bucket_come_back_into_another(prompt, tmp_path, monkeypatch, s3_endpoint):
    keys = {"AWS_ENDPOINT_URL_S3": s3_endpoint, "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    import boto3

    client = boto3.client("s3")
    for name in ("records", "elsewhere"):
        client.create_bucket(Bucket=name)
    old, new = tmp_path / "old", tmp_path / "new"
    make_project(old, prompt, f"sqlite:///{old}/mlflow.db", BUCKET)
    said = answer(old)
    coop(old, "backup", str(tmp_path / "b.tar"))
    shutil.rmtree(old)
    for found in client.list_objects_v2(Bucket="records")["Contents"]:
        client.delete_object(Bucket="records", Key=found["Key"])
    new.mkdir()
    (new / "dvc.yaml").touch()
    there = {"MLFLOW_ARTIFACTS_DESTINATION": "s3://elsewhere/files"}
    assert "files: s3://elsewhere/files" in coop(new, "restore", str(tmp_path / "b.tar"), **there)
    assert answer(new).split("\t", 1)[1] == said.split("\t", 1)[1]

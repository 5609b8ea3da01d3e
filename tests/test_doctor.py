"""`coop doctor`: what is reachable and what is not, with the way out; it leaves nothing and waits for nobody long."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from pydantic import SecretStr

from coop_core.errors import ServiceError
from pipelines.commands import examination
from pipelines.commands.examination import examine, print_findings
from pipelines.finding import Finding, unused, well, wrong
from pipelines.records import probes as records_probes
from pipelines.records.probes import probe_mlflow
from pipelines.records.server import connected
from pipelines.services.probes import probe_clock, probe_machine, probe_prefect
from pipelines.settings import Settings
from pipelines.sources import bucket
from pipelines.sources.probes import probe_remote, probe_sources

ROOT = Path(__file__).parents[1]


class Server:
    """Answers GET and POST from `pages`, with a clock that can be wrong; asks for a login where one is set."""

    def __init__(self) -> None:
        self.pages: dict[str, Any] = {}
        self.ahead, self.login = 0.0, ""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                wanted = f"Basic {base64.b64encode(server.login.encode()).decode()}"
                refused = server.login and self.headers.get("Authorization") != wanted
                known = self.path in server.pages
                body = json.dumps(server.pages.get(self.path, {})).encode()
                self.send_response_only(401 if refused else 200 if known else 404)
                self.send_header("Date", formatdate(time.time() + server.ahead, usegmt=True))
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def make(monkeypatch, tmp_path) -> Callable[..., Settings]:
    """Settings in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith(("COOP_", "AWS_", "MLFLOW_TRACKING")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    return lambda **given: Settings(_env_file=None, device="cpu", **given)


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def names_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_without_records_nothing_is_made(make, tmp_path):
    found = by_name(probe_mlflow(make()))

    assert found["tracking"] == unused("tracking", "mlflow.db is not there yet: the first `dvc repro` makes it")
    assert {finding.state for finding in found.values()} == {"unused"}
    assert names_below(tmp_path) == set()


def test_records_that_can_be_written_are_well_and_nothing_of_the_trial_stays(make, tmp_path):
    settings = make(tracking_uri=f"sqlite:///{tmp_path}/own.db")
    with connected(settings) as mlflow:
        mlflow.MlflowClient().create_experiment("coop", artifact_location=(tmp_path / "files").as_uri())
    before = names_below(tmp_path)

    found = by_name(probe_mlflow(settings))

    assert {name: finding.state for name, finding in found.items()} == {
        "tracking": "well", "registry write": "well", "artifacts write": "well"
    }  # fmt: skip
    with connected(settings) as mlflow:
        assert mlflow.MlflowClient().search_registered_models() == []
    assert names_below(tmp_path) == before


def test_a_registry_that_may_only_be_read_is_wrong(make, monkeypatch, tmp_path):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    def refuse(client: Any, name: str) -> None:
        raise MlflowException("Permission denied", PERMISSION_DENIED)

    settings = make(tracking_uri=f"sqlite:///{tmp_path}/own.db")
    with connected(settings) as mlflow:
        mlflow.MlflowClient().create_experiment("coop", artifact_location=(tmp_path / "files").as_uri())
    monkeypatch.setattr("mlflow.tracking.client.MlflowClient.create_registered_model", refuse)
    found = by_name(probe_mlflow(settings))

    assert (found["tracking"].state, found["registry write"].state) == ("well", "wrong")
    assert "forbids this (403)" in found["registry write"].said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a folder that is nobody's to write: /proc, which root reads too")
def test_a_place_of_files_that_cannot_be_written_is_wrong_with_its_name(make, tmp_path):
    settings = make(tracking_uri=f"sqlite:///{tmp_path}/own.db")
    with connected(settings) as mlflow:
        mlflow.MlflowClient().create_experiment("coop", artifact_location="file:///proc/files")

    found = by_name(probe_mlflow(settings))["artifacts write"]

    assert found.state == "wrong"
    assert re.match(r"file:///proc/files cannot be written \(.*\): correct COOP_ARTIFACT_LOCATION", found.said)


def test_a_silent_server_costs_at_most_ten_seconds_and_is_told_how_to_mend(make, silent):
    begin = time.monotonic()
    found = by_name(probe_mlflow(make(tracking_uri=silent)))

    assert time.monotonic() - begin < 10
    assert found["tracking"].state == "wrong"
    assert "does not answer (nothing in 5 s): correct COOP_TRACKING_URI or start the server" in found["tracking"].said
    assert found["registry write"].said == "not tried: tracking does not answer"


def test_a_silent_prefect_costs_at_most_ten_seconds(make, silent):
    begin = time.monotonic()
    found = by_name(probe_prefect(make(prefect_api_url=f"{silent}/api")))

    assert time.monotonic() - begin < 10
    assert found["Prefect"] == wrong(
        "Prefect", f"{silent} no answer: correct COOP_PREFECT_API_URL or start that server"
    )


def test_a_database_that_is_away_costs_no_minutes(make):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = by_name(probe_mlflow(make(tracking_uri=f"postgresql+psycopg://127.0.0.1:{port}/mlflow")))

    assert found["tracking"].said == (f"PostgreSQL at 127.0.0.1:{port} does not answer (Connection refused): correct "
                                      "COOP_TRACKING_URI or start it")  # fmt: skip


def test_pools_are_well_by_their_live_workers(make, server):
    workers = [{"name": "a", "status": "ONLINE"}, {"name": "b", "status": "OFFLINE"}]
    server.pages = {"/api/admin/version": "3", "/api/work_pools/photos-cpu/workers/filter": workers,
                    "/api/work_pools/photos-gpu/workers/filter": workers[1:]}  # fmt: skip
    found = by_name(probe_prefect(make(prefect_api_url=f"{server.address}/api", project_name="photos")))

    assert found["Prefect"] == well("Prefect", server.address)
    assert found["pool photos-cpu"] == well("pool photos-cpu", "1 live: a")
    assert found["pool photos-gpu"].said == "has no live worker, so that runs stay Late: `make up` starts one"


def test_a_pool_that_is_not_there_is_wrong(make, server):
    server.pages = {"/api/admin/version": "3"}

    found = by_name(probe_prefect(make(prefect_api_url=f"{server.address}/api")))

    assert "is not on the server" in found["pool gpu"].said


def test_a_login_that_prefect_refuses_is_told_by_its_variable(make, server):
    server.login, server.pages = "coop:right", {"/api/admin/version": "3"}
    wrong_one = SecretStr("coop:wrong")
    found = by_name(probe_prefect(make(prefect_api_url=f"{server.address}/api", prefect_api_auth=wrong_one)))

    mend = "set COOP_PREFECT_API_AUTH to NAME:PASSWORD"
    assert found["Prefect"].said == f"{server.address} refuses the login (401): {mend}"
    assert "wrong" not in found["Prefect"].said


@pytest.mark.parametrize(("ahead", "said"), [(-300, "ahead of"), (300, "behind")])
def test_a_clock_that_differs_is_wrong(make, server, ahead, said):
    server.ahead = ahead
    (found,) = probe_clock(make(prefect_api_url=f"{server.address}/api"))

    assert found.state == "wrong"
    assert re.match(rf"this machine is (29|30)\d s {said} Prefect's server: set both by NTP", found.said)


def test_a_clock_that_agrees_is_well(make, server):
    (found,) = probe_clock(make(tracking_uri=server.address))

    assert found.state == "well"
    assert re.fullmatch(r"within \d+ s of MLflow", found.said)


def test_a_full_disk_is_wrong(make, monkeypatch):
    monkeypatch.setattr("pipelines.services.probes._FREE_BYTES", 1 << 60)

    assert by_name(probe_machine(make()))["disk"].state == "wrong"


def test_a_full_disk_of_the_cache_is_wrong(make, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    full = {str(tmp_path / "elsewhere"): usage._replace(free=10**8)}
    monkeypatch.setattr("shutil.disk_usage", lambda place: full.get(str(place), usage._replace(free=10**12)))
    (tmp_path / "elsewhere").mkdir()
    said = by_name(probe_machine(make(cache_folder=tmp_path / "elsewhere/cache")))["disk"].said

    assert said.startswith(f"0.1 GB free at {tmp_path}/elsewhere: free space, or set COOP_CACHE_FOLDER elsewhere")


def test_a_device_that_is_not_there_is_wrong(make, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings = make().model_copy(update={"device": "cuda"})

    assert "COOP_DEVICE is cuda" in by_name(probe_machine(settings))["GPU"].said


def test_a_gpu_that_torch_cannot_use_is_wrong(make, monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings = make().model_copy(update={"device": "auto"})

    assert by_name(probe_machine(settings))["GPU"].said.startswith("nvidia-smi lists 1, but torch sees none")


def with_remote(folder: Path, *lines: str) -> None:
    (folder / ".dvc").mkdir()
    text = "\n".join(["[core]", "remote = storage", "no_scm = true", "['remote \"storage\"']", *lines])
    (folder / ".dvc/config").write_text(text + "\n")


def test_a_remote_in_a_folder_is_written_and_left_as_it_was(make, tmp_path):
    make()
    with_remote(tmp_path, "url = ../store")
    (tmp_path / "store").mkdir()

    assert list(probe_remote()) == [well("DVC remote", f"{tmp_path}/store: written and removed")]
    assert names_below(tmp_path / "store") == set()


def test_without_a_remote_nothing_is_wrong(make):
    make()

    assert [finding.state for finding in probe_remote()] == ["unused"]


def test_a_remote_on_s3_that_is_away_is_wrong_and_shows_no_secret(make, tmp_path):
    make()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with_remote(tmp_path, "url = s3://bucket/dvc", f"endpointurl = {address}", "access_key_id = key",
                "secret_access_key = hidden-word", "region = us-east-1")  # fmt: skip
    (found,) = probe_remote()

    assert found.state == "wrong"
    assert f"{address} does not answer" in found.said
    assert "hidden-word" not in found.said


@pytest.fixture
def store(make, monkeypatch, s3_endpoint) -> Any:
    """A client of an S3 server with a bucket that forgets nothing."""
    make()
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    httpx.post(f"{s3_endpoint}/moto-api/reset", trust_env=False)
    client = bucket.connect(s3_endpoint, "key", "secret", region="us-east-1")
    client.create_bucket(Bucket="bucket")
    client.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
    return client


@pytest.mark.parametrize(("name", "state"), [("bucket", "well"), ("no-bucket", "wrong")])
def test_a_remote_on_s3_is_written_and_left_as_it_was(store, s3_endpoint, tmp_path, name, state):
    with_remote(tmp_path, f"url = s3://{name}/dvc", f"endpointurl = {s3_endpoint}", "access_key_id = key",
                "secret_access_key = secret", "region = us-east-1")  # fmt: skip
    (found,) = probe_remote()
    history = store.list_object_versions(Bucket="bucket")

    assert found.state == state
    assert state == "well" or found.said.endswith("correct its name, or endpointurl by `dvc remote modify`")
    assert len(history.get("Versions", [])) == len(history.get("DeleteMarkers", [])) == (state == "well")


def test_a_source_on_s3_is_read(store, make, s3_endpoint, tmp_path):
    card = ("name: pictures\ntitle: pictures\nlayout: folders\nfiles:\n  - name: a.tar\n    unpack: true\n"
            f"    sha256: {'a' * 64}\n    sources: [s3://bucket/a.tar]\n")  # fmt: skip
    (tmp_path / "card.yaml").write_text(card)
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("data/source/fashion-mnist.yaml", "card.yaml"))
    keys = {name: SecretStr("key") for name in ("s3_access_key_id", "s3_secret_access_key")}
    settings = make(s3_endpoint_url=s3_endpoint, **keys)

    (missing,) = probe_sources(settings)
    store.put_object(Bucket="bucket", Key="a.tar", Body=b"content")
    assert missing.state == "wrong"
    assert "a.tar" in missing.said
    assert list(probe_sources(settings)) == [well("S3 sources", "bucket: readable")]


def test_a_card_without_a_bucket_needs_none(make, tmp_path):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())

    assert [finding.state for finding in probe_sources(make())] == ["unused"]


def test_a_check_that_comes_to_no_end_does_not_keep_the_table(make, monkeypatch):
    monkeypatch.setattr(examination, "WITHIN_SECONDS", 0.2)
    monkeypatch.setattr(examination, "probe_remote", lambda: iter(lambda: time.sleep(30), None))
    others_are_well(monkeypatch)

    assert "came to no end" in by_name(examine(make()))["DVC remote"].said


@pytest.mark.parametrize(
    ("fault", "found"),
    [(ServiceError("it does not answer: start it"), wrong("DVC remote", "it does not answer: start it")),
     (ImportError(name="s3fs"), unused("DVC remote", "cannot be looked at without the Python module s3fs"))],
)  # fmt: skip
def test_a_check_that_fails_is_a_line_of_the_table(make, monkeypatch, fault, found):
    def fail() -> list[Finding]:
        raise fault

    monkeypatch.setattr(examination, "probe_remote", fail)
    others_are_well(monkeypatch)

    assert by_name(examine(make()))["DVC remote"] == found


def others_are_well(monkeypatch) -> None:
    for name in ("probe_mlflow", "probe_prefect", "probe_clock", "probe_machine", "probe_sources"):
        monkeypatch.setattr(examination, name, lambda settings: [well("this", "is well")])


def test_the_table_fits_eighty_columns_and_says_whether_all_is_well(capsys):
    said = "[x] http://a-host.example:5000/with/a/long/address does not answer: correct COOP_TRACKING_URI or start it"

    assert not print_findings([wrong("tracking", said), well("disk", "9 GB free")], as_json=False)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "[x]" in shown
    assert print_findings([well("disk", "9 GB free")], as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"name": "disk", "state": "well", "said": "9 GB free"}]


@pytest.mark.parametrize(
    ("variables", "status"),
    [({"COOP_TRACKING_URI": "http://127.0.0.1:1"}, 1), ({"COOP_TRACKING_URL": "x"}, 2), ({}, 0)],
)
def test_the_exit_status_is_of_what_was_found(tmp_path, variables, status):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COOP_")}
    ended = subprocess.run([sys.executable, "-m", "pipelines.commands.cli", "doctor"], cwd=tmp_path,
                           env=environment | variables | {"COOP_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
                           capture_output=True, text=True, timeout=120)  # fmt: skip

    assert ended.returncode == status, ended.stdout + ended.stderr
    assert names_below(tmp_path) == set()


def test_a_file_that_was_tried_elsewhere_is_removed(monkeypatch, tmp_path):
    from mlflow.store.artifact import artifact_repository_registry
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    tried = []

    class Elsewhere(LocalArtifactRepository):
        def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
            super().log_artifact(local_file, artifact_path)
            tried.extend(path.name for path in tmp_path.rglob("*.txt"))

    monkeypatch.setattr(artifact_repository_registry, "get_artifact_repository",
                        lambda place: Elsewhere((tmp_path / "bucket").as_uri()))  # fmt: skip
    records_probes._write_there("s3://bucket/coop-doctor-1")

    assert tried == ["probe.txt"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

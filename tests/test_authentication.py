"""Authentication: whoever may use the servers can run commands, so nobody may without the login of their folder."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from running_services import ROOT, Running, ask, ask_again, brought_up, free_port, request, wait_for_run, wait_until

from coop_core.errors import ServiceError
from pipelines.environment import service_environment, use_prefect
from pipelines.logins import LOGIN, find_login, make_login, prepare_login, write_private
from pipelines.records.server import connected
from pipelines.services import local, supervision
from pipelines.settings import Settings, prefect_login, store_address, tracking_login

CANARY = "xyzzy-pass/word@1"
QUOTED = "xyzzy-pass%2Fword%401"


class Server(HTTPServer):
    """Answers every request alike, and remembers what was sent with it."""

    status, location = 200, ""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.logins: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.logins.append(self.headers.get("Authorization"))
        self.send_response(self.server.status)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def plain(monkeypatch, tmp_path) -> Path:
    """A folder to work in, and no setting of whoever runs the tests."""
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):  # a login that is used ends with its test
        monkeypatch.setenv(name, "")
    for name in os.environ:
        if name.upper().startswith(("COOP_", "MLFLOW_TRACKING", "PREFECT_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_login_is_made_once_for_its_user_alone(tmp_path):
    login = make_login(tmp_path / "services")

    assert make_login(tmp_path / "services") == find_login(tmp_path / "services") == login
    assert (tmp_path / "services" / LOGIN).stat().st_mode & 0o777 == 0o600
    assert len(login.partition(":")[2]) >= 40
    assert make_login(tmp_path / "others") != login


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_login_that_others_can_read_is_refused(tmp_path, mode):
    make_login(tmp_path)
    (tmp_path / LOGIN).chmod(mode)

    with pytest.raises(ServiceError, match=rf"login holds a password and other users can read it \(mode {mode:o}\)"):
        find_login(tmp_path)


@pytest.mark.parametrize("text", ["", "coop", "coop:", ":password", "coop:pass word", "coop:passwört"])
def test_a_damaged_login_is_refused_without_being_shown(tmp_path, text):
    write_private(tmp_path / LOGIN, text)

    with pytest.raises(ServiceError, match=r"login is not NAME:PASSWORD: remove it") as refused:
        find_login(tmp_path)
    assert not text or text not in str(refused.value).replace("NAME:PASSWORD", "")


def test_the_services_folder_is_closed_to_other_users(tmp_path):
    folder = tmp_path / "services"
    folder.mkdir(mode=0o755)
    with supervision.alone(folder):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_mlflow_users_end_with_the_login_they_began_with(tmp_path):
    prepare_login(tmp_path)
    (tmp_path / "mlflow-users.db").touch()
    prepare_login(tmp_path)
    assert (tmp_path / "mlflow-users.db").exists()

    (tmp_path / LOGIN).unlink()
    prepare_login(tmp_path)
    assert not (tmp_path / "mlflow-users.db").exists()


def test_a_file_that_does_not_fit_on_the_disk_is_named_and_the_old_one_stays(tmp_path):
    """Past a limit on a file's size a write fails as on a full disk."""
    write_private(tmp_path / "file", "old")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="file") as failed:
            write_private(tmp_path / "file", "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

    assert failed.value.filename == str(tmp_path / "file")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_no_command_and_no_file_of_the_supervisor_holds_the_password(plain):
    settings = Settings(_env_file=None, services_folder=plain / "services")
    login = make_login(settings.services_folder)
    shared = service_environment(plain, prefect_api_url="http://127.0.0.1:1/api", tracking_uri="http://127.0.0.1:2")

    text = supervision.configuration(local.plan(settings, []), plain, shared)

    assert "prefect server start" in text
    assert login.partition(":")[2] not in text


@pytest.mark.parametrize(
    ("status", "said"),
    [(200, ""), (401, "refuses the login (401)"), (403, "forbids us to ask (403)"), (500, "answers 500")],
)
def test_a_server_is_well_only_when_it_answers_to_the_login(server, status, said):
    server.status = status

    assert supervision.fault(server.url, "coop:secret") == said
    assert server.logins == ["Basic Y29vcDpzZWNyZXQ="]


def test_a_server_that_is_away_is_not_well():
    assert supervision.fault(f"http://127.0.0.1:{free_port()}", "coop:secret") == "no answer"


def test_the_login_does_not_follow_an_answer_to_another_server(server):
    with Server() as other:
        thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.status, server.location = 302, f"{other.url}/elsewhere"
        supervision.fault(server.url, "coop:secret")
        other.shutdown()
        thread.join()

    assert other.logins == [None]


def test_commands_find_the_login_of_their_own_servers_and_of_no_other(plain):
    own = Settings(_env_file=None, prefect_api_url="http://127.0.0.1:4200/api", tracking_uri="http://localhost:5000")
    login = make_login(plain / ".services")

    assert prefect_login(own) == ":".join(tracking_login(own)) == login
    for host in ("127.0.0.1:4201", "prefect.example:4200", "127.0.0.1.example:4200"):
        other = Settings(_env_file=None, prefect_api_url=f"http://{host}/api", tracking_uri=f"http://{host}")
        assert prefect_login(other) is tracking_login(other) is None


def test_a_login_of_the_settings_comes_first(plain):
    make_login(plain / ".services")
    settings = Settings(
        _env_file=None, prefect_api_url="http://127.0.0.1:4200/api", tracking_uri="http://127.0.0.1:5000",
        prefect_api_auth="ann:one", tracking_username="ann", tracking_password="two",
    )  # fmt: skip

    assert prefect_login(settings) == "ann:one"
    assert tracking_login(settings) == ("ann", "two")


def test_prefect_on_this_machine_gets_the_login_beside_its_client_and_another_does_not(plain, monkeypatch):
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_API_AUTH_STRING", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    login = make_login(plain / "services")
    use_prefect("http://prefect.example:4200/api", plain / "services/client")
    assert os.environ["PREFECT_API_AUTH_STRING"] == ""

    use_prefect("http://127.0.0.1:4200/api", plain / "services/client")
    assert os.environ["PREFECT_API_AUTH_STRING"] == login


@pytest.mark.parametrize(("status", "said"), [(401, "refuses the login"), (403, "forbids this")])
def test_mlflow_that_refuses_is_a_sentence_that_names_the_settings(server, plain, monkeypatch, status, said):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.status = status
    settings = Settings(_env_file=None, tracking_uri=server.url.replace("//", f"//ann:{QUOTED}@"))

    with (
        pytest.raises(ServiceError, match=rf"^MLflow at {server.url} {said} .*COOP_TRACKING_USERNAME") as refused,
        connected(settings) as mlflow,
    ):
        mlflow.MlflowClient().get_experiment_by_name("any")

    assert "xyzzy" not in str(refused.value)
    assert server.logins == ["Basic YW5uOnh5enp5LXBhc3Mvd29yZEAx"]  # ann and the canary


@pytest.mark.parametrize("status", [401, 403])
def test_prefect_that_refuses_is_a_sentence_that_names_the_setting(server, status):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from pipelines.flows.client import cancel_orphans
    from pipelines.flows.pools import bootstrap

    server.status = status
    with temporary_settings({PREFECT_API_URL: server.url}):
        with pytest.raises(ServiceError, match=rf"^Prefect at {server.url} .*\({status}\).* COOP_PREFECT_API_AUTH"):
            cancel_orphans()
        with pytest.raises(ServiceError, match=rf"^Prefect at {server.url} .*\({status}\).* PREFECT_API_AUTH_STRING"):
            bootstrap(server.url)


def test_a_database_whose_driver_is_missing_is_a_sentence_without_the_password(plain):
    settings = Settings(_env_file=None, tracking_uri=f"mysql+nodriver://ann:{QUOTED}@127.0.0.1:1/db")

    assert store_address(settings) == f"mysql+nodriver://ann:{QUOTED}@127.0.0.1:1/db"
    with pytest.raises(ServiceError, match=r"^MLflow at mysql\+nodriver://127\.0\.0\.1:1/db ") as refused, \
            connected(settings) as mlflow:  # fmt: skip
        mlflow.MlflowClient().get_experiment_by_name("any")
    assert "xyzzy" not in str(refused.value)


@pytest.mark.parametrize("words", [["compare"], ["history"], ["ui"], ["card", "--model", "coop-prompt@champion"]])
def test_a_password_in_an_address_is_printed_by_no_command(plain, words):
    """The server is away, which is when addresses are shown."""
    away = f"http://ann:{QUOTED}@127.0.0.1:{free_port()}"
    settings = {"COOP_TRACKING_URI": away, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "PYTHONPATH": str(ROOT),
                "COOP_REGISTERED_MODEL": "toys"}  # fmt: skip
    command = [sys.executable, "-m", "pipelines.commands.cli", *words]
    ended = subprocess.run(command, cwd=plain, env=os.environ | settings, capture_output=True, text=True)

    assert ended.returncode == 2
    assert "http://127.0.0.1:" in ended.stderr
    assert "xyzzy" not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("name", "by"),
    [("Ann", "claimed: Ann"), ("gate", "claimed: gate"), ("", "claimed: a person, in Prefect"),
     (" Ann\n2026-01-01  promote\x1b[0m ", "claimed: Ann 2026-01-01 promote [0m"),
     ("x" * 999, "claimed: " + "x" * 100)],
)  # fmt: skip
def test_the_name_in_an_approval_is_recorded_as_claimed(name, by):
    from pipelines.flows.promote import Approval

    assert Approval(name=name).by == by


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    """One `coop up` for all slow tests."""
    with brought_up(tmp_path_factory.mktemp("services")) as found:
        yield found


def run_a_command(running: Running, marker: Path, login: str | None) -> list[int]:
    """What let any user of the machine run commands: a flow, a deployment whose command is a shell line, a run."""
    command = {"command": f"touch {marker}"}
    statuses = []

    def post(path: str, body: dict) -> str:
        status, content = ask_again(running, path, body, login=login)
        statuses.append(status)
        return json.loads(content)["id"] if status < 300 else str(uuid4())

    flow = post("flows/", {"name": "planted"})
    planted = {"name": marker.name, "flow_id": flow, "work_pool_name": "cpu", "job_variables": command}
    deployment = post("deployments/", planted | {"entrypoint": "planted.py:planted", "path": str(marker.parent)})
    post(f"deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})
    return statuses


@pytest.mark.slow
def test_only_with_the_login_three_requests_run_a_command(running, tmp_path):
    """The run with the login shows that the requests are the right ones."""
    for number, login in enumerate([None, "coop:", "coop:wrong", "admin:pass"]):
        assert run_a_command(running, tmp_path / f"planted-{number}", login) == [401, 401, 401]

    assert run_a_command(running, tmp_path / "own", running.login) == [201, 201, 201]
    wait_until(lambda: (tmp_path / "own").exists(), 60)
    assert {file.name for file in tmp_path.iterdir()} == {"own"}


@pytest.mark.slow
def test_a_page_of_another_origin_may_not_ask(running):
    asks = {"Origin": "http://page.example", "Access_Control_Request_Method": "POST",
            "Access_Control_Request_Headers": "authorization,content-type"}  # fmt: skip
    own = asks | {"Origin": running.prefect.removesuffix("/api")}

    assert request(f"{running.prefect}/flows/", method="OPTIONS", **asks)[0] == 400
    assert request(f"{running.prefect}/flows/", method="OPTIONS", **own)[0] == 200
    path = f"{running.mlflow}/api/2.0/mlflow/experiments/create"
    assert "access-control-allow-origin" not in {name.lower() for name in request(path, method="OPTIONS", **asks)[1]}
    assert request(path, {"name": "planted"}, login=running.login, Origin="http://page.example")[0] == 403


@pytest.mark.slow
def test_under_another_host_name_nothing_is_told(running):
    """A page whose name is made to lead to this machine has no login; MLflow refuses its name besides."""
    named = {"Host": "page.example"}
    asked = f"{running.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"

    assert request(f"{running.prefect}/admin/version", **named)[0] == 401
    assert request(asked, login=running.login, **named)[0] == 403
    assert request(asked, login=running.login)[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("path", ["events/in", "events/out", "logs/out", "work_pools/cpu/workers/connect"])
def test_a_websocket_without_the_login_is_closed(running, path):
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    where = f"{running.prefect.replace('http', 'ws')}/{path}"
    with connect(where, subprotocols=["prefect"], proxy=None) as socket:
        socket.send(json.dumps({"type": "auth", "token": "coop:wrong"}))
        with pytest.raises(ConnectionClosed, match="1008"):
            socket.recv(timeout=10)


@pytest.mark.slow
def test_mlflow_reads_and_writes_no_file_for_whoever_has_no_login(running, tmp_path):
    """With it, an experiment may lie anywhere, and a server reads and writes there with its own rights."""
    api = f"{running.mlflow}/api/2.0/mlflow"
    planted = {"name": "planted", "artifact_location": tmp_path.as_uri()}

    assert request(f"{api}/experiments/create", planted)[0] == 401
    status, _, content = request(f"{api}/experiments/create", planted, login=running.login)
    assert status == 200
    experiment = {"experiment_id": json.loads(content)["experiment_id"]}
    _, _, content = request(f"{api}/runs/create", experiment, login=running.login)
    run = json.loads(content)["run"]["info"]["run_id"]
    for path in (f"get-artifact?run_uuid={run}&path=x", f"ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=x"):
        assert request(f"{running.mlflow}/{path}", {"x": 1} if "upload" in path else None)[0] == 401


@pytest.mark.slow
def test_the_password_stands_in_its_file_alone_and_in_no_command_line(running):
    password = running.login.partition(":")[2].encode()
    holders = {file.name for file in running.folder.rglob("*") if file.is_file() and password in file.read_bytes()}
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]

    assert holders == {LOGIN}
    assert any("prefect worker start" in command for command in commands)
    assert not [command for command in commands if password.decode() in command]


@pytest.mark.slow
def test_commands_on_this_machine_need_no_more_than_the_address(running):
    named = {"COOP_TRACKING_URI": running.mlflow, "COOP_REGISTERED_MODEL": "toys"}
    assert running.coop("history", **named).stdout.startswith("no champion yet")
    refused = running.coop("history", **named, COOP_TRACKING_PASSWORD="wrong-password")
    assert f"error: MLflow at {running.mlflow} refuses the login (401)" in refused.stderr

    deployed = "\n".join([
        "from pipelines.environment import use_prefect", "from pipelines.settings import Settings, prefect_login",
        "settings = Settings()", "url = settings.prefect_api_url",
        "use_prefect(url, settings.services_folder / 'client', prefect_login(settings))",
        "from pipelines.flows.client import connection",
        "with connection() as client: print(len(client.read_deployments()))",
    ])  # fmt: skip
    here = {"COOP_SERVICES_FOLDER": str(running.folder), "COOP_PREFECT_PORT": str(running.settings.prefect_port)}
    found = subprocess.run([sys.executable, "-c", deployed], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | here | {"COOP_PREFECT_API_URL": running.prefect})  # fmt: skip
    assert int(found.stdout) >= 5, found.stderr


@pytest.mark.slow
def test_a_run_of_ours_goes_through_with_the_login(running):
    (deployment,) = ask(running, "deployments/filter", {"deployments": {"name": {"any_": ["reconcile"]}}})
    run = ask(running, f"deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})

    wait_for_run(running, run["id"])


@pytest.mark.slow
def test_a_server_that_refuses_our_login_is_not_well(running):
    login = running.login
    write_private(running.folder / LOGIN, "coop:another-password\n")
    try:
        shown = running.coop("status")
    finally:
        write_private(running.folder / LOGIN, login + "\n")

    assert shown.returncode == 1
    assert shown.stdout.count("refuses the login (401)") == 2
    assert running.coop("status").returncode == 0

"""Services: one command brings all up, one shows them, one ends them, and what dies comes back."""

import configparser
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr
from running_services import ROOT, Running, ask, brought_up, free_port, wait_for_run, wait_until

from coop_core.errors import ServiceError
from pipelines.environment import SERVICE_OF, service_environment
from pipelines.services import local, planning, supervision
from pipelines.settings import Settings


@pytest.fixture
def settings(monkeypatch, tmp_path) -> Settings:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "infra").mkdir()
    shutil.copy(ROOT / local.DEPLOYMENTS, tmp_path / "infra")
    ports = {"prefect_port": free_port(), "mlflow_port": free_port(), "serve_port": free_port()}
    return Settings(_env_file=None, device="cpu", services_folder=tmp_path / "services", **ports)


def programs(settings: Settings, devices: list[str]) -> dict[str, dict[str, str]]:
    """What supervisord would read: its programs by name."""
    folder = settings.services_folder
    shared = service_environment(folder, prefect_api_url="http://127.0.0.1:1/api", tracking_uri="http://127.0.0.1:2")
    parser = configparser.RawConfigParser(strict=True)
    parser.read_string(supervision.configuration(local.plan(settings, devices), folder, shared))
    return {name.removeprefix("program:"): dict(parser[name]) for name in parser if name.startswith("program:")}


def copy(settings: Settings, **changes: object) -> Settings:
    return settings.model_copy(update=changes)


def test_without_a_gpu_one_worker_serves_the_gpu_pool_and_no_device_is_chosen(settings):
    found = programs(settings, [])

    assert set(found) == {"prefect-server", "mlflow-server", "serve", "cpu-worker", "gpu-worker-0"}
    assert not any("CUDA_VISIBLE_DEVICES" in program["environment"] for program in found.values())


def test_every_gpu_has_a_worker_that_sees_it_alone_and_runs_one_trial(settings):
    found = programs(settings, ["0", "3"])

    for worker, device in (("gpu-worker-0", "0"), ("gpu-worker-1", "3")):
        assert f'CUDA_VISIBLE_DEVICES="{device}"' in found[worker]["environment"]
        assert "--limit 1" in found[worker]["command"]
    assert "CUDA_VISIBLE_DEVICES" not in found["cpu-worker"]["environment"]


def test_every_service_carries_the_mark_and_comes_back(settings):
    for program in programs(settings, ["0"]).values():
        assert f'{SERVICE_OF}="{settings.services_folder}"' in program["environment"]
        assert (program["autorestart"], program["stopasgroup"], program["killasgroup"]) == ("true", "true", "true")


def test_servers_listen_on_loopback_alone(settings):
    for name in ("prefect-server", "mlflow-server"):
        assert re.findall(r"--host (\S+)", programs(settings, [])[name]["command"]) == ["127.0.0.1"]


def test_mlflow_knows_its_own_two_names_and_no_other_page(settings):
    command = programs(settings, [])["mlflow-server"]["command"]
    names = [f"127.0.0.1:{settings.mlflow_port}", f"localhost:{settings.mlflow_port}"]

    assert f"--allowed-hosts {','.join(names)} " in command
    assert f"--cors-allowed-origins {','.join('http://' + name for name in names)} " in command


def test_mlflow_serves_the_database_of_the_settings_with_files_beside_it(settings, tmp_path):
    command = programs(settings, [])["mlflow-server"]["command"]

    assert planning.database_address(settings) == f"sqlite:///{tmp_path}/mlflow.db"
    assert f"--default-artifact-root file://{tmp_path}/mlruns" in command


def test_a_server_of_the_settings_is_used_instead_of_our_own(settings):
    assert "mlflow-server" not in programs(copy(settings, tracking_uri="http://mlflow.example:5000"), [])


def test_another_database_is_refused_without_showing_its_password(settings):
    with pytest.raises(ServiceError, match=r"^COOP_TRACKING_URI is a mysql address: `make up` takes sqlite") as caught:
        planning.database_address(copy(settings, tracking_uri="mysql://me:secret@host/db"))
    assert "secret" not in str(caught.value)


def test_a_database_whose_driver_is_missing_is_refused_with_the_way_to_install_it(settings):
    with pytest.raises(ServiceError, match=r"the Python module nowhere is not installed: .*'\.\[server\]'"):
        planning.database_address(copy(settings, tracking_uri="postgresql+nowhere://host/db"))


def test_a_postgresql_of_the_settings_reaches_mlflow_with_its_login_and_no_command_line(settings, monkeypatch):
    monkeypatch.setattr(planning.importlib.util, "find_spec", lambda name: name == "psycopg")
    own = copy(settings, tracking_uri="postgresql+psycopg://host/db", tracking_username="me",
               tracking_password=SecretStr("p/w"))  # fmt: skip

    assert local._secrets(own, "coop:login")["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg://me:p%2Fw@host/db"
    assert local._secrets(own, "coop:login")["MLFLOW_TRACKING_PASSWORD"] == "login"
    assert "p%2Fw" not in str(programs(own, []))


def test_files_of_new_experiments_go_where_the_settings_say_with_the_keys_for_it(settings):
    keys = {"s3_access_key_id": SecretStr("key"), "s3_secret_access_key": SecretStr("word")}
    own = copy(settings, artifact_location="s3://bucket/files", s3_endpoint_url="http://s3", **keys)

    assert "--default-artifact-root s3://bucket/files " in programs(own, [])["mlflow-server"]["command"]
    handed = local._secrets(own, "coop:login")
    assert [handed[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_S3_ENDPOINT_URL")] == [
        "key", "word", "http://s3"
    ]  # fmt: skip
    assert not {name for name in local._secrets(copy(own, artifact_location=None), "a:b") if name.startswith("AWS_")}


def test_a_prefect_of_the_settings_is_used_instead_of_our_own_with_its_login(settings):
    elsewhere = copy(settings, prefect_api_url="https://prefect.example/api", prefect_api_auth=SecretStr("ann:theirs"))

    assert "prefect-server" not in programs(elsewhere, [])
    assert planning.prefect_address(elsewhere) == "https://prefect.example"
    assert local._secrets(elsewhere, "coop:login")["PREFECT_API_AUTH_STRING"] == "ann:theirs"


def test_only_what_is_about_its_database_reaches_prefects_server(settings, monkeypatch):
    address = "postgresql+asyncpg://prefect:hidden-word@host/db"
    for name in ("PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_TIMEOUT", "PREFECT_PROFILE"):
        monkeypatch.setenv(name, address)

    assert {name for name in local._secrets(settings, "coop:login") if name.startswith("PREFECT_")} == {
        "PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_TIMEOUT", "PREFECT_API_AUTH_STRING",
        "PREFECT_SERVER_API_AUTH_STRING",
    }  # fmt: skip
    assert "hidden-word" not in str(programs(settings, []))


def test_a_fault_that_quotes_a_log_hides_the_password_in_an_address(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql+asyncpg://prefect:hid%2Fden@host/db")

    monkeypatch.setenv("PREFECT_SERVER_DATABASE_NAME", "database")

    def fails(*arguments: object) -> None:
        address = "postgresql+asyncpg://prefect:hid%2Fden@host/db"
        raise ServiceError(f"the database said: {address}, password hid/den refused")

    monkeypatch.setattr(local, "_start", fails)
    with pytest.raises(ServiceError, match=r"^the database said: \*\*\*, password \*\*\* refused$"):
        local.up(settings)


def test_projects_on_one_server_have_pools_of_their_own(settings):
    found = programs(copy(settings, project_name="photos"), [])

    assert "--pool photos-cpu " in found["cpu-worker"]["command"]
    assert "--pool photos-gpu " in found["gpu-worker-0"]["command"]

def test_up_mends_what_a_kill_left_of_dvc(settings, tmp_path):
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / ".dvc/tmp/rwlock").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", settings.prefect_port))
        taken.listen()
        with pytest.raises(ServiceError, match="cannot be had"):
            local.up(settings)
    assert not (tmp_path / ".dvc/tmp/rwlock").exists()


@pytest.mark.parametrize("folder", ["with space", "100%", "it's", "ünï"])
def test_supervisord_reads_unusual_folders(settings, tmp_path, folder):
    from supervisor.options import ServerOptions

    place = tmp_path / folder
    place.mkdir()
    shared = service_environment(place, prefect_api_url="http://127.0.0.1:1/api", tracking_uri="http://127.0.0.1:2")
    planned = local.plan(settings, [])
    (place / "c").write_text(supervision.configuration(planned, place, shared), encoding="utf-8")
    (place / "logs").mkdir()
    options = ServerOptions()
    options.realize(["-c", str(place / "c")])

    for group in options.process_group_configs:
        program = group.process_configs[0]
        assert program.environment[SERVICE_OF] == str(place)
        assert program.stdout_logfile == str(place / "logs" / f"{program.name}.log")
    assert {group.name for group in options.process_group_configs} == {service.name for service in planned}


def test_a_folder_that_supervisord_cannot_write_down_is_a_sentence(settings, tmp_path):
    with pytest.raises(ServiceError, match="use a folder without quotes"):
        programs(copy(settings, services_folder=tmp_path / 'a "b"'), [])


def test_the_socket_of_a_deep_folder_is_short_private_and_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    deep = [tmp_path / ("x" * 100) / name for name in "ab"]
    found = [supervision.socket_path(folder) for folder in deep]

    assert found[0] != found[1]
    assert found[0].parent.stat().st_mode & 0o777 == 0o700
    assert len(os.fsencode(found[0])) < len(os.fsencode(deep[0]))


@pytest.mark.parametrize(
    ("device", "visible", "found"),
    [("cpu", "0,1", []), ("cuda:2", None, ["2"]), ("auto", "1, 3", ["1", "3"]), ("auto", "", []),
     ("cuda", "GPU-8932", ["GPU-8932"])],
)  # fmt: skip
def test_devices_are_those_that_the_settings_and_the_environment_leave(settings, monkeypatch, device, visible, found):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert local.find_devices(copy(settings, device=device)) == found


def test_devices_are_counted_by_nvidia_smi(settings, monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho '  MIG 1g'\necho 'GPU 1: NVIDIA H100'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    assert local.find_devices(copy(settings, device="auto")) == ["0", "1"]


@pytest.mark.parametrize("field", ["prefect_port", "mlflow_port"])
def test_a_busy_port_is_a_sentence_and_nothing_is_started(settings, field):
    with socket.socket() as other:
        other.bind(("127.0.0.1", getattr(settings, field)))
        other.listen()
        variable = f"COOP_{field.upper()}"
        with pytest.raises(ServiceError, match=rf"^port {getattr(settings, field)} .* set {variable} to another"):
            local.up(settings)

    assert supervision.connect(settings.services_folder) is None
    assert not supervision.marked_processes(settings.services_folder)


def test_up_outside_the_project_is_a_sentence(settings, tmp_path):
    shutil.rmtree(tmp_path / "infra")

    with pytest.raises(ServiceError, match=r"no infra/prefect\.yaml in .*: run this in the project's folder"):
        local.up(settings)


def test_down_with_nothing_running_says_so_as_often_as_asked(settings, capsys):
    local.down(settings)
    local.down(settings)

    assert capsys.readouterr().out == "nothing is running\n" * 2


def test_status_with_nothing_running_says_how_to_start(settings, capsys):
    assert not local.status(settings)
    assert "not running: `make up` starts it" in capsys.readouterr().out


def test_two_commands_at_once_do_not_mix(settings):
    with supervision.alone(settings.services_folder), pytest.raises(ServiceError, match="another `make up` or"):
        local.down(settings)


def test_down_ends_what_carries_the_mark_and_nothing_else(settings, capsys):
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    marks = (str(settings.services_folder), f"{settings.services_folder}-other")
    ours, other = (subprocess.Popen(sleeping, env=os.environ | {SERVICE_OF: mark}) for mark in marks)
    try:
        local.down(settings)

        assert not psutil.pid_exists(ours.pid)
        assert other.poll() is None
        assert str(ours.pid) in capsys.readouterr().out
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


def test_what_ignores_a_polite_end_is_killed(settings, monkeypatch):
    monkeypatch.setattr(supervision, "STOPPED_WITHIN", 1)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    environment = os.environ | {SERVICE_OF: str(settings.services_folder)}
    with subprocess.Popen([sys.executable, "-c", deaf], env=environment, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        local.down(settings)

        assert not psutil.pid_exists(process.pid)


def test_where_the_disk_is_full_no_log_is_asked():
    """/proc is a disk without any free space."""
    assert supervision.last_words(Path("/proc"), "prefect-server") == "the disk of /proc is full"


@pytest.mark.parametrize(
    ("log", "quoted"),
    [("started\nOSError: in use\n\nServer stopped!\n", "OSError: in use"),
     ("DatabaseError: no database\n[SQL: SELECT]\n(Background on this error at: x)\n", "DatabaseError: no database"),
     ("started\nended\n", "ended"), ("", "")],
)  # fmt: skip
def test_a_log_is_quoted_by_the_line_that_names_the_error(log, quoted):
    assert supervision.last_line(log) == quoted


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    """One `coop up` for all slow tests."""
    with brought_up(tmp_path_factory.mktemp("services")) as found:
        yield found


def process_ids(running: Running) -> dict[str, int]:
    return {info["name"]: info["pid"] for info in supervision.connect(running.folder).getAllProcessInfo()}


@pytest.mark.slow
def test_up_says_where_all_is_and_status_shows_it_well(running):
    shown = running.coop("status")

    assert f"COOP_PREFECT_API_URL=http://127.0.0.1:{running.settings.prefect_port}/api" in running.said
    pages = f"http://127.0.0.1:{running.settings.mlflow_port}/#/experiments?workflowType=machine_learning"
    assert f"MLflow   {pages}\n" in running.said
    assert f"MLflow's pages: {pages}\n" in shown.stdout
    assert shown.returncode == 0, shown.stdout
    assert re.findall(r"^ (\S+)\s+running ", shown.stdout, re.MULTILINE) == list(process_ids(running))


@pytest.mark.slow
def test_nothing_listens_beyond_loopback(running):
    addresses = set()
    for process in supervision.marked_processes(running.folder):
        with suppress(psutil.Error):
            addresses |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}

    assert addresses == {"127.0.0.1"}


@pytest.mark.slow
def test_pools_and_deployments_are_there_once(running):
    deployments = {found["name"]: found["work_pool_name"] for found in ask(running, "deployments/filter", {})}
    automations = [found["name"] for found in ask(running, "automations/filter", {})]

    assert deployments == {"sweep": "cpu", "trials": "gpu", "retrain": "cpu", "promote": "cpu", "reconcile": "cpu",
                           "watch": "cpu"}  # fmt: skip
    assert sorted(automations) == ["crash-zombies", "retrain-on-drift"]


@pytest.mark.slow
def test_schedules_become_runs(running):
    """A contract with what Prefect is built on: its scheduler fails in silence, in the server's log."""
    wanted = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}

    wait_until(lambda: len(ask(running, "flow_runs/filter", wanted)) > 1, 60)


def start(running: Running, name: str, **details: object) -> dict:
    """A run of a deployment, scheduled."""
    (deployment,) = ask(running, "deployments/filter", {"deployments": {"name": {"any_": [name]}}})
    state = {"type": "SCHEDULED", "state_details": details}
    return ask(running, f"deployments/{deployment['id']}/create_flow_run", {"state": state})


@pytest.mark.slow
def test_a_deployment_runs_on_its_worker(running):
    """A contract with the pinned versions: deploying, polling and running work together."""
    run = start(running, "reconcile")

    wait_for_run(running, run["id"])


@pytest.mark.slow
def test_what_is_killed_comes_back(running):
    before = process_ids(running)
    for name in before:
        os.kill(before[name], signal.SIGKILL)

    assert running.coop("status").returncode == 1
    wait_until(lambda: running.coop("status").returncode == 0, 240)  # all at once, on busy cores
    assert not set(before.values()) & set(process_ids(running).values())


@pytest.mark.slow
def test_up_again_repairs_what_was_stopped_and_makes_nothing_twice(running):
    supervision.connect(running.folder).stopProcess("gpu-worker-0")
    again = running.coop("up")

    assert again.returncode == 0, again.stderr
    assert "up already" in again.stdout
    assert running.coop("status").returncode == 0
    assert len(ask(running, "automations/filter", {})) == 2


@pytest.mark.slow
def test_a_run_whose_process_went_with_the_services_is_crashed_when_they_return(running):
    run = start(running, "reconcile", scheduled_time="2999-01-01T00:00:00Z")
    ask(running, f"flow_runs/{run['id']}/set_state", {"state": {"type": "RUNNING"}, "force": True})
    assert running.coop("down").returncode == 0
    assert running.coop("up").returncode == 0

    assert ask(running, f"flow_runs/{run['id']}")["state"]["type"] == "CRASHED"


@pytest.mark.slow
def test_down_leaves_nothing_even_when_the_supervisor_was_killed(running):
    os.kill(supervision.connect(running.folder).getPID(), signal.SIGKILL)
    wait_until(lambda: supervision.connect(running.folder) is None, 10)
    assert supervision.marked_processes(running.folder)

    ended = running.coop("down")

    assert ended.returncode == 0, ended.stderr
    assert not supervision.marked_processes(running.folder)
    assert not {file.name for file in running.folder.iterdir()} & {"supervisor.sock", "supervisord.pid"}
    for port in (running.settings.prefect_port, running.settings.mlflow_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    assert "nothing is running" in running.coop("down").stdout

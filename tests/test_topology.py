"""A team's topology, for real: PostgreSQL, an S3 store that checks signatures, MLflow and Prefect with logins, workers
and a served champion, used by a clone and by a second one that has settings only. Minutes long."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from dotenv import dotenv_values
from kill_matrix import Playground, change
from running_services import request, wait_until
from team import MODEL, PROJECT, Team

from coop_core.files import digest_file, read_json
from pipelines.records.server import Records, connected

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    found = Team(tmp_path_factory.mktemp("team"))
    installed = found.topology("install")
    if installed.returncode == 2:
        pytest.skip(f"this machine cannot have the servers: {installed.stderr.strip()}")
    try:
        found.up()
        found.share(found.first)
        found.first.params(epochs=4)
        yield found
    finally:
        found.topology("down")


def test_the_doctor_finds_all_of_it_well(team):
    shown = json.loads(team.coop(team.first, "doctor", "--json"))
    states = {finding["name"]: finding["state"] for finding in shown}
    workers = {finding["name"]: finding["said"] for finding in shown if finding["name"].startswith("pool")}

    assert states | {"S3 sources": "", "artifacts write": "", "GPU": ""} == {
        "tracking": "well", "registry write": "well", "artifacts write": "", "Prefect": "well", "pool team-cpu": "well",
        "pool team-gpu": "well", "DVC remote": "well", "S3 sources": "", "clock": "well", "disk": "well", "GPU": "",
    }  # fmt: skip
    assert workers["pool team-gpu"] == "2 live: worker-gpu-0, worker-gpu-1"


def test_a_retraining_makes_and_pushes_a_champion_which_is_served(team):
    run = team.retrain()

    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    assert team.champion() == "1"
    settings = team.settings
    assert settings.serve_token is not None
    token = f"Bearer {settings.serve_token.get_secret_value()}"
    address = f"http://127.0.0.1:{settings.serve_port}"
    wait_until(lambda: request(f"{address}/ready")[0] == 200, 60)
    image = next((team.first.folder / "images").rglob("*.png"))
    body = {"dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(image.read_bytes()).decode()]]}}
    assert request(f"{address}/invocations", body)[0] == 401
    status, headers, content = request(f"{address}/invocations", body, Authorization=token)
    assert status == 200, content
    assert {name.lower(): value for name, value in headers.items()}["x-coop-version"] == "1"


def test_files_of_the_run_lie_in_the_store_and_no_client_has_its_keys(team):
    with connected(team.settings) as mlflow:
        version = mlflow.MlflowClient().get_model_version(MODEL, "1")
        run = mlflow.MlflowClient().get_run(version.run_id)

    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    objects = team.folder / "services/swift/disks/d1/objects"
    assert sum(path.suffix == ".data" for path in objects.rglob("*")) > 10


def test_a_sweep_goes_to_both_workers(team):
    # Trials of as many steps train side by side, three such groups a run; here there are five.
    change(team.first.folder, sweep={"seeds": [1], "space": {"split.shots": [1, 2], "train.epochs": [2, 3, 4]}})
    said = team.coop(team.first, "sweep")
    trainers = {path.name for path in (team.first.folder / ".cache/trainers").iterdir()}

    assert "winner" in said
    assert trainers == {"worker-gpu-0", "worker-gpu-1"}


def test_a_second_clone_with_settings_only_pulls_and_predicts(team):
    second = Playground(team.folder / "second")
    team.share(second)
    for name in ("dvc.lock", "params.yaml"):
        shutil.copyfile(team.first.folder / name, second.folder / name)
    image = next((second.folder / "images").rglob("*.png"))

    team.dvc(second, "pull", "train")
    said = team.coop(second, "predict", "--model", f"{MODEL}@champion", "--json", str(image))

    prompts = [next((clone.folder / "artifacts/prompt").glob("*.safetensors")) for clone in (team.first, second)]
    assert digest_file(prompts[0]) == digest_file(prompts[1])
    assert json.loads(said.splitlines()[-1])["label"] in ("tomato", "grass", "sky")


def test_two_clones_do_not_retrain_into_one_experiment_at_once(team):
    from pipelines.records.claims import claim_retraining

    change(team.first.folder, train={"epochs": 5})
    with claim_retraining(Records(team.settings), by="ann in another clone"):
        run = team.retrain()

    assert run["state"]["type"] == "FAILED"
    assert "another retraining is under way, by ann in another clone" in run["state"]["message"]
    assert team.champion() == "1"


def test_the_main_job_and_a_promotion_by_hand_reach_the_team(team):
    change(team.first.folder, train={"epochs": 6})
    team.dvc(team.first, "repro")
    team.dvc(team.first, "push")
    team.coop(team.first, "promote")

    assert team.champion() == read_json(team.first.folder / "artifacts/tracked.json")["model_version"]


def test_a_task_run_is_kept_by_a_server_that_asks_for_a_login(team):
    """Prefect's client brings task runs by another way than flow runs, with a login of its own to send."""
    text = ("from prefect import flow, task\n@task\ndef one():\n    return 1\n@flow(name='smoke')\ndef smoke():\n"
            "    assert one() == 1\nsmoke()\n")  # fmt: skip
    login = team.settings.prefect_api_auth
    assert login is not None
    access = {"PREFECT_API_URL": str(team.settings.prefect_api_url), "PREFECT_HOME": str(team.folder / "client"),
              "PREFECT_API_AUTH_STRING": login.get_secret_value()}  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", text], env=team.first.environment | access, cwd=team.folder,
                           capture_output=True, text=True, timeout=120)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    team.said.append(ended.stdout + ended.stderr)

    def kept() -> bool:
        found = team.prefect("task_runs/filter", {"flows": {"name": {"any_": ["smoke"]}}})
        return [run["state"]["type"] for run in found] == ["COMPLETED"]

    wait_until(kept, 60)


def test_no_secret_is_shown_anywhere(team):
    """Every secret is random, so that where one is found it was leaked."""
    secrets = team.secrets
    assert len(secrets) > 5
    places = {f"what a command said ({number})": text for number, text in enumerate(team.said)}
    logs = [*(team.folder / "services/logs").glob("*.log"), *(team.first.folder / ".cache").rglob("*.log")]
    cards = [path for name in ("artifacts", ".cache") for path in (team.first.folder / name).rglob("*.json")]
    tracked = [path for path in team.first.folder.iterdir() if path.is_file() and path.name != ".env"]
    places |= {str(path): path.read_text(errors="replace") for path in (*logs, *cards, *tracked)}
    with connected(team.settings) as mlflow:
        client = mlflow.MlflowClient()
        for experiment in client.search_experiments():
            places[f"experiment {experiment.name}"] = str(experiment.tags)
            for run in client.search_runs([experiment.experiment_id]):
                places[f"run {run.info.run_id}"] = str(run.to_dictionary())
        for version in client.search_model_versions(f"name = '{MODEL}'"):
            places[f"version {version.version}"] = f"{version.tags} {version.description}"
    places["Prefect's flow runs"] = json.dumps(team.prefect("flow_runs/filter", {}))
    places["Prefect's logs"] = json.dumps(team.prefect("logs/filter", {}))
    places["the list of processes"] = "\n".join(
        " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])
    )
    assert len(logs) > 8
    assert len(cards) > 3

    leaked = [(name, place) for name, secret in secrets.items() for place, text in places.items() if secret in text]

    assert leaked == []
    for file in ("secrets.json", "settings.env", "dvc.config", "mlflow-users.ini", "swift/proxy.conf"):
        assert (team.folder / "services" / file).stat().st_mode & 0o077 == 0, file
    assert dotenv_values(team.folder / "services/settings.env")["COOP_PROJECT_NAME"] == PROJECT


def test_down_leaves_no_process(team):
    before = [process.pid for process in psutil.process_iter() if str(team.folder) in _line(process)]
    assert before
    ended = team.topology("down")

    assert ended.returncode == 0
    assert [process.pid for process in psutil.process_iter() if str(team.folder / "services") in _line(process)] == []
    assert os.access(team.folder / "services/secrets.json", os.R_OK)


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""

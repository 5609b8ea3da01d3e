"""Operations against real servers: sweeps on workers, retraining, approval, cancelling, kills. Minutes long."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from kill_matrix import (
    Playground,
    Row,
    change,
    free_ports,
    in_mlflow,
    in_prefect,
    kill_retraining,
    kill_sweep,
    services,
    wait_for,
)

from coop_core.files import read_json
from pipelines.champion import promotion
from pipelines.environment import use_prefect
from pipelines.logins import make_login
from pipelines.records.registry import CHAMPION, find_version
from pipelines.records.server import connected

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    """A clone with services of its own, whose sweep and training take seconds."""
    folder = tmp_path_factory.mktemp("operations")
    found = Playground(folder / "project")
    login = make_login(found.settings.services_folder)  # `coop up` keeps it
    use_prefect(str(found.settings.prefect_api_url), folder / "client", login)
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()  # another file's tests may have imported Prefect
    found.params(epochs=4)
    with services(found):
        yield found


def prefect_run(playground: Playground, deployment: str, **parameters: Any) -> Any:
    """Run a deployment to its end -> the flow run."""
    from pipelines.flows import client

    run = client.start(deployment, parameters=parameters)
    wait_for(lambda: client.ended(client.look(run.id)), f"the end of {deployment}")
    return client.look(run.id)


def markdown(run: Any) -> str:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    from pipelines.flows.client import connection

    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    with connection() as client:
        return "\n".join(str(found.data) for found in client.read_artifacts(artifact_filter=wanted))


def trial_runs(playground: Playground, status: str = "FINISHED") -> list[Any]:
    return [run for run in playground.runs(f"attributes.status = '{status}'") if "coop.trial" in run.data.tags]


def test_a_sweep_on_workers_ends_with_a_winner_that_dvc_repro_makes_again(playground):
    assert playground.done("sweep") == 0, playground.said()
    said = playground.said()

    assert "8 trials, 0 failed" in said
    assert "Prefect  http://127.0.0.1" in said
    assert len(trial_runs(playground)) == 8
    (parent,) = playground.runs("tags.`coop.sweep` != ''")
    assert {run.data.tags["mlflow.parentRunId"] for run in trial_runs(playground)} == {parent.info.run_id}
    assert {"winner.patch", "results.csv", "few_shot_curve.png"} <= artifacts(playground, parent)

    folder = playground.folder / f"artifacts/sweeps/kill-{playground.round}"
    if (folder / "winner.patch").read_text():
        subprocess.run(["git", "apply", str(folder / "winner.patch")], cwd=playground.folder, check=True)
    where = {"cwd": playground.folder, "env": playground.environment}
    repro = subprocess.run(["dvc", "repro", "-q"], **where, capture_output=True)
    assert repro.returncode == 0, repro.stderr
    tracked = read_json(playground.folder / "artifacts/tracked.json")
    (run,) = playground.runs(f"attributes.run_id = '{tracked['run_id']}'")
    (trial,) = [one for one in trial_runs(playground) if same_params(one, run)]
    assert run.data.metrics["val_accuracy"] == pytest.approx(trial.data.metrics["val_accuracy"], abs=1e-6)
    assert run.data.metrics["accuracy"] == pytest.approx(trial.data.metrics["accuracy"], abs=1e-6)


def artifacts(playground: Playground, run: Any) -> set[str]:
    with connected(playground.settings) as mlflow:
        return {found.path for found in mlflow.MlflowClient().list_artifacts(run.info.run_id)}


def same_params(trial: Any, run: Any) -> bool:
    ignored = {"split.curve_shots"}
    return all(trial.data.params[name] == value for name, value in run.data.params.items() if name not in ignored)


def test_the_same_sweep_again_trains_nothing(playground):
    before = len(trial_runs(playground))
    assert playground.done("sweep") == 0, playground.said()
    assert len(trial_runs(playground)) == before


def test_ctrl_c_ends_a_sweep_on_workers_within_seconds(playground):
    playground.params(epochs=3000)
    command = playground.coop("sweep")
    wait_for(lambda: trial_runs(playground, "RUNNING"), "a trial", command)
    begun = time.monotonic()
    command.send_signal(signal.SIGINT)

    assert command.wait(60) == 130
    wait_for(lambda: not playground.processes("pipelines.sweeps.trainer"), "the end of the trainers")
    assert time.monotonic() - begun < 30
    wait_for(lambda: not in_prefect(playground), "rest in Prefect")

    def at_rest() -> bool:
        """On cores so busy that a trainer was ended before it could close its run, `coop reconcile` does."""
        assert playground.done("reconcile") == 0, playground.said()
        return not playground.runs("attributes.status = 'RUNNING'")

    wait_for(at_rest, "rest in MLflow")


def test_retraining_promotes_what_passes_and_ties_everything_together(playground):
    playground.params(epochs=6)
    run = prefect_run(playground, "retrain")

    assert run.state_name == "Completed"
    champion = find_version(CHAMPION, playground.records)
    assert f"version {champion.number} is champion" in markdown(run).lower()
    (tracked,) = playground.runs(f"attributes.run_id = '{champion.run_id}'")
    tags = tracked.data.tags
    assert tags["prefect.flow_run_id"] == str(run.id)
    assert tags["coop.version"] == champion.number
    assert len(tags["dvc_lock"]) == len(tags["dataset_digest"]) == 64
    assert "dvc.lock" in artifacts(playground, tracked)
    assert promotion.history(playground.records)[-1]["by"] == "gate"


def test_retraining_stops_early_when_nothing_has_changed(playground):
    versions = promotion.history(playground.records)
    run = prefect_run(playground, "retrain")
    assert "nothing had changed" in markdown(run).lower()
    assert promotion.history(playground.records) == versions


def test_reconciling_mends_what_a_kill_left_of_dvc(playground):
    rwlock = playground.folder / ".dvc/tmp/rwlock"
    rwlock.write_text("")
    assert prefect_run(playground, "reconcile").state_name == "Completed"
    assert not rwlock.exists()


def test_of_two_retrainings_at_once_one_is_told(playground):
    from pipelines.flows import client

    playground.params(epochs=500)
    first = client.start("retrain", parameters={})
    wait_for(lambda: playground.processes("pipelines.stages train"), "the training")
    second = prefect_run(playground, "retrain")
    client.cancel([first.id])
    wait_for(lambda: client.ended(client.look(first.id)), "the end of the first")

    assert second.state_name == "Cancelled"
    wait_for(lambda: not playground.processes("pipelines.stages"), "the end of its stage")


def test_a_person_approves_in_prefect_and_may_go_back(playground):
    from pipelines.flows import client

    before = find_version(CHAMPION, playground.records)
    playground.params(epochs=8)
    change(playground.folder, gate={"approval_minutes": 5})
    assert prefect_run(playground, "retrain").state_name == "Completed"

    wait_for(lambda: paused(), "the question")
    (asking,) = paused()
    assert find_version(CHAMPION, playground.records) == before
    with client.connection() as server:
        server.resume_flow_run(asking.id, run_input={"approve": True, "name": "Ann"})
    wait_for(lambda: client.ended(client.look(asking.id)), "the promotion")

    assert find_version(CHAMPION, playground.records).number != before.number
    assert promotion.history(playground.records)[-1]["by"] == "claimed: Ann"
    assert playground.done("rollback") == 0, playground.said()
    assert find_version(CHAMPION, playground.records).number == before.number


def paused() -> list[Any]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateName

    from pipelines.flows.client import connection

    state = FlowRunFilterState(name=FlowRunFilterStateName(any_=["Paused"]))
    with connection() as client:
        return client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state))


def test_nothing_is_left_under_way(playground):
    assert in_prefect(playground) == []
    assert in_mlflow(playground) == []


@pytest.mark.parametrize(("victim", "number"), [("gpu-worker", "KILL"), ("dvc", "TERM")])
def test_what_is_killed_is_taken_up_again(playground, victim, number):
    """Some of the kill matrix; the whole takes an hour and stands in docs/operations.md."""
    row = Row(victim, number)
    change(playground.folder, gate={"approval_minutes": 0})
    if victim == "dvc":
        kill_retraining(playground, row)
    else:
        kill_sweep(playground, row, local=False)
    assert row.well, row


def test_a_sweep_whose_server_is_gone_says_so_in_one_sentence(playground, tmp_path):
    nobody = f"COOP_PREFECT_API_URL=http://127.0.0.1:{free_ports(1)[0]}/api"
    command = ["env", nobody, sys.executable, "-m", "pipelines.commands.cli", "sweep"]
    ended = subprocess.run(command, cwd=playground.folder, env=playground.environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "correct COOP_PREFECT_API_URL or start that server" in ended.stderr

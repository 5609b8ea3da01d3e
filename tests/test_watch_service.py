"""The watch on a real Prefect: images of another kind make the automation start a run of `retrain`."""

from pathlib import Path

import pytest
from registered import EARLIER, make_champion, register
from running_services import ask, brought_up, request, wait_for_run, wait_until
from test_watching import send, toy_reference, with_reference

from pipelines.settings import Settings

pytestmark = [
    pytest.mark.slow,
    # MLflow's own, of its pages on agents; it appears once, in whichever test imports mlflow.pyfunc first.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]


def test_images_of_another_kind_start_a_retraining_and_images_of_the_same_kind_do_not(tmp_path: Path) -> None:
    folder, records = tmp_path / "services", tmp_path / "records"
    folder.mkdir()
    settings = Settings(_env_file=None, tracking_uri=f"sqlite:///{folder}/mlflow.db", registered_model="toys",
                        artifact_location=(folder / "mlruns").as_uri(), serve_record=records)  # fmt: skip
    assert register(EARLIER, settings) == "1"
    assert register(with_reference(tmp_path, toy_reference(100)), settings) == "2"
    make_champion("2", settings)
    with brought_up(folder, COOP_SERVE_RECORD=str(records), COOP_REGISTERED_MODEL="toys") as running:
        by_name = {found["name"]: found for found in ask(running, "deployments/filter", {})}
        assert [schedule["active"] for schedule in by_name["watch"]["schedules"]] == [True]
        # A retraining would run `dvc repro` in this project, so its runs wait in a queue that nobody works on.
        ask(running, "work_pools/cpu/queues", {"name": "held", "is_paused": True})
        _hold(running, by_name["retrain"]["id"])

        send(settings, 60)
        _watch(running, by_name["watch"]["id"])
        assert _retrainings(running, by_name["retrain"]["id"]) == []
        send(settings, 60, first=100, moved=6)
        _watch(running, by_name["watch"]["id"])
        wait_until(lambda: _retrainings(running, by_name["retrain"]["id"]) != [], 60)
        (run,) = _retrainings(running, by_name["retrain"]["id"])
    assert run["created_by"]["type"] == "AUTOMATION"
    assert run["created_by"]["display_value"] == "retrain-on-drift"


def _watch(running, deployment: str) -> None:
    state = {"state": {"type": "SCHEDULED"}}
    wait_for_run(running, ask(running, f"deployments/{deployment}/create_flow_run", state)["id"])


def _hold(running, deployment: str) -> None:
    """New runs of a deployment wait."""
    place = {"work_pool_name": "cpu", "work_queue_name": "held"}
    status, _, said = request(f"{running.prefect}/deployments/{deployment}", place, login=running.login, method="PATCH")
    assert status < 300, said


def _retrainings(running, deployment: str) -> list[dict]:
    """Runs that no schedule made."""
    wanted = {"flow_runs": {"deployment_id": {"any_": [deployment]}}}
    return [run for run in ask(running, "flow_runs/filter", wanted) if not run["auto_scheduled"]]

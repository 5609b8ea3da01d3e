"""Retraining: stops early, goes on after a kill, says what a stage said; and a flow does not outlive its worker."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from coop_core.errors import GateError, ServiceError
from coop_core.judging.gate import Check, Decision
from pipelines.champion import retraining
from pipelines.champion.retraining import alone, judgement, reproduce, summary, waits_for_judgement
from pipelines.records import claims
from pipelines.records.claims import claim_retraining
from pipelines.records.registry import CANDIDATE, CHAMPION, GATE, mark_judged
from pipelines.records.server import Records, connected
from pipelines.settings import Settings

DVC = """
import json, os, sys
from pathlib import Path
with open("called", "a") as file:
    file.write(" ".join(sys.argv[1:]) + " " + os.environ.get("COOP_FLOW_RUN", "") + "\\n")
if sys.argv[1] == "status":
    print("a warning of DVC's")
    print(Path("changed.json").read_text())
if sys.argv[1] == "config" and Path("remote").exists():
    print("storage")
if sys.argv[1] == "repro" and Path("broken").exists():
    print("error: split.shots 16 needs 16 training images a class", flush=True)
    print("ERROR: failed to reproduce 'split': exited with 2")
    sys.exit(1)
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One SQLite file for all tests: making its tables takes seconds."""
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def records(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    """A workspace whose DVC does nothing but say so."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.py").write_text(DVC)
    monkeypatch.setattr(retraining, "_DVC", (sys.executable, str(tmp_path / "dvc.py")))
    (tmp_path / "dvc.lock").write_text("stages: {}")
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "data/raw/dataset.json").write_text(json.dumps({"digest": "images"}))
    (tmp_path / "artifacts").mkdir()
    settings = Settings(
        _env_file=None, tracking_uri=f"sqlite:///{database}", cache_folder=tmp_path / ".cache",
        registered_model=tmp_path.name,
    )  # fmt: skip
    return Records(settings)


@pytest.fixture
def register(records: Records, tmp_path: Path) -> Callable[..., str]:
    """A run with a version, the candidate, as the track stage leaves them."""

    def make() -> str:
        with connected(records.settings) as mlflow:
            client, name = mlflow.MlflowClient(), records.model
            experiment = client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else client.create_experiment(
                name, (tmp_path / "mlruns").as_uri()
            )  # fmt: skip
            run = client.create_run(number)
            if not client.search_registered_models(f"name = '{name}'"):
                client.create_registered_model(name)
            version = str(client.create_model_version(name, run.info.artifact_uri, run.info.run_id).version)
            client.set_tag(run.info.run_id, "coop.version", version)
            client.set_registered_model_alias(name, CANDIDATE, version)
        tracked = {"run_id": run.info.run_id, "model_version": version}
        (tmp_path / "artifacts/tracked.json").write_text(json.dumps(tracked))
        return version

    return make


def changed(*stages: str) -> None:
    Path("changed.json").write_text(json.dumps({stage: [] for stage in stages}))


def called() -> list[str]:
    return [line.split()[0] for line in Path("called").read_text().splitlines()]


def test_nothing_changed_stops_early(records, register):
    changed("train")
    register()
    reproduce(records)
    changed()
    Path("called").unlink()

    assert reproduce(records) is None
    assert called() == ["status"]


def claims_of(records: Records) -> list[dict]:
    """The claims on retraining into the records' experiment."""
    with connected(records.settings) as mlflow:
        tags = mlflow.MlflowClient().get_experiment_by_name(records.experiment).tags
    return [json.loads(value) for key, value in tags.items() if key.startswith("claim.")]


def test_two_clones_do_not_retrain_into_one_registry_at_once(records):
    with (
        claim_retraining(records, by="ann in photos"),
        pytest.raises(GateError, match=r"^another retraining is under way, by ann in photos on .*: try again"),
        claim_retraining(records, by="ben in photos-2"),
    ):
        pass
    assert claims_of(records) == []

    with claim_retraining(records, by="ben in photos-2"):
        assert [claim["by"] for claim in claims_of(records)] == ["ben in photos-2"]


def test_what_a_killed_retraining_left_is_in_no_way_of_the_next_in_its_clone(records):
    left = claim_retraining(records, by="ann in photos")  # kept, or its end would release it
    left.__enter__()
    with claim_retraining(records, by="ann in photos"):
        assert [claim["by"] for claim in claims_of(records)] == ["ann in photos"]


def test_a_clone_of_the_same_name_on_another_machine_retrains_on(records, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "another machine")
    with claim_retraining(records, by="ann in photos"):
        monkeypatch.setattr("socket.gethostname", lambda: "this machine")
        with (
            pytest.raises(GateError, match="another retraining is under way, by ann in photos on another machine"),
            claim_retraining(records, by="ann in photos"),
        ):
            raise AssertionError("two retrain at once")
        assert [claim["host"] for claim in claims_of(records)] == ["another machine"]


def test_a_retraining_holds_its_claim_for_longer_than_a_killed_one(records, monkeypatch):
    monkeypatch.setattr(claims, "_RENEW_SECONDS", 0.05)
    with claim_retraining(records, by="ann"):
        (before,) = claims_of(records)
        deadline = time.monotonic() + 20
        while claims_of(records)[0]["since"] == before["since"]:
            assert time.monotonic() < deadline
    assert claims_of(records) == []


def test_projects_of_their_own_experiments_retrain_side_by_side(records):
    other = Records(records.settings.model_copy(update={"experiment": "another"}))
    with claim_retraining(records, by="ann"), claim_retraining(other, by="ben"):
        assert [claim["by"] for claim in claims_of(other)] == ["ben"]


def test_what_was_cut_off_after_the_training_is_pushed_and_tied_by_the_next(records, register):
    changed()
    version = register()
    Path("remote").touch()

    found = reproduce(records)

    assert called() == ["status", "config", "push"]
    assert (found.version, found.changed) == (version, [])
    assert reproduce(records) is None


def test_what_changed_is_run_pushed_and_tied_together(records, register):
    changed("data.dvc", "download")
    Path("remote").touch()
    version = register()

    found = reproduce(records, flow_run="flow-7")

    assert called() == ["status", "repro", "config", "push"]
    assert "repro flow-7" in Path("called").read_text()
    assert (found.version, found.changed, found.pushed) == (version, ["data.dvc", "download"], True)
    with connected(records.settings) as mlflow:
        client = mlflow.MlflowClient()
        tags = client.get_run(found.run_id).data.tags
        assert client.get_model_version(records.model, version).tags == found.tags
    assert {name: tags[name] for name in found.tags} == found.tags
    assert (found.tags["prefect.flow_run_id"], found.tags["dataset_digest"]) == ("flow-7", "images")


def test_what_a_kill_left_of_dvc_is_mended_before_dvc_is_asked(records, register):
    changed()
    register()
    Path(".dvc/tmp").mkdir(parents=True)
    Path(".dvc/tmp/rwlock").touch()
    Path(".dvc/config.local").touch(0o644)

    reproduce(records)

    assert not Path(".dvc/tmp/rwlock").exists()
    assert Path(".dvc/config.local").stat().st_mode & 0o777 == 0o600


def test_without_a_remote_nothing_is_pushed(records, register):
    changed("train")
    register()
    assert not reproduce(records).pushed
    assert "push" not in called()


def test_a_stage_that_refuses_is_heard(records):
    changed("split")
    Path("broken").touch()
    with pytest.raises(ServiceError, match=r"dvc repro failed: split.shots 16 needs 16 training images .*dvc.log"):
        reproduce(records)


def test_one_retraining_at_a_time_in_a_workspace(records):
    settings = records.settings
    with alone(settings), pytest.raises(ServiceError, match="another retraining is under way"), alone(settings):
        pass
    with alone(settings):
        pass


def test_a_candidate_that_no_gate_has_judged_is_found_again(records, register):
    assert waits_for_judgement(records) is None
    version = register()
    assert waits_for_judgement(records) == version
    mark_judged(version, "passed", records)  # and then the process was killed
    assert waits_for_judgement(records) == version
    with connected(records.settings) as mlflow:
        client = mlflow.MlflowClient()
        client.set_registered_model_alias(records.model, CHAMPION, version)
        assert waits_for_judgement(records) is None
        other = register()
        client.set_model_version_tag(records.model, other, GATE, "refused")
    assert waits_for_judgement(records) is None


def test_the_summary_shows_what_was_made_and_every_check():
    made = retraining.Reproduced("run", "3", ["train"], True, {"dvc_lock": "abc"})
    checks = (Check("gain over zero-shot", True, 0.2, 0.0, "a"), Check("no class falls", False, 0.3, 0.1, "b falls"))
    decision = Decision(False, "3", "2", checks)

    page = summary(made, decision, "version 3 was refused by the gate")

    assert "version **3**" in page
    assert "| dvc_lock | `abc` |" in page
    assert "| no class falls | **no** | b falls |" in page
    assert page.endswith("**Version 3 was refused by the gate.**")
    assert judgement("version 3 is the champion already", "nothing to promote")[-1] == "**Nothing to promote.**"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_flow_ends_with_the_worker_that_started_it(tmp_path, number):
    flow = (
        "import logging, time\nfrom rich.logging import RichHandler\n"
        "from pipelines.flows.lifeline import end_with_worker\n"
        "logging.getLogger().addHandler(RichHandler())\n"  # as Prefect's: it ends a thread whose output is gone
        "end_with_worker()\nprint('up', flush=True)\ntime.sleep(600)"
    )
    worker = (
        f"import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', {flow!r}], stdout=subprocess.PIPE, "
        "stderr=subprocess.STDOUT)\np.stdout.readline()\nprint(p.pid, flush=True)\np.wait()"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    started = subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE, text=True, env=environment)
    with started as process:
        pid = int(process.stdout.readline())
        process.send_signal(number)
    until = time.monotonic() + 15
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

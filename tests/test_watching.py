"""Watching: what is recorded of the champion's answers is compared with what its version carries of the test images."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from registered import EARLIER, as_variables, make_champion, register, registry_settings
from running_services import ROOT

from coop_core.artifact import read_artifact
from coop_core.errors import ArtifactError, GateError, WatchError
from coop_core.files import write_tensors
from coop_core.judging.seen import Seen
from coop_core.params import WatchParams
from coop_core.reference import add_reference, read_reference
from pipelines.commands.watching import show_look
from pipelines.records.registry import find_version
from pipelines.records.server import Records, connected
from pipelines.records.watches import last_look
from pipelines.serving.answered import Row, as_line
from pipelines.serving.watching import Look, gather, look, watch
from pipelines.settings import Settings

# MLflow's own, of its pages on agents; it appears once, in whichever test imports mlflow.pyfunc first.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")

PARAMS = WatchParams(min_images=20)
WIDTH = 16
SIGNS = ["features", "confidence", "labels", "abstention"]


def toy_reference(images: int = 60) -> Seen:
    """Images of the three classes of `registered.EARLIER`."""
    random = np.random.default_rng(0)
    features = random.normal(size=(images, WIDTH))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    names = tuple(f"{number:064x}" for number in range(images))
    confidences = random.uniform(0.4, 1, images).astype(np.float32)
    return Seen(features.astype(np.float16), np.arange(images) % 3, confidences, confidences > 0, names)


def with_reference(folder: Path, reference: Seen) -> Path:
    """The earlier prompt, as `track` registers it now."""
    shutil.copytree(EARLIER, folder / "prompt")
    write_tensors(folder / "reference.safetensors", reference.tensors())
    add_reference(folder / "prompt", folder / "reference.safetensors")
    return folder / "prompt"


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Settings:
    """Version 1 as earlier coops registered it, version 2 with what it saw of its test images."""
    folder = tmp_path_factory.mktemp("registry")
    settings = registry_settings(folder, experiment="toys")
    assert register(EARLIER, settings) == "1"
    assert register(with_reference(folder, toy_reference()), settings) == "2"
    return settings


@pytest.fixture
def settings(registry, tmp_path) -> Settings:
    """Version 2 is champion, records lie in a folder of the test's own, and so do looks."""
    make_champion("2", registry)
    return registry.model_copy(update={"serve_record": tmp_path / "records", "experiment": tmp_path.name})


def send(settings: Settings, count: int, *, moved: float = 0.0, first: int = 0, **changes: Any) -> None:
    """Answers to so many images are recorded; `moved` along one direction."""
    random = np.random.default_rng(100 + first)
    champion = find_version("champion", Records(settings))
    settings.serve_record.mkdir(exist_ok=True)
    lines = []
    for number in range(first, first + count):
        feature = random.normal(size=WIDTH)
        feature[0] += moved
        values = {"time": 5000.0 + number, "version": "2", "run": champion.run_id, "image": f"{10**6 + number:064x}",
                  "label": CLASSES[number % 3], "confidence": random.uniform(0.4, 1), "answered": True,
                  "feature": (feature / np.linalg.norm(feature)).astype(np.float16)}  # fmt: skip
        lines.append(as_line(Row(**values | changes)))
    (settings.serve_record / f"answers-{first:05d}.jsonl").write_bytes(b"".join(lines))


CLASSES = read_artifact(EARLIER).class_names


def looked(settings: Settings, **more: Any) -> tuple[Look | str, list[Look]]:
    """What a scheduled look finds, and what it asked a retraining for."""
    asked: list[Look] = []
    return watch(Records(settings), WatchParams(min_images=20, **more), ask=asked.append), asked


def test_images_like_the_test_images_are_put_on_record_and_ask_for_nothing(settings):
    send(settings, 40)
    found, asked = looked(settings)

    assert asked == []
    assert found.sentence == "version 2 of toys, 40 images: nothing differs from its test images beyond the limits"
    with connected(settings) as mlflow:
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(Records(settings).watches)
        (run,) = client.search_runs([experiment.experiment_id])
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert (run.info.status, run.data.tags["coop.version"], run.data.metrics["alarm"]) == ("FINISHED", "2", 0)
    assert run.data.metrics["images"] == 40
    assert run.data.metrics["features/value"] == found.drift.signs[0].value
    assert files == {"drift.json", "drift.png"}


def test_other_images_ask_for_a_retraining_once_in_the_quiet_hours(settings):
    send(settings, 40, moved=5)
    found, asked = looked(settings)

    assert [sign.name for sign in found.drift.raised] == ["features"]
    assert asked == [found]
    send(settings, 10, moved=5, first=100)
    found, asked = looked(settings)
    assert (len(found.gathered.sent), [sign.name for sign in found.drift.raised], asked) == (50, ["features"], [])
    send(settings, 10, moved=5, first=200)
    found, asked = looked(settings, quiet_hours=0)
    assert asked == [found]


def test_without_new_answers_nothing_is_looked_at_again(settings):
    send(settings, 40, moved=5)
    looked(settings)
    before = last_look(Records(settings), version_run=find_version("champion", Records(settings)).run_id)
    found, asked = looked(settings, quiet_hours=0)

    assert found == "version 2 of toys: nothing was recorded since the last look"
    assert asked == []
    assert before.newest == 5039.0
    assert abs(before.alarm - time.time()) < 60


def test_a_look_that_a_kill_left_open_is_none(settings):
    send(settings, 40, moved=5)
    looked(settings)
    records = Records(settings)
    champion = find_version("champion", records)
    with records.asked() as client:
        experiment = client.get_experiment_by_name(records.watches)
        (whole,) = client.search_runs([experiment.experiment_id])
        client.create_run(experiment.experiment_id, tags=whole.data.tags | {"coop.newest_record": "9999"})

    assert last_look(records, version_run=champion.run_id).newest == 5039.0


def test_a_look_is_of_one_version(settings):
    send(settings, 40, moved=5)
    looked(settings)

    assert last_look(Records(settings), version_run="of another version") is None


def test_a_retraining_that_could_not_be_asked_for_is_asked_for_by_the_next_look(settings):
    """As behind a kill between the asking and the record."""
    send(settings, 40, moved=5)

    def fail(found: Look) -> None:
        raise ConnectionError("Prefect is away")

    with pytest.raises(ConnectionError):
        watch(Records(settings), PARAMS, ask=fail)
    found, asked = looked(settings)

    assert asked == [found]


def test_too_few_images_are_told_and_judge_nothing(settings):
    send(settings, 10, moved=5)
    found, asked = looked(settings)

    assert found.drift is None
    assert found.sentence == ("version 2 of toys: 10 different images are recorded and 60 test images are left to "
                              "compare with, too few to judge (watch.min_images)")  # fmt: skip
    assert asked == []


def test_only_rows_of_the_champion_and_of_its_classes_count(settings):
    send(settings, 30)
    send(settings, 5, first=100, run="another version's")
    send(settings, 5, first=200, label="no class of it")
    send(settings, 5, first=300, feature=np.ones(3, np.float16))
    (settings.serve_record / "answers-99999.jsonl").write_bytes(b"torn")
    found = gather(Records(settings), at_most=100)

    assert (len(found.sent), found.skipped, found.newest) == (30, 11, 5029.0)


def test_the_newest_images_are_looked_at_and_test_images_among_them_leave_the_reference(settings):
    send(settings, 30)
    send(settings, 20, first=100)
    send(settings, 1, first=200, image=toy_reference().images[7])
    found = gather(Records(settings), at_most=11)

    assert (len(found.sent), len(found.reference)) == (11, 59)
    assert found.sent.images[1] == f"{10**6 + 119:064x}"


def test_the_same_records_give_the_same_figures(settings):
    send(settings, 30)
    gathered = gather(Records(settings), at_most=100)

    assert look(gathered, PARAMS).drift.as_dict() == look(gathered, PARAMS).drift.as_dict()


def test_a_version_of_an_earlier_coop_has_nothing_to_compare_with(settings):
    make_champion("1", settings)
    sentence = looked(settings)[0]

    assert sentence.startswith("version 1 of toys carries nothing of its test images, so there is nothing to compare")
    with pytest.raises(WatchError, match="`dvc repro` and `coop promote` bring one that does"):
        gather(Records(settings), at_most=100)


def test_without_records_or_a_champion_a_sentence_says_so(settings):
    assert "set COOP_SERVE_RECORD to a folder" in looked(settings.model_copy(update={"serve_record": None}))[0]
    with connected(settings) as mlflow:
        mlflow.MlflowClient().delete_registered_model_alias("toys", "champion")
    assert looked(settings)[0] == "toys has no champion to watch: `coop promote` makes one"


def test_a_reference_that_is_not_its_card_s_is_refused(tmp_path):
    prompt = with_reference(tmp_path, toy_reference())
    assert read_reference(prompt).images == toy_reference().images
    write_tensors(prompt / "reference.safetensors", toy_reference(30).tensors())
    with pytest.raises(ArtifactError, match=r"reference.safetensors is not the file its card was written for"):
        read_reference(prompt)
    (prompt / "reference.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"reference.safetensors is missing"):
        read_reference(prompt)
    assert read_reference(EARLIER) is None
    assert read_artifact(prompt).class_names == CLASSES


@pytest.fixture
def in_project(settings, monkeypatch) -> Settings:
    """What a command finds: this project's params.yaml, and the settings as variables."""
    monkeypatch.chdir(ROOT)
    variables = as_variables(settings) | {"COOP_SERVE_RECORD": str(settings.serve_record), "COLUMNS": "80"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return settings


def test_the_command_shows_a_table_and_puts_nothing_on_record(in_project, capsys):
    send(in_project, 60)
    is_passed, said = show_look(as_json=False), capsys.readouterr().out

    assert not is_passed
    assert "toys version 2: 60 images against 60 test images" in said
    assert [line.split()[0] for line in said.splitlines() if line.split()[-1:] == ["no"]] == SIGNS
    assert max(map(len, said.splitlines()[:-1])) <= 80
    assert last_look(Records(in_project), version_run=find_version("champion", Records(in_project)).run_id) is None
    (in_project.serve_record / "answers-99999.jsonl").write_bytes(b"torn")
    show_look(as_json=False)
    assert "not of this version's classes: 1\n" in capsys.readouterr().out


def test_the_command_ends_with_status_1_where_a_limit_is_passed(in_project):
    send(in_project, 60, moved=5)
    ended = subprocess.run([sys.executable, "-m", "pipelines.commands.cli", "watch", "--json"], text=True,
                           capture_output=True, timeout=300)  # fmt: skip

    assert ended.returncode == 1, ended.stderr
    assert json.loads(ended.stdout)["raised"] == ["features"]


def test_the_command_refuses_where_nothing_is_recorded(in_project, monkeypatch):
    monkeypatch.setenv("COOP_SERVE_RECORD", "")
    with pytest.raises(WatchError, match=r"^nothing is recorded"):
        show_look(as_json=False)


def test_which_model_is_asked_where_nothing_says_so(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GateError, match=r"^which model\?"):
        gather(Records(settings.model_copy(update={"registered_model": None})), at_most=10)

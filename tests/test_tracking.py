"""Tracking: a finished run becomes one MLflow run and one registered version, which answers and comes back."""

import base64
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_images import paint
from toy_prompt import write_prompt

from coop_core.artifact import read_artifact
from coop_core.errors import ArtifactError, ServiceError
from coop_core.files import digest_file
from pipelines.commands.compare import print_runs, run_rows
from pipelines.records import local_versions
from pipelines.records.registry import fetch_prompt
from pipelines.records.runs import DatasetInput, RunRecord, Tracked, compare_link, list_runs, run_link, track
from pipelines.records.server import Records, connected
from pipelines.settings import Settings

# MLflow's own, of its pages on agents; it appears once, in whichever test imports mlflow.pyfunc first.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")

NAMES = ("cat", "sea lake", "river")
TRAINING = "workflowType=machine_learning"
"""What opens MLflow where runs and models are; its page reads it behind the #."""
DIGESTS = {"training": "a" * 64, "test": "b" * 64}
EPOCHS = [
    {"epoch": 0, "learning_rate": 1e-5, "loss": 1.5, "accuracy": 0.25, "val_loss": 1.25, "val_accuracy": None},
    {"epoch": 1, "learning_rate": 0.02, "loss": 0.75, "accuracy": 0.5, "val_loss": 1.0, "val_accuracy": None},
]


@pytest.fixture(scope="module", autouse=True)
def _plain_environment(tmp_path_factory):
    """No setting of whoever runs the tests, no telemetry, no retries; stray files land in a temporary folder."""
    before, folder = dict(os.environ), Path.cwd()
    for name in before:
        if name.startswith(("COOP_", "MLFLOW_")):
            del os.environ[name]
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    os.environ.update(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false", MLFLOW_LOGGING_LEVEL="WARNING")
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Records:
    """One SQLite file for all tests: making its tables takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    return Records(Settings(
        _env_file=None, tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=(folder / "mlruns").as_uri()
    ))  # fmt: skip


def other(records: Records, **changes: str) -> Records:
    """The same server under other names."""
    return Records(records.settings.model_copy(update=changes))


@pytest.fixture(scope="module")
def prompt(backbone, tmp_path_factory) -> Path:
    """An untrained artefact on a tiny backbone."""
    return write_prompt(tmp_path_factory.mktemp("prompt") / "prompt", backbone, NAMES, curve=EPOCHS)


@pytest.fixture(scope="module")
def make_record(prompt, tmp_path_factory) -> Callable[..., RunRecord]:
    files = tmp_path_factory.mktemp("files")
    (files / "report").mkdir()
    (files / "report/report.html").write_text("<p>report</p>")
    (files / "params.yaml").write_text("seed: 7\n")

    def rows(word: str) -> dict[str, list[Any]]:
        return {"path": [f"{word}.png"], "class_name": ["cat"], "sha256": ["d" * 64]}

    def make(key: str, **changes: Any) -> RunRecord:
        record = RunRecord(
            name=f"toys-{key}",
            key=key,
            params={"seed": 7, "train.learning_rate": 0.02, "train.epochs": 2},
            tags={"dataset": "toys", "method": "coop", "backbone": "flat", "shots": "1", "seed": "7",
                  "test_digest": DIGESTS["test"]},
            metrics={"accuracy": 0.5, "gain_over_zero_shot": 0.25, "val_accuracy": 0.75,
                     "test/linear_probe/accuracy": 0.625},
            epochs=EPOCHS,
            datasets=[DatasetInput("toys", use, DIGESTS[use], "https://toys.example", rows(use)) for use in DIGESTS],
            per_class={"class": list(NAMES), "test_images": [1, 2, 3], "coop": [0.0, 0.5, 1.0]},
            files=[(files / "report", "report"), (files / "params.yaml", "")],
            prompt=prompt,
            note="coop on toys",
            description="50.0 %",
            version_tags={"n_test": "6"},
        )  # fmt: skip
        return replace(record, **changes)

    return make


@pytest.fixture(scope="module")
def history(records, make_record) -> dict[str, Tracked]:
    """What the tests look at: a run, the same run again, and another one that is a little better."""
    first = track(make_record("first"), records)
    with connected(records.settings) as mlflow:
        alone = mlflow.MlflowClient().get_model_version_by_alias("coop-toys", "candidate").version
    again = track(make_record("first"), records)
    second = track(make_record("second", metrics={"accuracy": 0.75, "gain_over_zero_shot": -0.25}), records)
    return {"first": first, "again": again, "second": second, "alone": alone}


@pytest.fixture
def client(records, history):
    with connected(records.settings) as mlflow:
        yield mlflow.MlflowClient()


@pytest.fixture
def run(client, history):
    return client.get_run(history["first"].run_id)


def test_a_tracked_run_is_finished(run):
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "toys-first"


def test_parameters_are_recorded_under_their_dotted_names(run):
    assert run.data.params.items() >= {"seed": "7", "train.learning_rate": "0.02", "train.epochs": "2"}.items()


def test_metrics_and_tags_are_recorded(run):
    assert run.data.metrics["accuracy"] == 0.5
    assert run.data.tags["test_digest"] == DIGESTS["test"]


def test_each_epoch_is_a_point_of_the_curve(client, history):
    points = client.get_metric_history(history["first"].run_id, "epoch/loss")

    assert [(point.step, point.value) for point in points] == [(0, 1.5), (1, 0.75)]


def test_what_an_epoch_did_not_measure_is_no_point(client, history):
    assert client.get_metric_history(history["first"].run_id, "epoch/val_accuracy") == []


def test_the_images_are_inputs_of_the_run_with_their_digests(run):
    inputs = {
        tag.value: (used.dataset.name, {tag.key: tag.value for tag in used.tags}["sha256"])
        for used in run.inputs.dataset_inputs
        for tag in used.tags
        if tag.key == "mlflow.data.context"
    }

    assert inputs == {use: ("toys", digest) for use, digest in DIGESTS.items()}


def test_the_table_of_classes_is_kept_with_the_run(client, history):
    first = history["first"]
    table = client.load_table(first.experiment_id, "per_class.json", run_ids=[first.run_id])

    assert table["class"].tolist() == list(NAMES)
    assert table["coop"].tolist() == [0.0, 0.5, 1.0]


def test_files_and_folders_are_kept_with_the_run(client, history):
    run_id = history["first"].run_id
    kept = {file.path for folder in ("", "report") for file in client.list_artifacts(run_id, folder)}

    assert {"params.yaml", "report/report.html", "per_class.json"} <= kept


def test_the_first_run_is_version_1_and_candidate(history):
    assert (history["first"].model_name, history["first"].model_version) == ("coop-toys", "1")
    assert str(history["alone"]) == "1"


def test_a_version_says_what_it_is_and_which_run_made_it(client, history):
    version = client.get_model_version("coop-toys", "1")

    assert version.description.startswith("50.0 %\n\n[The report](#/experiments/")
    assert version.run_id == history["first"].run_id
    assert version.tags["dataset"] == "toys"
    assert version.tags["n_test"] == "6"


def test_a_version_links_to_the_report_among_the_files_of_its_run(client, history):
    first = history["first"]
    links = re.findall(r"\]\(#/([^)]*)\)", client.get_model_version("coop-toys", "1").description)

    assert links == [f"experiments/{first.experiment_id}/runs/{first.run_id}/artifacts/report/report.html?{TRAINING}"]
    assert "report/report.html" in [file.path for file in client.list_artifacts(first.run_id, "report")]


def test_a_run_says_what_it_is_and_where_its_report_and_its_version_are(run):
    note = run.data.tags["mlflow.note.content"]

    assert note.startswith("coop on toys\n\n[The report](#/experiments/")
    assert "is the run's artifact `report/report.html`" in note
    assert f"[coop-toys version 1](#/models/coop-toys/versions/1?{TRAINING})" in note


def test_what_is_said_of_a_version_alone_is_no_tag_of_the_run(run):
    assert "n_test" not in run.data.tags


def test_the_registered_model_says_what_its_aliases_mean(client, history):
    description = client.get_registered_model("coop-toys").description

    assert "`@candidate` is what was tracked last" in description
    assert "`@champion` is what passed" in description


def test_what_a_person_wrote_of_the_registered_model_stays(records, make_record):
    elsewhere = other(records, experiment="described", registered_model="described")
    with connected(elsewhere.settings) as mlflow:
        mlflow.MlflowClient().create_registered_model("described", description="Ours.")
        track(make_record("described"), elsewhere)

        assert mlflow.MlflowClient().get_registered_model("described").description == "Ours."


def test_tracking_the_same_thing_again_returns_the_first_record(history):
    assert history["again"] == history["first"]


def test_tracking_the_same_thing_again_adds_nothing(client, history):
    runs = client.search_runs([history["first"].experiment_id], "tags.`coop.key` = 'first'")

    assert len(runs) == 1
    assert len(client.search_model_versions("name = 'coop-toys'")) == 2


def test_another_run_is_version_2_and_becomes_candidate(client, history):
    assert history["second"].model_version == "2"
    assert str(client.get_model_version_by_alias("coop-toys", "candidate").version) == "2"


def test_the_first_run_again_after_another_is_candidate_again(client, records, history, make_record):
    """What the workspace holds is what `coop promote` judges."""
    track(make_record("first"), records)
    again = str(client.get_model_version_by_alias("coop-toys", "candidate").version)
    track(make_record("second", metrics={"accuracy": 0.75, "gain_over_zero_shot": -0.25}), records)

    assert again == "1"
    assert str(client.get_model_version_by_alias("coop-toys", "candidate").version) == "2"


def test_a_run_whose_version_was_deleted_is_registered_anew(records, make_record):
    elsewhere = other(records, experiment="deleted", registered_model="deleted")
    lost = track(make_record("lost"), elsewhere)
    with connected(elsewhere.settings) as mlflow:
        mlflow.MlflowClient().delete_model_version("deleted", lost.model_version)
    found = track(make_record("lost"), elsewhere)

    assert found.run_id != lost.run_id
    assert found.model_version != lost.model_version


def test_the_same_run_under_another_name_is_registered_there(records, client, make_record):
    here = other(records, experiment="named", registered_model="one")
    elsewhere = other(here, registered_model="other")
    first, tracked = track(make_record("first"), here), track(make_record("first"), elsewhere)

    assert (tracked.model_name, tracked.model_version) == ("other", "1")
    assert track(make_record("first"), elsewhere) == tracked
    assert str(client.get_model_version_by_alias("other", "candidate").version) == "1"
    assert track(make_record("first"), here) == first


def test_a_run_that_fails_on_the_way_is_closed_as_failed_and_registers_nothing(client, records, history, make_record):
    ragged = make_record("ragged", per_class={"class": ["a", "b"], "coop": [1.0]})
    with pytest.raises(ValueError, match="same length"):
        track(ragged, records)

    failed = client.search_runs([history["first"].experiment_id], "tags.`coop.key` = 'ragged'")
    assert [run.info.status for run in failed] == ["FAILED"]
    assert len(client.search_model_versions("name = 'coop-toys'")) == 2


def test_an_experiment_in_an_sqlite_file_keeps_its_files_beside_it(records, history, make_record, tmp_path):
    shutil.copy(records.address.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    ours = Records(Settings(_env_file=None, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="another"))
    with pytest.raises(ValueError, match="same length"):  # the experiment is made, and no model is packed
        track(make_record("ragged", per_class={"class": ["a", "b"], "coop": [1.0]}), ours)

    with connected(ours.settings) as mlflow:
        location = mlflow.MlflowClient().get_experiment_by_name("another").artifact_location
    assert location == (tmp_path / "mlruns").as_uri()


@pytest.fixture(scope="module")
def served(records, history, tmp_path_factory) -> dict[str, Any]:
    """What the registered model says in a process of its own, away from this code."""
    folder = tmp_path_factory.mktemp("served")
    images = [base64.b64encode(paint(folder / f"{n}.png", n, size=(40, 30)).read_bytes()).decode() for n in range(2)]
    junk = [base64.b64encode(b"no image").decode(), "%%%", ""]
    (folder / "images.json").write_text(json.dumps([images[0], *junk, images[1]]))
    program = (
        "import json, sys, mlflow, pandas as pd, coop_core\n"
        f"mlflow.set_tracking_uri({records.address!r})\n"
        "model = mlflow.pyfunc.load_model('models:/coop-toys@candidate')\n"
        "frame = pd.DataFrame({'image': json.load(open('images.json'))})\n"
        "answers = model.predict(frame).to_dict('records')\n"
        "first = model.predict(frame, params={'top': 1}).to_dict('records')\n"
        "none = len(model.predict(frame[1:2])), len(model.predict(frame[1:2]).columns)\n"
        "json.dump({'answers': answers, 'top': first, 'none': none}, open('answers.json', 'w'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answers.json").read_text())


@pytest.mark.slow
def test_the_candidate_answers_images_with_a_label_and_its_probability(served):
    for answer in (served["answers"][0], served["answers"][-1]):
        assert set(answer["labels"]) == set(NAMES)
        assert (answer["label"], answer["probability"]) == (answer["labels"][0], answer["probabilities"][0])
        assert answer["error"] == ""


@pytest.mark.slow
def test_the_probabilities_of_the_candidate_sum_to_1(served):
    sums = [sum(answer["probabilities"]) for answer in served["answers"] if not answer["error"]]

    assert sums == pytest.approx([1.0, 1.0])


@pytest.mark.slow
def test_a_row_that_is_no_image_gets_its_reason_and_leaves_the_others_alone(served):
    errors = [answer["error"] for answer in served["answers"]]

    assert (errors[0], errors[3], errors[4]) == ("", "the image is empty", "")
    assert errors[1].startswith("the image cannot be read (no picture in one of the formats JPEG, PNG")
    assert errors[2].startswith("the image is not base64 text: send the file's bytes in base64")


@pytest.mark.slow
def test_a_request_for_the_best_class_alone_gets_one(served):
    assert [len(answer["labels"]) for answer in served["top"]] == [1, 0, 0, 0, 1]


@pytest.mark.slow
def test_a_request_without_any_image_is_answered(served):
    assert served["none"] == [1, 6]


@pytest.mark.parametrize("reference", ["coop-toys@candidate", "coop-toys/1", "models:/coop-toys/2"])
def test_a_registered_prompt_comes_back_whole(records, history, prompt, tmp_path, reference):
    folder = fetch_prompt(reference, records, tmp_path)

    assert read_artifact(folder).card == read_artifact(prompt).card
    assert (folder / "context.safetensors").read_bytes() == (prompt / "context.safetensors").read_bytes()


@pytest.mark.parametrize(
    "reference", ["coop-toys@champion", "coop-toys/99", "nothing@candidate", "a b@", "@", "/1"]
)
def test_an_unknown_reference_is_a_sentence_with_the_registry(records, history, tmp_path, reference):
    with pytest.raises(ArtifactError, match=f"^no model {reference} in the registry at sqlite:.+mlflow.db: "):
        fetch_prompt(reference, records, tmp_path)


def digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("reference", ["coop-toys@candidate", "coop-toys/1"])
def test_two_queries_find_the_files_that_mlflow_would_download(records, history, tmp_path, monkeypatch, reference):
    found = fetch_prompt(reference, records, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(local_versions, "SCHEMA", "another MLflow's")

    downloaded = fetch_prompt(reference, records, tmp_path)

    assert downloaded.is_relative_to(tmp_path)
    assert digests(downloaded) == digests(found) != {}


def test_the_pinned_mlflow_has_the_tables_that_the_queries_know(records, history):
    with closing(sqlite3.connect(records.address.removeprefix("sqlite:///"))) as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchall() == [(local_versions.SCHEMA,)]


def test_a_deleted_version_is_not_found_by_queries(records, history, client):
    source = client.get_model_version("coop-toys", "1").source
    number = str(client.create_model_version("coop-toys", source).version)
    assert local_versions.find_locally(f"coop-toys/{number}", records.settings)
    client.delete_model_version("coop-toys", number)
    assert local_versions.find_locally(f"coop-toys/{number}", records.settings) is None


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "sqlite:///nowhere.db", "sqlite://"])
def test_other_registries_are_left_to_mlflows_client(address):
    found = local_versions.find_locally("coop-toys/1", Settings(_env_file=None, tracking_uri=address))
    assert found is None


def test_a_file_that_is_no_registry_is_left_to_mlflows_client(tmp_path):
    (tmp_path / "mlflow.db").write_text("not a database " * 100)
    settings = Settings(_env_file=None, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert local_versions.find_locally("coop-toys/1", settings) is None


def test_a_prompt_of_a_registry_in_sqlite_is_found_without_mlflow(records, history, tmp_path):
    """Whose import takes longer than an answer."""
    code = ("import sys; from pathlib import Path; from pipelines.settings import Settings; "
            "from pipelines.records.registry import fetch_prompt; from pipelines.records.server import Records; "
            "records = Records(Settings(_env_file=None, tracking_uri=sys.argv[1])); "
            "fetch_prompt('coop-toys@candidate', records, Path(sys.argv[2])); "
            "sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)")  # fmt: skip
    words = [sys.executable, "-c", code, records.address, str(tmp_path)]
    assert subprocess.run(words, check=False).returncode == 0


DOWN = Records(Settings(_env_file=None, tracking_uri="http://127.0.0.1:1"))


def test_a_server_that_is_down_is_a_sentence_with_its_address_for_tracking(make_record):
    with pytest.raises(ServiceError, match=r"^MLflow at http://127\.0\.0\.1:1 says: .+correct COOP_TRACKING_URI"):
        track(make_record("first"), DOWN)


def test_a_server_that_is_down_is_a_sentence_with_its_address_for_listing():
    with pytest.raises(ServiceError, match=r"^MLflow at http://127\.0\.0\.1:1 says: "):
        list_runs(DOWN, limit=5)


def test_a_server_that_is_down_is_not_called_a_missing_model(tmp_path):
    with pytest.raises(ServiceError, match=r"^MLflow at http://127\.0\.0\.1:1 says: "):
        fetch_prompt("coop-toys@candidate", DOWN, tmp_path)


def test_a_file_that_is_no_database_is_a_sentence(tmp_path):
    (tmp_path / "mlflow.db").write_text("not a database " * 100)

    with pytest.raises(ServiceError, match="file is not a database"):
        list_runs(Records(Settings(_env_file=None, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")), limit=5)


@pytest.mark.parametrize("uri", ["carrier-pigeon://home", "mlruns"])
def test_an_address_that_mlflow_does_not_know_is_a_sentence(uri):
    with pytest.raises(ServiceError, match=f"^MLflow at {uri} says: "):
        list_runs(Records(Settings(_env_file=None, tracking_uri=uri)), limit=5)


def test_the_link_of_a_run_is_on_the_server_or_on_the_page_that_make_ui_opens(records):
    tracked = Tracked("run", "4", "coop-toys", "1")

    assert run_link(tracked, records) == f"http://127.0.0.1:5000/#/experiments/4/runs/run?{TRAINING}"
    server = Records(Settings(_env_file=None, tracking_uri="https://mlflow.example/"))
    assert run_link(tracked, server) == f"https://mlflow.example/#/experiments/4/runs/run?{TRAINING}"


def test_finished_runs_are_listed_the_newest_first(records, history):
    assert [run["name"] for run in list_runs(records, limit=10)] == ["toys-second", "toys-first"]


def test_the_list_ends_at_its_limit(records, history):
    assert [run["name"] for run in list_runs(records, limit=1)] == ["toys-second"]


def test_an_experiment_that_does_not_exist_has_no_runs(records, history):
    assert list_runs(other(records, experiment="none"), limit=5) == []


def test_a_row_says_what_a_run_was_and_what_it_reached(records, history):
    row = run_rows(records, limit=10)[1]

    assert row == {
        "run_id": history["first"].run_id,
        "experiment_id": history["first"].experiment_id,
        "start_time": row["start_time"],
        "version": "coop-toys/1",
        "dataset": "toys",
        "backbone": "flat",
        "method": "coop",
        "shots": "1",
        "seed": "7",
        "test_digest": DIGESTS["test"],
        "accuracy": 0.5,
        "gain_over_zero_shot": 0.25,
        "val_accuracy": 0.75,
        "linear_probe": 0.625,
        "learning_rate": "0.02",
        "epochs": "2",
    }
    assert row == json.loads(json.dumps(row))


@pytest.mark.parametrize(
    ("column", "versions"), [("when", "21"), ("accuracy", "21"), ("gain", "12")]
)
def test_rows_are_sorted_by_what_is_asked(records, history, column, versions):
    rows = run_rows(records, limit=10, sort=column)

    assert [row["version"] for row in rows] == [f"coop-toys/{number}" for number in versions]


def test_the_limit_takes_the_newest_runs_whatever_they_are_sorted_by(records, history):
    assert [row["version"] for row in run_rows(records, limit=1, sort="gain")] == ["coop-toys/2"]


def test_an_unknown_column_is_a_sentence_with_the_known_ones(records):
    with pytest.raises(ServiceError, match=r"^--sort size is not one of: when, accuracy, gain$"):
        run_rows(records, limit=1, sort="size")


def test_the_table_shows_a_line_for_each_run_in_percent(records, history, capsys):
    print_runs(run_rows(records, limit=10), "http://127.0.0.1:5000")
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]

    assert ["toys", "flat", "coop", "1", "7", "0.02", "50.0", "25.0", "62.5", "75.0"] in [line[1:] for line in shown]


def test_the_table_warns_of_runs_that_were_judged_on_different_images(records, history, capsys):
    rows = run_rows(records, limit=10)
    print_runs([rows[0], {**rows[1], "test_digest": "other"}], "http://127.0.0.1:5000")

    assert "different test images" in capsys.readouterr().out


def test_no_runs_are_a_sentence_and_no_table(capsys):
    print_runs([], "http://127.0.0.1:5000")

    assert capsys.readouterr().out == "no finished runs yet: `dvc repro` makes one\n"


def test_the_link_to_compare_names_every_run_and_their_experiment_once(records: Records) -> None:
    rows = [{"run_id": run, "experiment_id": "1"} for run in ("a1", "b2")]
    link = compare_link(rows, records)
    asked = f"runs=%5B%22a1%22%2C%22b2%22%5D&experiments=%5B%221%22%5D&{TRAINING}"
    assert link == f"http://127.0.0.1:5000/#/compare-runs?{asked}"

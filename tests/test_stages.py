"""The stages, run one after another on a few little images: what each reads, writes and leaves alone."""

import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from test_dvc_yaml import STAGES as DECLARED
from test_dvc_yaml import outs as outs_of

import coop_core.params.sections
from coop_core.artifact import read_artifact, write_card
from coop_core.data.split import read_split
from coop_core.errors import ArtifactError, BackboneError, CoopError, DatasetError, ParamsError, ServiceError
from coop_core.files import read_tensors, write_tensors
from coop_core.methods.coop import CoOp
from coop_core.params import load_params
from coop_core.predictor import Predictor
from coop_core.reference import read_reference
from coop_core.training import Checkpoint, Epoch
from pipelines.records.registry import fetch_prompt
from pipelines.records.runs import Tracked, list_runs
from pipelines.records.server import open_records
from pipelines.stages import baselines, download, evaluate, features, label, report, split, track, train

pytestmark = [
    # MLflow's own, of its pages on agents; it appears once, in whichever test imports mlflow.pyfunc first.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
    # A data set without a homepage has its title as source, which MLflow takes for a local path.
    pytest.mark.filterwarnings("ignore:The specified dataset source can be interpreted in multiple:UserWarning"),
]

ROOT = Path(__file__).parents[1]
STAGES = {"download": download, "split": split, "features": features, "label": label, "baselines": baselines,
          "train": train, "evaluate": evaluate, "report": report, "track": track}  # fmt: skip
COLOURS = {"red_brick": (200, 40, 30), "green_field": (40, 170, 50), "blue_lake": (30, 60, 200)}
IMAGES = 12
LEFT_BEHIND = shutil.ignore_patterns("mlflow.db*", "mlruns", ".tracked.json.*")
"""What copies of the finished project go without: MLflow's records, and a file that is just being written."""
PARAMS = {
    "seed": 1,
    "dataset": {"source": "images", "test_fraction": 0.5, "accept": []},
    "split": {"shots": 2, "curve_shots": [1], "classes": "all", "test_per_class": None},
    "backbone": {"architecture": "mini", "pretrained": None, "files": "constraints.txt"},
    "features": {"views": 1, "batch_size": 16},
    "method": {"name": "coop", "n_context": 4, "initial_words": None, "class_specific": False,
               "class_token_position": "end"},
    "train": {"epochs": 3, "batch_size": 4, "learning_rate": 0.02},
    "engine": {"path": "auto", "precision": "float32", "max_memory": None},
    "baselines": {"ensemble_templates": ["a photo of the large {}."], "linear_probe_steps": 1},
    "evaluate": {"calibration_bins": 5},
    "gate": {"min_gain_over_zero_shot": 0.0, "significance": 0.05, "max_class_drop": 0.15, "min_images_a_class": 5},
}  # fmt: skip


def write_params(folder: Path, **changes: Any) -> None:
    """PARAMS with `section={key: value}` changed."""
    tree = {name: {**value, **changes.get(name, {})} if isinstance(value, dict) else changes.get(name, value)
            for name, value in PARAMS.items()}  # fmt: skip
    extra = {name: value for name, value in changes.items() if name not in tree}
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(tree | extra, file)


def paint_images(folder: Path) -> None:
    """Noise around a colour a class, every image another one."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(IMAGES):
            pixels = np.clip(np.array(colour) + random.normal(0, 60, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """The folder as the working folder, with no setting of whoever runs the tests."""
    before, place = dict(os.environ), Path.cwd()
    for name in before:
        if name.startswith(("COOP_", "MLFLOW_")):
            del os.environ[name]
    os.environ.update(COOP_DEVICE="cpu", MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_LOGGING_LEVEL="WARNING")
    os.environ.update(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    # Not the relative default: MLflow keeps a connection for an address, whatever folder it meant at first.
    os.environ.update(COOP_TRACKING_URI=f"sqlite:///{folder}/mlflow.db")
    os.environ.update(COOP_ARTIFACT_LOCATION=(folder / "mlruns").as_uri())
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(place)
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module", autouse=True)
def _load_the_backbone_once(mini) -> Iterator[None]:
    """Every stage loads the same weights, which takes it some seconds; here they share them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coop_core.params.sections, "load_backbone", lambda *named, **more: mini)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, worker_id) -> tuple[Path, str]:
    """A project after all stages, and what `track` printed; made once for all workers."""
    root = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    folder, printed = root / "stages", root / "stages-printed.txt"
    with (root / "stages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            shutil.rmtree(folder, ignore_errors=True)
            printed.write_text(run_stages(folder))
    return folder, printed.read_text()


def run_stages(folder: Path) -> str:
    """All stages on little images in a new folder -> what the last one printed."""
    paint_images(folder / "images")
    write_params(folder)
    with working_in(folder):
        for stage in STAGES.values():
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                stage.main()
    return printed.getvalue()


@pytest.fixture(scope="module")
def done(finished) -> Path:
    """The finished project, to look at."""
    return finished[0]


@pytest.fixture
def project(done, tmp_path) -> Iterator[Path]:
    """A copy of the finished project, to work in; MLflow's records stay behind."""
    folder = tmp_path / "project"
    shutil.copytree(done, folder, ignore=LEFT_BEHIND)
    with working_in(folder):
        yield folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_download_writes_the_data_set_in_its_normal_form(done):
    assert (done / "data/raw/dataset.json").is_file()
    assert len(list((done / "data/raw").rglob("*.png"))) == IMAGES * len(COLOURS)


def test_download_takes_the_place_of_an_earlier_data_set(project):
    shutil.rmtree(project / "images/red_brick")
    download.main()

    assert len(list((project / "data/raw").rglob("*.png"))) == IMAGES * (len(COLOURS) - 1)


def test_split_chooses_the_shots_of_every_class(done):
    chosen = read_split(done / "artifacts/split.json")

    assert chosen.class_names == ("blue lake", "green field", "red brick")
    assert (len(chosen.train), len(chosen.val), len(chosen.test)) == (2 * 3, 2 * 3, 6 * 3)


def test_features_writes_a_row_for_every_image_of_the_split(done):
    shapes = {name: np.load(done / f"artifacts/features/{name}.npy").shape for name in ("train", "val", "test")}
    width = shapes["train"][-1]

    assert shapes == {"train": (6, 1, width), "val": (6, 1, width), "test": (18, 1, width)}


def test_features_says_which_images_and_weights_they_are_of(done, mini):
    chosen, card = read_split(done / "artifacts/split.json"), read(done / "artifacts/features/card.json")

    assert (card["train_digest"], card["test_digest"]) == (chosen.train_digest, chosen.test_digest)
    assert (card["backbone"], card["weights_digest"]) == (mini.name, mini.weights_digest)


def test_baselines_writes_a_linear_probe_for_every_number_of_shots(done):
    card = read(done / "artifacts/baselines/card.json")

    assert set(card["linear_probes"]) == {"1", "2"}
    assert card["linear_probe"] == card["linear_probes"]["2"]
    assert (done / "artifacts/baselines/classifiers.safetensors").is_file()


def test_train_writes_an_artefact_for_every_number_of_shots(done):
    shots = {
        folder: read_artifact(done / "artifacts" / folder).card["data"]["shots"]
        for folder in ("prompt", "curve_prompts/1_shots")
    }

    assert shots == {"prompt": 2, "curve_prompts/1_shots": 1}


def test_the_curve_has_a_row_for_every_epoch(done):
    rows = report.read_table(done / "artifacts/prompt/curve.csv")

    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert all(0 <= row["val_accuracy"] <= 1 and row["loss"] > 0 for row in rows)


def test_train_names_the_nearest_words_of_every_context_vector(done):
    words = read(done / "artifacts/prompt/words.json")

    assert len(words["vectors"]) == 4


def test_the_card_names_what_made_the_prompt_by_digest(done, mini):
    card, chosen = read(done / "artifacts/prompt/card.json"), read_split(done / "artifacts/split.json")

    assert card["data"]["dataset_digest"] == chosen.dataset_digest
    assert card["data"]["train_digest"] == chosen.train_digest
    assert card["data"]["test_digest"] == chosen.test_digest
    assert card["backbone"]["weights_digest"] == mini.weights_digest
    assert set(card["digests"]) == {"card", "context", "class_weights"}


def test_the_card_holds_the_parameters_of_the_run(done):
    params = read(done / "artifacts/prompt/card.json")["params"]

    assert (params["seed"], params["train"]["learning_rate"], params["split"]["shots"]) == (1, 0.02, 2)


def test_a_finished_training_leaves_no_checkpoint(done):
    assert list((done / ".cache/checkpoints").glob("*")) == []


def test_evaluate_judges_four_classifiers_on_all_test_images(done):
    found = read(done / "artifacts/judged/own/evaluation.json")

    assert list(found["classifiers"]) == ["zero-shot", "prompt ensemble", "linear probe", "coop"]
    assert {e["n"] for e in found["classifiers"].values()} == {18}


def test_evaluate_gives_the_accuracy_of_every_number_of_shots(done):
    found = read(done / "artifacts/judged/own/evaluation.json")
    last = {"shots": 2, **{name: found["classifiers"][name]["accuracy"] for name in ("coop", "linear probe")}}

    assert [point["shots"] for point in found["few_shot_curve"]] == [1, 2]
    assert found["few_shot_curve"][-1] == last


def test_the_metrics_that_dvc_compares_are_fractions_against_zero_shot(done):
    metrics = read(done / "artifacts/metrics.json")
    gain = metrics["coop"]["accuracy"] - metrics["zero-shot"]["accuracy"]

    assert metrics["coop"]["gain_over_zero_shot"] == pytest.approx(gain)
    assert all(0 <= values["accuracy"] <= 1 for values in metrics.values())


def test_predictions_name_each_test_image_and_agree_with_the_accuracy(done):
    rows = report.read_table(done / "artifacts/judged/own/predictions.csv")
    accuracy = read(done / "artifacts/metrics.json")["coop"]["accuracy"]

    assert [row["path"] for row in rows] == [image.path for image in read_split(done / "artifacts/split.json").test]
    assert sum(row["label"] == row["predicted"] for row in rows) / len(rows) == pytest.approx(accuracy)


def test_report_writes_a_page_and_its_pictures(done):
    assert {path.name for path in (done / "artifacts/report").iterdir()} == {
        "report.html", "training_curve.png", "confusion_matrix.png", "reliability.png", "few_shot_curve.png", "samples",
    }  # fmt: skip
    assert "blue lake" in (done / "artifacts/report/report.html").read_text()


def test_report_leaves_a_test_picture_of_every_class_to_try(done):
    names = read_split(done / "artifacts/split.json").class_names
    tested = {image.path for image in read_split(done / "artifacts/split.json").test}
    samples = sorted((done / "artifacts/report/samples").iterdir())
    pictures = {Image.open(done / "data/raw" / path).tobytes() for path in tested}

    assert [sample.stem for sample in samples] == [f"{i}-{name.replace(' ', '-')}" for i, name in enumerate(names)]
    assert {Image.open(sample).tobytes() for sample in samples} <= pictures


def test_the_last_line_is_a_command_that_runs_as_it_stands(finished):
    command = finished[1].strip().splitlines()[-1].removeprefix("predict").split()

    assert command[1:] == ["predict", "artifacts/report/samples", "--top", "3"]
    assert Path(command[0]).is_file()
    assert (finished[0] / command[2]).is_dir()


def test_track_prints_a_table_of_all_classifiers_and_where_to_go_on(finished):
    for shown in ("zero-shot", "prompt ensemble", "linear probe", "coop", "95 % interval", "18 test images, 2 shots"):
        assert shown in finished[1]
    for line in ("registered  coop-images version 1, alias candidate", "report      artifacts/report/report.html"):
        assert line in finished[1].splitlines()


def test_track_writes_where_the_record_is(done):
    tracked = read(done / "artifacts/tracked.json")
    with working_in(done):
        runs = list_runs(open_records(), limit=10)

    assert [run["run_id"] for run in runs] == [tracked["run_id"]]
    assert (tracked["model_name"], tracked["model_version"]) == ("coop-images", "1")
    assert tracked["tracking_uri"] == f"sqlite:///{done}/mlflow.db"


def test_the_record_holds_parameters_metrics_and_what_was_judged(done):
    with working_in(done):
        run = list_runs(open_records(), limit=1)[0]

    assert run["params"]["train.learning_rate"] == "0.02"
    assert run["metrics"]["accuracy"] == read(done / "artifacts/metrics.json")["coop"]["accuracy"]
    assert run["tags"]["test_digest"] == read_split(done / "artifacts/split.json").test_digest


def test_the_registered_prompt_is_the_trained_one_with_its_test_metrics(done, tmp_path):
    with working_in(done):
        folder = fetch_prompt("coop-images@candidate", open_records(), tmp_path)
    ours, trained = content(folder), content(done / "artifacts/prompt")
    card = json.loads(ours.pop("card.json"))
    assert ours.pop("reference.safetensors") == (done / "artifacts/reference.safetensors").read_bytes()

    assert ours == {name: data for name, data in trained.items() if name != "card.json"}
    assert card["metrics"]["coop"]["accuracy"] == read(done / "artifacts/metrics.json")["coop"]["accuracy"]
    assert "metrics" not in json.loads(trained["card.json"])


def test_the_registered_prompt_carries_what_it_saw_of_its_test_images(done, mini, tmp_path):
    with working_in(done):
        folder = fetch_prompt("coop-images/1", open_records(), tmp_path)
    seen, test = read_reference(folder), read_split(done / "artifacts/split.json").test
    features = np.load(done / "artifacts/features/test.npy")[:, 0]
    with (done / "artifacts/judged/own/predictions.csv").open(newline="") as file:
        said = list(csv.DictReader(file))

    assert seen.images == tuple(image.digest for image in test)
    assert np.abs(seen.features - features / np.linalg.norm(features, axis=1, keepdims=True)).max() < 1e-3
    assert seen.labels.tolist() == [int(row["predicted"]) for row in said]
    assert seen.confidences.tolist() == pytest.approx([float(row["confidence"]) for row in said])
    assert seen.answered.all()
    predictor = Predictor(read_artifact(folder), mini, with_features=True)
    (served,) = predictor.rank(predictor.view(done / "data/raw" / test[0].path)[None])
    assert np.abs(served.feature - seen.features[0]).max() < 2e-3                  # as a server would record it


def test_tracking_the_same_run_again_adds_no_version(done):
    with working_in(done), contextlib.redirect_stdout(io.StringIO()):
        track.main()
        runs = list_runs(open_records(), limit=10)

    assert len(runs) == 1
    assert read(done / "artifacts/tracked.json")["model_version"] == "1"


def test_a_tracking_server_that_is_down_is_a_sentence_and_changes_nothing(project, monkeypatch):
    before = content(project / "artifacts")
    monkeypatch.setenv("COOP_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(ServiceError, match=r"^MLflow at http://127\.0\.0\.1:1 says: .+only this stage is left"):
        track.main()

    assert content(project / "artifacts") == before


def test_no_login_stands_in_what_track_writes_and_prints(project, monkeypatch, capsys):
    """MLflow's address comes with a login, and a server answered."""
    monkeypatch.setenv("COOP_TRACKING_URI", "http://name:CANARY@mlflow.example:5000")
    monkeypatch.setattr(track, "track", lambda record, records: Tracked("a1", "1", "coop-images", "2"))
    track.main()

    assert read(project / "artifacts/tracked.json")["tracking_uri"] == "http://mlflow.example:5000"
    assert [name for name, data in content(project).items() if b"CANARY" in data] == []
    assert "CANARY" not in "".join(capsys.readouterr())


@pytest.fixture(scope="module")
def retrained(done, tmp_path_factory) -> Path:
    """The project trained again from nothing, beside test features that are noise."""
    folder = tmp_path_factory.mktemp("retrained") / "project"
    shutil.copytree(done, folder, ignore=LEFT_BEHIND)
    for name in ("prompt", "curve_prompts", "baselines"):
        shutil.rmtree(folder / "artifacts" / name)
    path = folder / "artifacts/features/test.npy"
    np.save(path, np.random.default_rng(0).normal(size=np.load(path).shape).astype(np.float32))
    with working_in(folder):
        for stage in (baselines, train, evaluate):
            stage.main()
    return folder


@pytest.mark.parametrize("folder", ["prompt", "curve_prompts", "baselines"])
def test_training_from_nothing_and_with_other_test_images_gives_the_same_bytes(done, retrained, folder):
    assert content(retrained / "artifacts" / folder) == content(done / "artifacts" / folder)


def test_evaluate_reads_the_test_images(done, retrained):
    assert content(retrained / "artifacts/judged/own") != content(done / "artifacts/judged/own")
    assert read(retrained / "artifacts/metrics.json") != read(done / "artifacts/metrics.json")


NEW_EVERY_TIME = {"artifacts/timing.json", "artifacts/tracked.json"}
"""How long it took, and which run it was."""


def under(entries: list[str], files: dict[str, bytes]) -> dict[str, bytes]:
    """Those of a project's files that are one of the entries, or lie in one."""
    return {name: data for name, data in files.items() if any(Path(name).is_relative_to(entry) for entry in entries)}


def places(entries: list[str]) -> list[str]:
    """Of deps or outs in dvc.yaml, for PARAMS."""
    return [PARAMS["dataset"]["source"] if entry == "${dataset.source}" else entry for entry in entries]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reads_only_what_it_depends_on_and_writes_only_its_outs(done, project, stage):
    """All else holds nonsense: a stage that read it would fail or write something else than in the whole project."""
    deps, outs = places(DECLARED[stage]["deps"]), outs_of(DECLARED[stage])
    everything = content(project)
    for name in everything.keys() - under([*deps, "params.yaml", ".cache"], everything).keys():
        (project / name).write_bytes(b"nonsense")
    for out in outs:  # as DVC does
        shutil.rmtree(project / out) if (project / out).is_dir() else (project / out).unlink()
    before = content(project)
    with contextlib.redirect_stdout(io.StringIO()):
        STAGES[stage].main()

    after = content(project)
    written = under([*outs, ".cache", "mlflow.db", "mlruns"], after)
    assert {name: data for name, data in after.items() if name not in written} == {
        name: data for name, data in before.items() if not name.startswith(".cache/")
    }
    assert under(outs, after).keys() == under(outs, everything).keys()
    again = {name: data for name, data in under(outs, after).items() if name not in NEW_EVERY_TIME}
    assert again == {name: everything[name] for name in again}


@pytest.mark.parametrize("stage", ["split", "features", "evaluate", "report"])
def test_a_stage_that_runs_again_writes_the_same_bytes(project, stage):
    before = content(project / "artifacts")
    STAGES[stage].main()

    assert content(project / "artifacts") == before


def test_another_learning_rate_takes_the_features_that_are_known(project):
    before = content(project / "artifacts/features")
    write_params(project, train={"learning_rate": 0.5})
    shutil.rmtree(project / "data/raw")  # not an image is looked at
    features.main()

    assert content(project / "artifacts/features") == before


def test_another_learning_rate_trains_another_context(project, train_alone):
    before = content(project / "artifacts/prompt")
    write_params(project, train={"learning_rate": 0.5})
    train_alone()
    after = content(project / "artifacts/prompt")

    assert after["context.safetensors"] != before["context.safetensors"]
    assert after["curve.csv"] != before["curve.csv"]
    assert json.loads(after["card.json"])["params"]["train"]["learning_rate"] == 0.5


@pytest.fixture
def train_alone(project, mini) -> Callable[[], list[Epoch]]:
    """The train stage's work for the prompt itself, with a backbone that is loaded already."""

    def work() -> list[Epoch]:
        params, chosen = load_params(Path("params.yaml")), read_split(Path("artifacts/split.json"))
        prompt, checkpoints = Path("artifacts/prompt"), Path(".cache/checkpoints")
        return train.train_prompt(prompt, params, chosen, mini, params.split.shots, checkpoints)

    return work


@contextlib.contextmanager
def counting(kind: type) -> Iterator[list[int]]:
    """How often learners of a class are asked for logits."""
    calls, asked = [0], kind.logits

    def count(learner: Any, images: Any) -> Any:
        calls[0] += 1
        return asked(learner, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "logits", count)
        yield calls


class Killed:
    """Progress that ends the process after some epochs, as Ctrl-C does."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs

    @contextlib.contextmanager
    def __call__(self, what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        yield self.step

    def step(self, done: int, **_: Any) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


@pytest.fixture
def killed(project, train_alone, monkeypatch) -> Path:
    """The project after a training that got through two of its three epochs; its checkpoint is there."""
    shutil.rmtree(project / "artifacts/prompt")
    with monkeypatch.context() as patch:
        patch.setattr(train.console, "progress", Killed(epochs=2))
        patch.setattr(train, "Checkpoint", lambda path, key: Checkpoint(path, key, every_seconds=0))
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            train_alone()
    return project


def test_a_killed_training_leaves_a_checkpoint_and_no_prompt(killed):
    assert len(list((killed / ".cache/checkpoints").glob("*"))) == 1
    assert not (killed / "artifacts/prompt/card.json").exists()


def test_a_killed_training_goes_on_where_it_was(killed, train_alone):
    with counting(CoOp) as calls:
        curve = train_alone()

    assert calls == [2]  # the step and the validation of the third epoch
    assert [epoch.epoch for epoch in curve] == [0, 1, 2]


def test_a_killed_training_ends_with_the_bytes_of_one_that_was_not(done, killed, train_alone):
    train_alone()
    found = content(killed / "artifacts/prompt")

    assert found == {name: data for name, data in content(done / "artifacts/prompt").items() if name != "words.json"}


def test_a_training_that_went_on_removes_its_checkpoint(killed, train_alone):
    train_alone()

    assert list((killed / ".cache/checkpoints").glob("*")) == []


def test_a_checkpoint_of_another_learning_rate_is_not_taken_up(killed, train_alone):
    write_params(killed, train={"learning_rate": 0.5})
    with counting(CoOp) as calls:
        train_alone()

    assert calls == [3 * 2]
    assert len(list((killed / ".cache/checkpoints").glob("*"))) == 1


PARTS = {
    "train images": {"split": lambda split: dataclasses.replace(split, train=split.train[::-1][:-1])},
    "validation images": {"split": lambda split: dataclasses.replace(split, val=split.val[:-1])},
    "class names": {"split": lambda split: dataclasses.replace(split, class_names=split.class_names[::-1])},
    "weights": {"backbone": lambda mini: dataclasses.replace(mini, config={"ridge": 7})},
    "preparation of images": {
        "backbone": lambda mini: dataclasses.replace(
            mini, transform=dataclasses.replace(mini.transform, interpolation="bilinear")
        )
    },
    "device": {"backbone": lambda mini: dataclasses.replace(mini, device=torch.device("cuda:1"))},
    "shots": {"shots": lambda shots: shots - 1},
    "code": {"code": lambda code: f"{code}, changed"},
    "labels": {"labels": lambda labels: f"{labels}, others"},
    "seed": {"params": lambda params: params.model_copy(update={"seed": 99})},
}


@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_belongs_to_one_training_alone(project, mini, part):
    """Another value of whatever decides a training to the last bit gives another key, which is not taken up."""
    given = {"params": load_params(Path("params.yaml")), "split": read_split(Path("artifacts/split.json")),
             "backbone": mini, "shots": 2, "code": "digest", "labels": "digest"}  # fmt: skip
    changed = {name: PARTS[part].get(name, lambda same: same)(value) for name, value in given.items()}

    assert train.checkpoint_key(**given) == train.checkpoint_key(**given)
    assert train.checkpoint_key(**changed) != train.checkpoint_key(**given)


def test_training_asks_for_the_checkpoint_of_just_this_code(killed, train_alone, monkeypatch):
    monkeypatch.setattr(train, "core_digest", lambda: "another library")
    with counting(CoOp) as calls:
        train_alone()

    assert calls == [3 * 2]


@pytest.mark.parametrize("stage", ["baselines", "train"])
def test_features_of_other_weights_are_refused_by_whoever_computes_with_them(project, mini, monkeypatch, stage):
    """A checkpoint replaced in place: the text tower would be new, and the image features old."""
    other = dataclasses.replace(mini, config={"ridge": 7})
    monkeypatch.setattr(coop_core.params.sections, "load_backbone", lambda *named, **more: other)

    with pytest.raises(ArtifactError, match=r"computed with other weights .*: run `dvc repro -f features`"):
        STAGES[stage].main()


def test_a_backbone_that_takes_no_prompts_is_refused_before_an_image_is_encoded(project, zoo, monkeypatch):
    monkeypatch.setattr(coop_core.params.sections, "load_backbone", lambda *named, **more: zoo.backbone("siglip"))
    before = (project / "artifacts/features/card.json").read_bytes()

    with pytest.raises(BackboneError, match=r"family SigLIP .*, which context vectors cannot be injected into exactly"):
        features.main()
    assert (project / "artifacts/features/card.json").read_bytes() == before


@pytest.mark.parametrize("stage", ["baselines", "train", "evaluate"])
@pytest.mark.parametrize(
    ("fact", "reason"),
    [("feature_key", "other weights"), ("train_digest", "another split"), ("val_digest", "another split"),
     ("test_digest", "another split"), ("seed", "another split")],
)  # fmt: skip
def test_features_whose_card_says_something_else_are_refused(project, stage, fact, reason):
    card = project / "artifacts/features/card.json"
    card.write_text(json.dumps({**read(card), fact: "something else"}))

    with pytest.raises(ArtifactError, match=reason):
        STAGES[stage].main()


def test_features_with_other_views_than_their_card_says_are_refused(project):
    path = project / "artifacts/features/train.npy"
    np.save(path, np.repeat(np.load(path), 2, axis=1))

    with pytest.raises(ArtifactError, match=r"train\.npy has 2 views, not those of its card"):
        train.main()


@pytest.mark.parametrize("what", ["prompt", "curve_prompts/1_shots"])
@pytest.mark.parametrize(("section", "fact"), [("data", "train_digest"), ("data", "val_digest"),
                                              ("backbone", "weights_digest")])  # fmt: skip
def test_a_prompt_of_another_split_or_backbone_is_not_judged(project, what, section, fact):
    folder = project / "artifacts" / what
    card = read(folder / "card.json")
    write_card(folder, {**card, section: {**card[section], fact: "another"}})

    with pytest.raises(ArtifactError, match=r"another split|other weights"):
        evaluate.main()


@pytest.mark.parametrize("fact", ["train_digest", "val_digest", "feature_key"])
def test_baselines_of_another_split_or_backbone_are_not_judged(project, fact):
    card = project / "artifacts/baselines/card.json"
    card.write_text(json.dumps({**read(card), fact: "another"}))

    with pytest.raises(ArtifactError, match=r"the baselines in artifacts/ (belong to|were made on) (another|other)"):
        evaluate.main()


def test_classifiers_that_are_not_those_of_their_card_are_not_judged(project):
    path = project / "artifacts/baselines/classifiers.safetensors"
    tensors, _ = read_tensors(path)
    write_tensors(path, {**tensors, "zero-shot.weights": -tensors["zero-shot.weights"]})

    with pytest.raises(ArtifactError, match="holds other classifiers than its card says"):
        evaluate.main()


@pytest.mark.parametrize("stage", ["download", "split", "features", "label", "baselines", "train", "evaluate", "track"])
def test_an_unknown_key_in_the_parameters_stops_every_stage(project, stage):
    write_params(project, train={"learnig_rate": 0.1})

    with pytest.raises(ParamsError, match=r"^params\.yaml: train\.learnig_rate is not a known key"):
        STAGES[stage].main()


def test_a_source_that_is_not_there_is_a_sentence_and_keeps_the_earlier_data_set(project):
    before = content(project / "data/raw")
    write_params(project, dataset={"source": "nowhere"})
    with pytest.raises(DatasetError, match=r"^dataset\.source nowhere does not exist"):
        download.main()

    assert content(project / "data/raw") == before


NEEDED = [
    ("split", "data/raw/dataset.json"),
    ("features", "artifacts/split.json"),
    ("features", "data/raw"),
    ("baselines", "artifacts/split.json"),
    ("train", "artifacts/split.json"),
    ("train", "artifacts/features/val.npy"),
    ("evaluate", "artifacts/features/test.npy"),
    ("evaluate", "artifacts/baselines/classifiers.safetensors"),
    ("evaluate", "artifacts/prompt/card.json"),
    ("evaluate", "artifacts/curve_prompts/1_shots/context.safetensors"),
    ("report", "artifacts/judged/own/evaluation.json"),
    ("report", "artifacts/judged/own/predictions.csv"),
    ("report", "artifacts/prompt/curve.csv"),
    ("report", "artifacts/prompt/words.json"),
    ("track", "artifacts/judged/own/evaluation.json"),
    ("track", "artifacts/prompt"),
    ("track", "artifacts/prompt/curve.csv"),
    ("track", "artifacts/reference.safetensors"),
]


@pytest.mark.parametrize(("stage", "needed"), NEEDED, ids=lambda value: str(value))
def test_what_a_stage_needs_and_does_not_find_is_a_sentence_with_its_path(project, stage, needed):
    path = project / needed
    if stage == "features":
        shutil.rmtree(project / ".cache")
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()

    with pytest.raises(CoopError, match=needed):
        STAGES[stage].main()


def test_a_damaged_array_is_a_sentence(project):
    path = project / "artifacts/features/train.npy"
    path.write_bytes(path.read_bytes()[:100])

    with pytest.raises(ArtifactError, match=r"train\.npy is damaged"):
        train.main()


def test_too_few_images_for_the_shots_are_a_sentence(project):
    write_params(project, split={"shots": 7})

    with pytest.raises(CoopError, match=r"^split\.shots 7 needs 7 training .+'blue lake' has 6"):
        split.main()


def test_a_context_for_each_class_and_no_curve_go_all_the_way_to_the_report(project):
    write_params(project, split={"curve_shots": []}, method={"class_specific": True})
    for stage in (train, evaluate, report):
        stage.main()

    assert read(project / "artifacts/prompt/words.json") is None
    assert [point["shots"] for point in read(project / "artifacts/judged/own/evaluation.json")["few_shot_curve"]] == [2]


def test_a_stage_of_its_own_process_says_one_sentence_and_ends_with_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.stages", "split"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: params.yaml is missing: run in the project's folder, or restore it with git\n"


def test_a_python_without_the_project_s_packages_is_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", "-m", "pipelines.stages", "split"],  # without site-packages
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip

    assert done.returncode == 2
    assert re.fullmatch(r"error: No module named '\w+': this Python .* lacks what .*\n", done.stderr)

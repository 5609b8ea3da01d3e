"""A folder of images and a list of names, and no label anywhere: learned, registered and answering, but not judged."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_gate import POLICY, answers
from test_stages import COLOURS, PARAMS, working_in, write_params

import coop_core.artifact
import coop_core.params.sections
from coop_core.data.dataset import Dataset
from coop_core.data.split import few_shot_split
from coop_core.errors import DatasetError, GateError, SplitError
from coop_core.judging.gate import decide
from coop_core.params import DatasetParams
from pipelines import paths
from pipelines.champion import promotion
from pipelines.commands import cli
from pipelines.records.registry import CHAMPION, RegisteredVersion, find_version
from pipelines.records.runs import list_runs
from pipelines.records.server import Records
from pipelines.serving.versions import load_version
from pipelines.settings import Settings, load_settings
from pipelines.sources.datasets import bring_dataset
from pipelines.stages import baselines, download, evaluate, features, judge, label, report, track, train
from pipelines.stages import split as split_stage

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
    pytest.mark.filterwarnings("ignore:The specified dataset source can be interpreted in multiple:UserWarning"),
]

CARD = "name: lakes\nlayout: unlabelled\npath: photos\nclass_names: [red brick, green field, blue lake]\n"
TRUTH = tuple(COLOURS)
"""Folders that the photos lie in: somebody's order, which nobody may read."""


@pytest.fixture(scope="module", autouse=True)
def _load_the_backbone_once(mini: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (coop_core.params.sections, coop_core.artifact):
            patch.setattr(module, "load_backbone", lambda *named, **more: mini)
        yield


def paint_photos(folder: Path, *, count: int = 6, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(np.array(colour) + random.normal(0, 60, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def write(folder: Path, **changes: Any) -> None:
    """UPL on what the card names."""
    (folder / "card.yaml").write_text(CARD)
    write_params(folder, **{"dataset": {"source": "card.yaml"}, "split": {"unlabelled": "all", "curve_shots": [1]},
                            "method": {"name": "upl", "members": 2, "n_context": 2}} | changes)  # fmt: skip
    unknown = PARAMS["method"].keys() - {"name", "n_context", "initial_words", "class_token_position"}
    lines = (folder / "params.yaml").read_text().splitlines(keepends=True)
    (folder / "params.yaml").write_text("".join(li for li in lines if li.strip().split(":")[0] not in unknown))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The project after all stages, and what `track` printed."""
    folder = tmp_path_factory.mktemp("unjudged") / "project"
    paint_photos(folder / "photos")
    write(folder)
    with working_in(folder):
        for stage in (download, split_stage, features, label, baselines, train, evaluate, report, track):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                stage.main()
        yield folder, printed.getvalue()


@pytest.fixture
def settings(done: tuple[Path, str]) -> Settings:
    return load_settings()


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_split_holds_no_true_label_and_nothing_that_tells_it(done: tuple[Path, str]) -> None:
    text = paths.SPLIT.read_text()
    kept = json.loads(text)
    assert {(image["label"], image["path"]) for image in kept["train"]} == {(-1, "")}
    assert (len(kept["train"]), kept["val"], kept["test"]) == (18, [], [])
    assert not any(name in text for name in TRUTH)  # folders; class names have no underscore


def test_the_metrics_say_why_there_are_none(done: tuple[Path, str]) -> None:
    found = read(paths.EVALUATION / "evaluation.json")
    assert read(paths.METRICS) == {"not_judged": "no labelled images"}
    assert (found["classifiers"], found["few_shot_curve"], found["not_judged"]) == ({}, [], "no labelled images")
    assert (paths.EVALUATION / "predictions.csv").read_text() == "path,label,predicted,confidence\n"


def test_the_page_says_that_it_was_not_judged_and_shows_what_each_class_got(done: tuple[Path, str]) -> None:
    page = " ".join((paths.REPORT / "report.html").read_text().split())
    rows = [line.split(",") for line in (paths.LABELS / "labels.csv").read_text().splitlines()[1:]]
    assert "<h2>Not judged: no labelled images</h2>" in page
    assert "it was not judged: no labelled images." in page
    assert f"Zero-shot answered 18 images, and {len(rows)} of them were learned from" in page
    for number, name in enumerate(("red brick", "green field", "blue lake")):
        count = sum(row[1] == str(number) for row in rows)
        assert f"<b>{name}</b></span><span>{count} image{'' if count == 1 else 's'}</span>" in page
    for absent in ("of these labels are right", "top-1", 'id="confusions"', 'id="calibration"', "macro-F1"):
        assert absent not in page


def test_samples_to_try_are_images_of_the_pool(done: tuple[Path, str]) -> None:
    assert 2 <= len(list(paths.SAMPLES.glob("*.png"))) <= 3


def test_a_version_is_registered_without_an_accuracy(done: tuple[Path, str], settings: Settings) -> None:
    run = list_runs(Records(settings), limit=1)[0]
    assert not [name for name in run["metrics"] if "accuracy" in name and not name.startswith("epoch/")]
    assert run["metrics"]["training/seconds"] > 0
    assert "not judged: no labelled images" in done[1]
    assert "registered  coop-lakes version 1, alias candidate" in done[1]
    assert read(paths.TRACKED)["model_version"] == "1"


def test_the_version_says_so_in_its_tags_and_note(done: tuple[Path, str], tmp_path: Path) -> None:
    evaluation = read(paths.EVALUATION / "evaluation.json")
    record = track.make_record(evaluation, track.with_metrics(paths.PROMPT, tmp_path / "prompt", evaluation))
    assert record.version_tags["accuracy"] == "not judged: no labelled images"
    assert "it was not judged: no labelled images." in record.description
    assert "labelled by zero-shot" in record.note
    assert [dataset.context for dataset in record.datasets] == ["training"]


def test_the_gate_refuses_it_unless_told(done: tuple[Path, str], settings: Settings) -> None:
    decision = promotion.promote(Records(settings), POLICY)
    assert not decision.promote
    assert [check.sentence for check in decision.checks] == [
        "there are no labelled test images, so nothing is known of its answers: label some test images and run "
        "`dvc repro`, or promote it unseen with `coop promote --without-comparison`"
    ]  # fmt: skip
    assert find_version(CHAMPION, Records(settings)) is None


def test_told_so_it_becomes_champion_and_the_decision_says_how(
    done: tuple[Path, str], settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GateError, match="version 1 is not promoted"):
        cli.promote(version=None, without_comparison=False)
    cli.promote(version=None, without_comparison=True)
    said = capsys.readouterr().out
    assert "FAIL  judged at all: there are no labelled test images" in said
    assert "pass  judged at all: there are no labelled test images" in said
    assert "so nothing is known of its answers, and it passes as asked" in said
    found = find_version(CHAMPION, Records(settings))
    assert found is not None
    assert found.number == "1"


def test_it_answers_on_the_command_line_and_as_a_served_version(
    done: tuple[Path, str], settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.predict([str(paths.SAMPLES)], model="artifacts/prompt", top=1, classes="", as_json=True, batch_size=8)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(list(paths.SAMPLES.glob("*.png")))
    run_id = read(paths.TRACKED)["run_id"]
    served = load_version(RegisteredVersion("1", run_id), None, settings)
    (answer,) = served.predictor.predict([np.zeros((32, 32, 3), dtype=np.uint8)])
    assert set(answer.labels) == {"red brick", "green field", "blue lake"}


def test_a_labelled_set_beside_it_is_judged_and_shown(done: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(done[0], tmp_path / "project", ignore=shutil.ignore_patterns("mlflow.db*", "mlruns"))
    with working_in(tmp_path / "project"):
        paint_photos(tmp_path / "project/labelled", count=3, seed=9)
        write(Path(), tests={"mine": {"source": "labelled", "test_fraction": 0.5}})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["stages", "judge", "mine"])
            judge.main()
        report.main()
        page = " ".join((paths.REPORT / "report.html").read_text().split())
        evaluation = read(paths.EVALUATION / "evaluation.json")
        prompt = track.with_metrics(paths.PROMPT, tmp_path / "prompt", evaluation)
        metrics = track.make_record(evaluation, prompt).metrics
    assert 'id="beyond"' in page
    assert 0 <= metrics["tests/mine/upl"] <= 1


# What the card must say


def brought(folder: Path, card: str) -> Dataset:
    (folder / "card.yaml").write_text(card)
    return bring_dataset(DatasetParams(source=str(folder / "card.yaml")), folder / "raw",
                         Settings(_env_file=None, cache_folder=folder / ".cache"))  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    paint_photos(tmp_path / "photos", count=2)
    return tmp_path


def test_names_may_stand_in_a_file(photos: Path) -> None:
    (photos / "names.txt").write_text("red brick\nlake\n")
    dataset = brought(photos, "name: lakes\nlayout: unlabelled\npath: photos\nclass_names: names.txt\n")
    assert dataset.class_names == ("red brick", "lake")
    assert {(image.label, image.subset) for image in dataset.images} == {(-1, "train")}


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda card: card.replace("class_names: [red brick, green field, blue lake]\n", ""),
     "layout unlabelled has no class folders: list the names of all classes in class_names"),
    (lambda card: card.replace("[red brick, green field, blue lake]", "{a: red brick}"),
     "layout unlabelled has no class folders"),
    (lambda card: card + "unlabelled: photos\n", "layout unlabelled reads the images at path: leave unlabelled out"),
    (lambda card: card.replace("[red brick, green field, blue lake]", "[lake]"), "a classifier needs two classes"),
    (lambda card: card.replace("[red brick, green field, blue lake]", "[lake, Lake]"), "class names stand twice"),
    (lambda card: card.replace("path: photos", "path: empty"), "a folder of images without labels holds none"),
    (lambda card: card.replace("[red brick, green field, blue lake]", "wnids.txt"),
     "the file of class_names names class folders, and layout unlabelled has none"),
])  # fmt: skip
def test_what_is_wrong_with_the_card_is_said(photos: Path, change: Callable[[str], str], sentence: str) -> None:
    (photos / "empty").mkdir()
    (photos / "wnids.txt").write_text("n01440764 tench\nn01443537 goldfish\n")
    with pytest.raises(DatasetError, match=sentence):
        brought(photos, change(CARD))


def test_whoever_wants_labels_is_told_that_there_are_none(photos: Path) -> None:
    with pytest.raises(SplitError, match=r"the training images of lakes have no labels: set split\.unlabelled"):
        few_shot_split(brought(photos, CARD), shots=1, seed=1)


# The gate alone


def test_an_unjudged_candidate_is_refused_beside_a_champion_too() -> None:
    unseen = answers("2", labels=(), predicted=())
    assert not decide(unseen, answers("1"), POLICY).promote
    assert decide(unseen, None, POLICY, may_be_unjudged=True).promote


def test_a_judged_candidate_is_not_compared_with_an_unjudged_champion() -> None:
    with pytest.raises(GateError, match="were judged on different test images or classes"):
        decide(answers("2"), answers("1", labels=(), predicted=(), test_digest="none"), POLICY)


@pytest.mark.parametrize(
    ("last", "shown"), [({"val_accuracy": 0.5}, 0.5), ({"val_accuracy": None}, None), (None, None)]
)
def test_no_accuracy_of_validation_images_that_were_not_there_is_on_record(last: Any, shown: float | None) -> None:
    figures = {"accuracy": 0.6, "macro_f1": 0.6, "log_loss": 1.0, "calibration_error": 0.1}
    evaluation = {"method": "upl", "classifiers": {"upl": figures, "zero-shot": figures}}
    found = track.metrics_of(evaluation, {"training": {"last": last}}, {}, seconds=1)

    assert found.get("val_accuracy") == shown

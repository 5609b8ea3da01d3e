"""Every method from images to the page and the record: nothing on the way takes it for CoOp."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_stages import COLOURS, PARAMS, paint_images, working_in, write_params

import coop_core.artifact
import coop_core.params.sections
from coop_core.artifact import read_artifact
from pipelines import paths
from pipelines.commands import cli
from pipelines.stages import baselines, download, evaluate, features, label, report, track, train
from pipelines.stages import split as split_stage

LEARNING = ("cocoop", "biomedcoop", "upl")
METHODS: dict[str, dict[str, Any]] = {
    "class_mean": {},
    "linear_probe": {"steps": 1},
    "zero_shot": {"templates": ["an image of {}."], "own_template": True},
    "gda": {},
    "probe": {"epochs": 20},
    "tip_adapter": {},
    "prolip": {"steps": 10},
    "biomedcoop": {"n_context": None, "initial_words": "a photo of a", "sccm_weight": 0.5, "kdsp_weight": 0.25,
                   "selection_threshold": 1.5},
    "upl": {"members": 2, "n_context": 2},
    "cocoop": {"n_context": None, "initial_words": "a photo of a", "reduction": 16},
}


@pytest.fixture(scope="module", autouse=True)
def _load_the_backbone_once(mini) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (coop_core.params.sections, coop_core.artifact):
            patch.setattr(module, "load_backbone", lambda *named, **more: mini)
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A project up to its baselines, which are the same for every method."""
    folder = tmp_path_factory.mktemp("prepared") / "project"
    paint_images(folder / "images")
    write_params(folder, dataset={"source": "card.yaml"})
    said = {name: [f"this shows {name}.", f"an image of {name}.", "a colour."] for name in COLOURS}
    (folder / "card.yaml").write_text(json.dumps({"name": "images", "path": "images", "descriptions": said}))
    with working_in(folder):
        for stage in (download, split_stage, features, baselines):
            stage.main()
    return folder


@pytest.fixture(scope="module", params=[
    pytest.param(name, marks=[pytest.mark.slow] * (name == "zero_shot")) for name in METHODS
])  # fmt: skip
def done(request, prepared, tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """The project up to its report, and the method that it was made with."""
    folder = tmp_path_factory.mktemp(request.param) / "project"
    shutil.copytree(prepared, folder)
    split = {"unlabelled": "all"} if request.param == "upl" else {}
    write_params(folder, dataset={"source": "card.yaml"}, split=split,
                 method={"name": request.param, **METHODS[request.param]})  # fmt: skip
    drop(folder / "params.yaml", PARAMS["method"].keys() - METHODS[request.param].keys() - {"name"})
    with working_in(folder):
        for stage in ((split_stage, features, label, baselines) if split else ()) + (train, evaluate, report):
            stage.main()
        yield folder, request.param


def drop(path: Path, names: set[str]) -> None:
    """Lines of a YAML file, by their key."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if line.strip().split(":")[0] not in names))


def cost_of(method: str) -> str:
    """What an answer costs, in the words of the page."""
    own = {"cocoop": "3 prompts through the text tower", "tip_adapter": "a few matrix products",
           "prolip": "a few matrix products"}  # fmt: skip
    return own.get(method, "one matrix product")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_page_says_how_it_was_trained_and_shows_a_curve_where_there_is_one(done):
    folder, method = done
    page = (folder / "artifacts/report/report.html").read_text()

    assert ("is built from its examples at once" in page) == (method not in LEARNING)
    assert ("Loss and accuracy by epoch" in page) == (method in LEARNING)
    assert (folder / "artifacts/report/training_curve.png").exists() == (method in LEARNING)


def test_the_page_shows_context_where_there_is_some(done):
    folder, method = done
    page = (folder / "artifacts/report/report.html").read_text()

    assert ("What the context says" in page) == (method in LEARNING)
    assert ("before the image's own shift" in page) == (method == "cocoop")


def test_the_card_and_the_page_say_what_an_answer_costs(done):
    folder, method = done
    prompts = 3 if method == "cocoop" else 0

    assert read_artifact(folder / "artifacts/prompt").card["answering"] == {"prompts_per_image": prompts}
    said = cost_of(method)
    assert f"an answer costs {said}." in (folder / "artifacts/report/report.html").read_text()


def test_the_time_of_every_training_is_written_down_beside_the_prompt(done):
    timing = read(done[0] / "artifacts/timing.json")

    assert timing["device"] == "cpu"
    assert set(timing["seconds"]) == {"1", "2"}
    assert all(seconds > 0 for seconds in timing["seconds"].values())


def test_the_record_has_the_figures_of_the_method_and_those_of_the_baselines(done, tmp_path):
    """A method may be called as a baseline is: both keep theirs."""
    _, method = done
    evaluation = read(paths.EVALUATION / "evaluation.json")
    evaluation["classifiers"][method] |= {"accuracy": 0.125, "macro_f1": 0.25, "calibration_error": 0.5}
    prompt = track.with_metrics(paths.PROMPT, tmp_path / "prompt", evaluation)
    metrics = track.make_record(evaluation, prompt).metrics

    assert (metrics["accuracy"], metrics["macro_f1"], metrics["calibration_error"]) == (0.125, 0.25, 0.5)
    for name in ("zero-shot", "prompt ensemble", "linear probe"):
        assert metrics[f"test/{name.replace(' ', '_')}/accuracy"] == evaluation["classifiers"][name]["accuracy"]
    assert next(iter(metrics)) == "accuracy"  # what MLflow's comparison shows first


def test_the_record_names_the_recipe_of_training_where_there_was_one(done, tmp_path):
    """MLflow's comparison shows no learning rate of what was built at once."""
    evaluation = read(paths.EVALUATION / "evaluation.json")
    prompt = track.with_metrics(paths.PROMPT, tmp_path / "prompt", evaluation)
    named = track.make_record(evaluation, prompt).params

    assert ("train.learning_rate" in named) == any(name.startswith("train.") for name in named) == (done[1] in LEARNING)
    assert "split.shots" in named


def test_the_record_says_how_long_training_took(done, tmp_path):
    evaluation = read(paths.EVALUATION / "evaluation.json")
    seconds = read(paths.TIMING)["seconds"]["2"]
    prompt = track.with_metrics(paths.PROMPT, tmp_path / "prompt", evaluation)
    record = track.make_record(evaluation, prompt)

    assert record.metrics["training/seconds"] == seconds
    assert f"in {seconds:,.1f} seconds on cpu" in record.note


def test_how_long_training_took_makes_no_other_run(done, tmp_path):
    evaluation = read(paths.EVALUATION / "evaluation.json")
    prompt = track.with_metrics(paths.PROMPT, tmp_path / "prompt", evaluation)
    before = track.make_record(evaluation, prompt)
    timing = read(paths.TIMING)
    paths.TIMING.write_text(json.dumps({**timing, "seconds": {"1": 1.0, "2": 99.0}}))
    after = track.make_record(evaluation, prompt)
    paths.TIMING.write_text(json.dumps(timing))

    assert after.metrics["training/seconds"] == 99.0
    assert after.key == before.key


def test_the_card_on_the_command_line_begins_with_what_an_answer_costs(done, capsys):
    cli.card(model="artifacts/prompt")

    said = capsys.readouterr().out
    assert said.startswith(f"answer: costs {cost_of(done[1])} once its image is encoded\nschema: ")
    assert ("\nengine:" in said) == (done[1] in LEARNING)


def test_the_page_of_a_pool_says_what_zero_shot_called_it_and_how_often_it_was_right(done):
    folder, method = done
    page = (folder / "artifacts/report/report.html").read_text()
    if method != "upl":
        assert "Labels by zero-shot" not in page
        return
    split = read(folder / "artifacts/split.json")
    rows = (folder / "artifacts/labels/labels.csv").read_text().splitlines()
    said = " ".join(page[page.index('id="pseudo"') :].split())

    assert {(image["label"], image["path"]) for image in split["train"]} == {(-1, "")}
    assert rows[0] == "digest,label,confidence"
    assert f"Zero-shot answered {len(split['train'])} images, and {len(rows) - 1} of them were learned from" in said
    assert "of these labels are right" in said
    assert {row.split(",")[0] for row in rows[1:]} <= {image["digest"] for image in split["train"]}

"""Confidence: a temperature and a threshold from validation answers, and what is answered with them."""

import json
import logging

import numpy as np
import pytest
import torch
from test_stages import paint_images, working_in, write_params

import coop_core.params.sections
from coop_core.artifact import read_artifact
from coop_core.errors import ParamsError
from coop_core.judging.confidence import at_temperature, fit_confidence, fit_temperature, risk_coverage, selective
from coop_core.params import load_params
from coop_core.predictor import Prediction, Predictor
from pipelines import paths
from pipelines.commands.predict import as_json, as_line
from pipelines.stages import baselines, download, evaluate, features, report, train
from pipelines.stages import split as split_stage


def drawn(n: int = 4000, *, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities whose logits are `temperature` times those that the labels follow."""
    random = np.random.default_rng(0)
    logits = 2 * random.standard_normal((n, 3))
    honest = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (honest.cumsum(axis=1) < random.random((n, 1))).sum(axis=1)
    sharp = np.exp(temperature * logits)
    return sharp / sharp.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_undoes_what_made_confidences_wrong(temperature: float) -> None:
    probabilities, labels = drawn(temperature=temperature)
    found, (low, high) = fit_temperature(probabilities, labels)

    assert found == pytest.approx(temperature, rel=0.1)
    assert low < temperature < high
    calmed = at_temperature(probabilities, found)
    assert np.array_equal(calmed.argmax(1), probabilities.argmax(1))
    assert calmed.max(1).mean() == pytest.approx((calmed.argmax(1) == labels).mean(), abs=0.02)


def test_dividing_logits_is_what_a_temperature_does() -> None:
    logits = torch.tensor([[2.0, 1.0, -3.0]], dtype=torch.float64)
    found = at_temperature(logits.softmax(1).numpy(), 2.0)
    np.testing.assert_allclose(found, (logits / 2).softmax(1).numpy(), rtol=1e-9)


def test_few_images_leave_the_temperature_open_and_many_do_not() -> None:
    probabilities, labels = drawn(temperature=2.0)
    few, many = (fit_temperature(probabilities[:n], labels[:n])[1] for n in (20, 4000))
    assert few[1] - few[0] > 4 * (many[1] - many[0])


CONFIDENT = np.array([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
LABELS = np.array([0, 0, 0, 1, 0])
"""Right, right, right, wrong, right, by falling confidence."""


def test_the_threshold_is_the_lowest_confidence_down_to_which_answers_are_right_so_often() -> None:
    found = fit_confidence(CONFIDENT, LABELS, target_accuracy=0.9)
    assert (found.threshold, found.share, found.accuracy, found.is_reached) == (0.8, 0.6, 1.0, True)
    assert fit_confidence(CONFIDENT, LABELS, target_accuracy=0.8).threshold == 0.6
    assert found.accuracy_interval[0] < 0.5  # of three images


def test_the_threshold_lets_so_many_images_be_answered() -> None:
    assert fit_confidence(CONFIDENT, LABELS, target_share=0.2).threshold == 0.9
    assert fit_confidence(CONFIDENT, LABELS, target_share=0.21).share == 0.6  # equal confidences are answered together
    assert fit_confidence(CONFIDENT, LABELS).threshold == 0.0


def test_a_target_that_no_threshold_reaches_is_told() -> None:
    found = fit_confidence(CONFIDENT, np.array([1, 0, 0, 1, 0]), target_accuracy=0.95)
    assert not found.is_reached
    assert found.threshold == 0.8
    assert found.accuracy == pytest.approx(2 / 3)


def test_risk_falls_with_coverage_where_confidence_is_worth_something() -> None:
    probabilities, labels = drawn(temperature=1.0)
    curve = risk_coverage(probabilities.max(1), probabilities.argmax(1) == labels)
    assert curve[-1]["coverage"] == 1.0
    assert curve[-1]["risk"] == pytest.approx((probabilities.argmax(1) != labels).mean())
    assert curve[5]["risk"] < curve[-1]["risk"] / 3
    found = selective(CONFIDENT, LABELS, threshold=0.95)
    assert (found["answered"], found["accuracy"]) == (0.0, None)


def test_two_targets_are_refused(tmp_path) -> None:
    write_params(tmp_path, answering={"target_accuracy": 0.9, "target_share": 0.9})
    with pytest.raises(ParamsError, match="each decide when to abstain"):
        load_params(tmp_path / "params.yaml")


def test_what_is_not_asked_for_makes_no_other_run(tmp_path) -> None:
    write_params(tmp_path)
    before = load_params(tmp_path / "params.yaml").of_run()
    write_params(tmp_path, answering={"temperature": False})
    assert load_params(tmp_path / "params.yaml").of_run() == before
    write_params(tmp_path, answering={"temperature": True})
    assert load_params(tmp_path / "params.yaml").of_run() != before


def test_an_answer_below_the_threshold_is_none_with_its_guesses(tmp_path) -> None:
    unsure = Prediction(("cat", "dog"), (0.55, 0.45), threshold=0.6)
    assert unsure.answer is None
    assert as_line(tmp_path, unsure).split("\t")[1:] == ["no answer", "cat 55.0 %", "dog 45.0 %"]
    assert json.loads(as_json(tmp_path, unsure)) | {"image": ""} == {
        "image": "", "answer": None, "label": "cat", "probability": 0.55, "labels": ["cat", "dog"],
        "probabilities": [0.55, 0.45],
    }  # fmt: skip
    assert Prediction(("cat", "dog"), (0.6, 0.4), threshold=0.6).answer == "cat"


def test_the_prompt_carries_what_was_fitted_and_answers_with_it(mini, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(coop_core.params.sections, "load_backbone", lambda *named, **more: mini)
    monkeypatch.setattr("coop_core.artifact.load_backbone", lambda *named, **more: mini)
    folder = tmp_path / "project"
    paint_images(folder / "images")
    write_params(folder, answering={"temperature": True, "target_share": 0.5}, split={"curve_shots": []})
    with working_in(folder), caplog.at_level(logging.INFO):
        for stage in (download, split_stage, features, baselines, train, evaluate, report):
            stage.main()
        prompt = read_artifact(paths.PROMPT)
        evaluation = json.loads((paths.EVALUATION / "evaluation.json").read_text())
        page = (paths.REPORT / "report.html").read_text()
        own = Predictor.load(paths.PROMPT).predict(sorted(paths.RAW.rglob("*.png")))
        other = Predictor.load(paths.PROMPT, class_names=["a fox", "a sea"]).predict(sorted(paths.RAW.rglob("*.png")))

    said = prompt.card["answering"]
    assert said["validation_images"] == 6
    assert (prompt.threshold, prompt.temperature) == (said["threshold"], said["temperature"])
    assert prompt.threshold > 0
    assert prompt.temperature != 1
    assert {answer.answer is None for answer in own} >= {False}
    assert all((answer.answer is None) == (answer.probabilities[0] < prompt.threshold) for answer in own)
    assert all(answer.answer for answer in other)  # what was fitted among its own classes serves no others
    assert evaluation["answering"]["threshold"] == prompt.threshold
    assert "Below a confidence of" in page
    assert "So few validation images decide little" in page
    assert "Its logits are divided by the temperature" in page
    assert "fitted on 6 validation images" in caplog.text

"""Evaluation: each number against a hand computation, a published value or scikit-learn."""

import json

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score

from coop_core.judging.evaluation import Evaluation, evaluate, wilson_interval

NAMES = ("forest", "river", "sea")


def one_hot(predicted: list[int], *, classes: int = 3, confidence: float = 0.8) -> np.ndarray:
    """Probabilities (n, c) with `confidence` on the predicted class."""
    probabilities = np.full((len(predicted), classes), (1 - confidence) / (classes - 1))
    probabilities[np.arange(len(predicted)), predicted] = confidence
    return probabilities


def judge(predicted: list[int], labels: list[int]) -> Evaluation:
    return evaluate(one_hot(predicted), np.array(labels), NAMES)


def random_case(seed: int, *, n: int = 200, classes: int = 7, labelled: int = 7) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.full(classes, 0.5), n), generator.integers(0, labelled, n)


def test_accuracy_is_the_share_of_hits() -> None:
    assert judge([0, 1, 2, 0], [0, 1, 1, 0]).accuracy == 0.75


def test_accuracy_is_not_rounded() -> None:
    assert judge([0, 1, 2], [0, 0, 0]).accuracy == 1 / 3


def test_class_accuracy_is_the_share_of_hits_among_a_classs_images() -> None:
    assert judge([0, 0, 1, 2], [0, 0, 0, 2]).class_accuracy == {"forest": 2 / 3, "river": 0.0, "sea": 1.0}


def test_two_classes_of_the_same_name_keep_their_own_accuracy() -> None:
    found = evaluate(one_hot([0, 1, 1]), np.array([0, 1, 2]), ("crane", "crane", "sea")).class_accuracy
    assert found == {"crane (label 0)": 1.0, "crane (label 1)": 1.0, "sea": 0.0}


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_is_scikit_learns(seed: int) -> None:
    probabilities, labels = random_case(seed)
    expected = f1_score(labels, probabilities.argmax(axis=1), average="macro")
    assert evaluate(probabilities, labels, "abcdefg").macro_f1 == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("labelled", [1, 2, 4])
def test_macro_f1_is_restricted_to_the_classes_that_occur_among_the_labels(labelled: int) -> None:
    probabilities, labels = random_case(0, labelled=labelled)
    predicted = probabilities.argmax(axis=1)
    expected = f1_score(labels, predicted, average="macro", labels=np.unique(labels))
    assert evaluate(probabilities, labels, "abcdefg").macro_f1 == pytest.approx(expected, abs=1e-12)


def test_rows_of_the_confusion_are_true_classes_and_columns_predicted_ones() -> None:
    assert judge([1, 1, 2], [0, 0, 2]).confusion == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]


def test_the_confusion_is_scikit_learns() -> None:
    probabilities, labels = random_case(1, labelled=5)
    expected = confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(7))
    np.testing.assert_array_equal(evaluate(probabilities, labels, "abcdefg").confusion, expected)


def test_the_calibration_error_is_the_hand_computed_one() -> None:
    # Bins of a half: three images at or below 0.5, one of them right; two above it, both right.
    probabilities = np.array(
        [[0.4, 0.3, 0.3], [0.5, 0.25, 0.25], [0.45, 0.3, 0.25], [0.9, 0.05, 0.05], [0.7, 0.2, 0.1]]
    )
    found = evaluate(probabilities, np.array([0, 1, 2, 0, 0]), NAMES, calibration_bins=2)
    low, high = abs(1 / 3 - 1.35 / 3), abs(1 - 1.6 / 2)
    assert found.calibration_error == pytest.approx(3 / 5 * low + 2 / 5 * high, abs=1e-12)


def test_a_classifier_that_is_as_right_as_it_is_sure_has_no_calibration_error() -> None:
    found = evaluate(one_hot([0] * 5), np.array([0, 0, 0, 0, 1]), NAMES)
    assert found.calibration_error == pytest.approx(0, abs=1e-12)


def test_calibration_bins_hold_their_upper_edge() -> None:
    found = evaluate(one_hot([0], classes=2, confidence=0.5), np.array([0]), NAMES[:2], calibration_bins=2)
    assert [b.count for b in found.calibration] == [1, 0]


@pytest.mark.parametrize("count", [2, 10, 15])
def test_calibration_bins_cover_every_test_image_once(count: int) -> None:
    probabilities, labels = random_case(2)
    found = evaluate(probabilities, labels, "abcdefg", calibration_bins=count)
    assert len(found.calibration) == count
    assert sum(b.count for b in found.calibration) == found.n == 200
    assert (found.calibration[0].low, found.calibration[-1].high) == (0, 1)


def test_a_certain_answer_is_in_the_last_calibration_bin() -> None:
    found = evaluate(np.eye(3, dtype=np.float32), np.arange(3), NAMES)
    assert found.calibration[-1].count == 3
    assert found.calibration_error == 0


# Newcombe 1998, table I, method 3
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_wilson_interval_is_the_published_one(hits: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=5e-5)


def test_the_wilson_interval_of_misses_mirrors_that_of_hits() -> None:
    low, high = wilson_interval(3, 20)
    assert wilson_interval(17, 20) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_the_wilson_interval_stays_between_0_and_1(n: int) -> None:
    assert 0 <= wilson_interval(0, n)[0] == pytest.approx(0, abs=1e-12)
    assert 1 >= wilson_interval(n, n)[1] == pytest.approx(1, abs=1e-12)


def test_the_interval_of_an_evaluation_is_that_of_its_hits() -> None:
    assert judge([0, 1, 2, 0], [0, 1, 1, 0]).interval == wilson_interval(3, 4)


def test_an_evaluation_can_be_written_as_json() -> None:
    probabilities, labels = random_case(3)
    tree = evaluate(probabilities.astype(np.float32), labels, "abcdefg").as_dict()
    assert json.loads(json.dumps(tree))["n"] == 200

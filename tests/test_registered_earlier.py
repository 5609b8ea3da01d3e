"""A prompt that an earlier version registered (c1fc400, before the modules stood in rooms) answers as it did then."""

from pathlib import Path

import numpy as np
import pytest

from coop_core.artifact import read_artifact, restore_learner
from coop_core.predictor import Predictor

FOLDER = Path(__file__).parent / "registered_earlier"
"""CoOp of two context vectors on `mini`, learned from six generated pictures."""
THEN = {"cat": 0.4047998785972595, "red fox": 0.3412860333919525, "dog": 0.25391411781311035}
THEN_OF_OTHERS = {"a house": 0.5676841735839844, "zebra": 0.43231579661369324}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_it_says_of_its_own_classes_what_it_said(mini, image) -> None:
    (answer,) = Predictor(read_artifact(FOLDER), mini).predict([image], top=3)
    assert dict(zip(answer.labels, answer.probabilities, strict=True)) == pytest.approx(THEN, abs=1e-6)


def test_its_context_says_of_other_classes_what_it_said(mini, image) -> None:
    predictor = Predictor(read_artifact(FOLDER), mini, class_names=["zebra", "a house"])
    (answer,) = predictor.predict([image], top=2)
    assert dict(zip(answer.labels, answer.probabilities, strict=True)) == pytest.approx(THEN_OF_OTHERS, abs=1e-6)


def test_its_context_collapses_to_the_weights_that_lie_beside_it(mini, relative_error) -> None:
    artifact = read_artifact(FOLDER)
    found = restore_learner(artifact, mini).classifier()
    assert relative_error(found.weights.detach(), artifact.classifier.weights) < 1e-5

"""UPL's choice of images and its ensemble against the numbers that the paper's own code computes (tests/golden)."""

from typing import Any

import numpy as np
import pytest
import torch
from golden_weights import CLASS_NAMES, WIDTH, draw, write_clip
from test_golden import ENGINES, TASK, assert_close, read
from torch import Tensor

from coop_core.answering import answer_with
from coop_core.backbone import Backbone, load_backbone
from coop_core.judging.baselines import zero_shot
from coop_core.judging.pseudo_labels import pseudo_labels
from coop_core.methods import upl

UPL = read("upl")
DIGESTS = [f"{row:03d}" for row in range(60)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(write_clip(tmp_path_factory.mktemp("golden")), None)


@pytest.fixture(scope="module")
def features(clip: Backbone) -> Tensor:
    """(60, d)"""
    return clip.encode_images(draw("upl images", 60, 3, 32, 32))


@pytest.fixture(scope="module")
def probabilities(clip: Backbone, features: Tensor) -> np.ndarray:
    classifier = zero_shot(clip, [name.replace("_", " ") for name in CLASS_NAMES], "a photo of a {}.")
    assert_close(classifier.weights, UPL["zero_shot.text_features"])
    assert_close(classifier.logits(features), UPL["zero_shot.logits"])
    return classifier.probabilities(features).numpy()


def assert_chosen(found: Any, case: str) -> None:
    assert found.rows.tolist() == UPL[f"select.{case}.rows"].tolist()
    assert found.labels.tolist() == UPL[f"select.{case}.labels"].tolist()
    assert_close(found.confidences, UPL[f"select.{case}.confidences"])


@pytest.mark.parametrize(("case", "per_class"), [("k1", 1), ("k4", 4), ("all", 60)])
def test_the_most_confident_images_of_each_class_are_those_of_the_reference(
    probabilities: np.ndarray, case: str, per_class: int
) -> None:
    assert_chosen(pseudo_labels(probabilities, DIGESTS, per_class=per_class), case)


def test_images_above_a_confidence_are_those_of_the_reference(probabilities: np.ndarray) -> None:
    assert_chosen(pseudo_labels(probabilities, DIGESTS, per_class=0, min_confidence=0.9), "threshold90")


def test_both_together_are_their_union(probabilities: np.ndarray) -> None:
    found = pseudo_labels(probabilities, DIGESTS, per_class=1, min_confidence=0.9)
    union = set(UPL["select.k1.rows"].tolist()) | set(UPL["select.threshold90.rows"].tolist())
    assert set(found.rows.tolist()) == union
    assert len(found.rows) == len(union)


def learner(clip: Backbone, path: str) -> upl.UPL:
    found = upl.build(upl.Params(members=4, n_context=4), backbone=clip, task=TASK, generator=torch.Generator(),
                      engine=ENGINES[path])  # fmt: skip
    contexts = [draw(f"upl context {i}", 4, WIDTH, std=0.02) for i in range(4)]
    found.load_state_dict({"context_vectors": torch.stack(contexts)})
    return found


@pytest.mark.parametrize("path", ENGINES)
def test_members_and_their_mean_answer_as_in_the_reference(clip: Backbone, features: Tensor, path: str) -> None:
    found = learner(clip, path)
    images, labels = features[:6].expand(4, 6, -1), torch.zeros(4, 6, dtype=torch.int64)
    _, members = found.loss(images, labels)
    assert_close(members.detach(), UPL["ensemble.members"])
    assert_close(found.logits(features[:6]).detach(), UPL["ensemble.logits"])
    assert answer_with(found, class_names=CLASS_NAMES).prompts_per_image == 0

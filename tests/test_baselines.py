"""Baselines: zero-shot, prompt ensemble and linear probe, as published."""

from functools import cache, partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from coop_core.baselines import COARSE_GRID, linear_probe, prompt_ensemble, zero_shot

NAMES = ["cat", "annual crop land", "river"]


def test_zero_shot_weights_are_the_models_own_normalised_text_features(zoo, family, relative_error):
    classifier = zero_shot(zoo.backbone(family), NAMES, "a photo of a {}.")

    expected = F.normalize(zoo.texts(family, [f"a photo of a {name}." for name in NAMES]), dim=-1)
    assert relative_error(classifier.weights, expected) <= 1e-5


def test_zero_shot_logits_are_scaled_cosines(backbone):
    classifier = zero_shot(backbone, NAMES, "a photo of a {}.")
    features = 3 * torch.randn(4, 24, generator=torch.Generator().manual_seed(0))

    expected = backbone.logit_scale * F.cosine_similarity(features[:, None], classifier.weights[None], dim=-1)

    torch.testing.assert_close(classifier.logits(features), expected)


def test_the_ensemble_is_the_normalised_mean_over_templates(zoo, backbone):
    templates = ["a bad photo of the {}.", "art of the {}.", "itap of a {}."]

    weights = prompt_ensemble(backbone, NAMES, templates[:2], own_template=templates[2]).weights

    features = [F.normalize(zoo.texts("flat", [t.format(n) for n in NAMES]), dim=-1) for t in templates]
    torch.testing.assert_close(weights, F.normalize(torch.stack(features).mean(dim=0), dim=-1))


def test_an_own_template_among_the_others_counts_once(backbone):
    templates = ["a bad photo of the {}.", "art of the {}."]

    inside = prompt_ensemble(backbone, NAMES, templates, own_template="art of the {}.").weights
    added = prompt_ensemble(backbone, NAMES, templates[:1], own_template="art of the {}.").weights

    assert torch.equal(inside, added)


def test_building_an_ensemble_twice_gives_the_same(backbone):
    templates = ["a bad photo of the {}.", "art of the {}."]

    first = prompt_ensemble(backbone, NAMES, templates, own_template="itap of a {}.").weights

    assert torch.equal(prompt_ensemble(backbone, NAMES, templates, own_template="itap of a {}.").weights, first)


def test_the_ensemble_leaves_its_list_of_templates_alone(backbone):
    templates = ["a bad photo of the {}.", "art of the {}."]

    prompt_ensemble(backbone, NAMES, templates, own_template="itap of a {}.")

    assert templates == ["a bad photo of the {}.", "art of the {}."]


def test_the_first_grid_is_the_published_one():
    assert pytest.approx([1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6]) == list(COARSE_GRID)


@pytest.mark.parametrize("seed", [0, 4])
def test_the_regularisation_is_what_the_published_search_finds(seed):
    problem = _problem(seed)

    probe = linear_probe(*problem, steps=8)

    c, accuracy = _published_search(*problem, steps=8)
    assert (probe.regularisation, probe.val_accuracy) == pytest.approx((c, accuracy))


@pytest.mark.parametrize("seed", [1, 2])
def test_the_refinement_never_ends_below_the_first_grid(seed):
    train, train_labels, val, val_labels = _problem(seed)

    probe = linear_probe(train, train_labels, val, val_labels)

    assert probe.val_accuracy >= max(_score(train, train_labels, val, val_labels, c) for c in COARSE_GRID)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_probes_answers_are_scikit_learns(classes):
    train, train_labels, val, val_labels = _problem(0, classes=classes)

    probe = linear_probe(train, train_labels, val, val_labels, steps=2)

    model = LogisticRegression(C=probe.regularisation, max_iter=1000).fit(train, train_labels)
    found = probe.classifier.probabilities(torch.from_numpy(val)).numpy()
    np.testing.assert_allclose(found, model.predict_proba(val), atol=1e-5)


def test_a_probe_of_two_classes_has_a_row_for_each():
    train, train_labels, val, val_labels = _problem(0, classes=2)

    probe = linear_probe(train, train_labels, val, val_labels, steps=1)

    assert probe.classifier.weights.shape == (2, train.shape[1])


def test_the_reported_accuracy_is_that_of_the_classifier():
    train, train_labels, val, val_labels = _problem(1)

    probe = linear_probe(train, train_labels, val, val_labels, steps=3)

    answers = probe.classifier.logits(torch.from_numpy(val)).argmax(dim=1).numpy()
    assert probe.val_accuracy == pytest.approx((answers == val_labels).mean())


def test_the_probe_sees_features_as_they_are_and_not_normalised():
    """Two classes that differ in length alone."""
    train = np.array([[1.0, 0.0], [5.0, 0.0], [1.1, 0.0], [5.1, 0.0]], dtype=np.float32)
    labels = np.array([0, 1, 0, 1])

    probe = linear_probe(train, labels, train, labels)

    assert probe.val_accuracy == 1.0


def test_without_validation_images_the_regularisation_is_one():
    train, train_labels, val, val_labels = _problem(0)

    probe = linear_probe(train, train_labels, val[:0], val_labels[:0])

    assert (probe.regularisation, probe.val_accuracy) == (1.0, None)


def test_a_search_without_refinement_keeps_the_best_of_the_first_grid():
    """Far apart, every C answers all right, and the first of equals is the largest."""
    train = np.array([[-9.0], [9.0], [-8.0], [8.0]], dtype=np.float32)
    labels = np.array([0, 1, 0, 1])

    assert linear_probe(train, labels, train, labels, steps=0).regularisation == pytest.approx(1e6)


def _problem(seed: int, *, classes: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Overlapping clusters: few training, more validation points, so that C matters."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, 8))
    labels = np.arange(classes * 5) % classes, np.arange(classes * 40) % classes
    train, val = (centres[part] + 2.0 * rng.normal(size=(len(part), 8)) for part in labels)
    return train.astype(np.float32), labels[0], val.astype(np.float32), labels[1]


def _score(train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray, c: float) -> float:
    return LogisticRegression(C=c, max_iter=1000).fit(train, train_labels).score(val, val_labels)


def _published_search(*problem: np.ndarray, steps: int) -> tuple[float, float]:
    """CoOp's lpclip: each step judges both ends, then moves one; the last step's better end counts.

    The product keeps the grid's best where the refinement has lost it.
    """
    score = cache(partial(_score, *problem))
    peak = max((1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6), key=score)
    left, right = 1e-1 * peak, 1e1 * peak
    for _ in range(steps):
        at_left, at_right = score(left), score(right)
        middle = 10 ** (0.5 * (np.log10(right) + np.log10(left)))
        if at_left < at_right:
            final, accuracy, left = right, at_right, middle
        else:
            final, accuracy, right = left, at_left, middle
    return (peak, score(peak)) if score(peak) > accuracy else (final, accuracy)

"""Baselines: zero-shot, prompt ensemble and linear probe, as published."""

from functools import cache, partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.nn import functional as F

from coop_core.judging.baselines import COARSE_GRID, LogisticPath, linear_probe, prompt_ensemble, zero_shot

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


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_the_regularisation_is_what_the_published_search_finds_with_its_ties_broken(seed):
    problem = _problem(seed)

    probe = linear_probe(*problem, steps=8)

    c, accuracy = _published_search(*problem, steps=8)
    assert (probe.regularisation, probe.val_accuracy) == pytest.approx((c, accuracy))


@pytest.mark.parametrize("seed", [1, 2])
def test_the_refinement_never_ends_below_the_first_grid(seed):
    problem = _problem(seed)

    probe = linear_probe(*problem)

    assert probe.val_accuracy >= max(_score(*problem, c)[0] for c in COARSE_GRID) - 1e-6


def test_among_equal_accuracies_the_lowest_log_loss_wins():
    """Every C answers six of eight; the two it misses ask for probabilities near three quarters."""
    train, labels = np.array([[-9.0], [9.0], [-8.0], [8.0]], dtype=np.float32), np.array([0, 1, 0, 1])
    val, val_labels = np.array([[-9.0], [9.0]] * 4, dtype=np.float32), np.array([0, 1] * 3 + [1, 0])

    probe = linear_probe(train, labels, val, val_labels)

    found = log_loss(val_labels, probe.classifier.probabilities(torch.from_numpy(val)).numpy())
    best = min(log_loss(val_labels, _model(train, labels, c).predict_proba(val)) for c in COARSE_GRID)
    assert found <= best + 1e-3


@pytest.mark.parametrize("power", [-6, -4, -2, 0, 2, 4, 6])
@pytest.mark.parametrize(("classes", "width"), [(2, 8), (3, 8), (5, 40)])
def test_an_optimum_is_scikit_learns_within_a_thousandth_of_its_weights(classes, width, power):
    """With 40 dimensions the classes can be told apart, with 8 they overlap."""
    train, train_labels, val, _ = _problem(0, classes=classes, width=width)
    path = LogisticPath(train, train_labels)

    found = path.classifier(path.fit(power))

    model = _model(train, train_labels, 10.0**power)
    weights = found.weights.numpy() if classes > 2 else np.diff(found.weights.numpy(), axis=0)
    assert np.linalg.norm(weights - model.coef_) <= 1e-3 * np.linalg.norm(model.coef_)
    assert found.logits(torch.from_numpy(val)).argmax(dim=1).tolist() == model.predict(val).tolist()


@pytest.mark.parametrize("power", [-2, 0, 2])
def test_a_tighter_tolerance_comes_as_close_to_scikit_learn_as_is_asked(power):
    train, train_labels, val, _ = _problem(0, width=40)
    path = LogisticPath(train, train_labels, tolerance=1e-5)

    found = path.classifier(path.fit(power)).probabilities(torch.from_numpy(val)).numpy()

    np.testing.assert_allclose(found, _model(train, train_labels, 10.0**power).predict_proba(val), atol=1e-4)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
@pytest.mark.parametrize("power", [-6, -4])
def test_classes_of_unequal_size_have_their_bias_however_strong_the_penalty(power, tolerance):
    train, train_labels, val, _ = _problem(0)
    kept = [*np.flatnonzero(train_labels == 0), *np.flatnonzero(train_labels > 0)[:2]]
    path = LogisticPath(train[kept], train_labels[kept], tolerance=tolerance)

    found = path.classifier(path.fit(power)).probabilities(torch.from_numpy(val)).numpy()

    expected = _model(train[kept], train_labels[kept], 10.0**power).predict_proba(val)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_an_optimum_is_the_same_wherever_its_search_began():
    train, train_labels, _, _ = _problem(0, width=40)
    cold, warm = (LogisticPath(train, train_labels, tolerance=1e-4) for _ in range(2))
    for power in (-6, 0, 2):
        warm.fit(power)

    torch.testing.assert_close(cold.fit(3), warm.fit(3), rtol=1e-2, atol=1e-3)


def test_one_image_a_class_is_fitted_without_a_warning():
    train, train_labels, val, val_labels = _problem(0, classes=6)

    probe = linear_probe(train[:6], train_labels[:6], val, val_labels)

    assert probe.val_accuracy > 1 / 6


@pytest.mark.parametrize("steps", [0, 1, 2, 8])
def test_progress_counts_every_fit_up_to_the_number_of_all(steps):
    seen = []

    linear_probe(*_problem(0), steps=steps, progress=lambda done, total: seen.append((done, total)))

    assert seen == [(done, seen[-1][0]) for done in range(1, len(seen) + 1)]


def test_a_fit_gives_the_threads_back_that_it_does_not_use():
    usual = torch.get_num_threads()
    torch.set_num_threads(2)

    linear_probe(*_problem(0), steps=0)

    found = torch.get_num_threads()
    torch.set_num_threads(usual)
    assert found == 2


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
    """Far apart, every C answers all right, and the largest is the surest."""
    train = np.array([[-9.0], [9.0], [-8.0], [8.0]], dtype=np.float32)
    labels = np.array([0, 1, 0, 1])

    assert linear_probe(train, labels, train, labels, steps=0).regularisation == pytest.approx(1e6)


def _problem(seed: int, *, classes: int = 3, width: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Overlapping clusters: few training, more validation points, so that C matters."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    labels = np.arange(classes * 5) % classes, np.arange(classes * 40) % classes
    train, val = (centres[part] + 2.0 * rng.normal(size=(len(part), width)) for part in labels)
    return train.astype(np.float32), labels[0], val.astype(np.float32), labels[1]


def _model(train: np.ndarray, labels: np.ndarray, c: float) -> LogisticRegression:
    return LogisticRegression(C=c, solver="newton-cholesky", tol=1e-10).fit(train.astype(np.float64), labels)


def _score(
    train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray, c: float
) -> tuple[float, float]:
    model = _model(train, train_labels, c)
    return model.score(val, val_labels), -log_loss(val_labels, model.predict_proba(val))


def _published_search(*problem: np.ndarray, steps: int) -> tuple[float, float]:
    """CoOp's lpclip: each step judges both ends, then moves one; the last step's better end counts.

    The product keeps the grid's best where the refinement has lost it, and compares the log loss of equal accuracies.
    """
    score = cache(partial(_score, *problem))
    peak = max((1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6), key=score)
    left, right = 1e-1 * peak, 1e1 * peak
    for _ in range(steps):
        at_left, at_right = score(left), score(right)
        middle = 10 ** (0.5 * (np.log10(right) + np.log10(left)))
        if at_left < at_right:
            final, judged, left = right, at_right, middle
        else:
            final, judged, right = left, at_left, middle
    return (peak, score(peak)[0]) if score(peak) > judged else (final, judged[0])


def test_a_class_without_an_image_is_never_answered_and_the_others_stay_as_they_are() -> None:
    train, train_labels, val, val_labels = _problem(0)
    alone = linear_probe(train, train_labels, val, val_labels, steps=1).classifier
    more = linear_probe(train, train_labels, val, val_labels, classes=int(train_labels.max()) + 3, steps=1).classifier
    features = torch.from_numpy(val)
    found = more.probabilities(features)

    assert torch.equal(more.logits(features)[:, : len(alone.weights)], alone.logits(features))
    assert found.shape[1] == len(alone.weights) + 2
    assert found[:, -2:].abs().max() == 0
    assert more.tensors("probe")["probe.bias"].isfinite().all()


def test_a_validation_image_of_a_class_without_training_images_counts_as_wrong() -> None:
    train, train_labels, val, val_labels = _problem(0)
    last = int(train_labels.max())
    kept = train_labels < last
    probe = linear_probe(train[kept], train_labels[kept], val, val_labels, classes=last + 1, steps=1)
    assert probe.val_accuracy is not None
    assert probe.val_accuracy <= float((val_labels < last).mean())

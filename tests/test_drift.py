"""Drift: statistics against known answers; images like the test images stay silent, others do not."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ks_2samp

from coop_core.errors import ArtifactError
from coop_core.judging import drift
from coop_core.judging.drift import alike, compare, confidence_shift, label_shift, tell_apart
from coop_core.judging.limits import Limits
from coop_core.judging.seen import Seen, seen_of, spread

LIMITS = Limits(significance=0.01, max_auc=0.6, max_confidence_shift=0.2, max_label_shift=0.2, max_abstention_rise=0.1,
                min_images=20)  # fmt: skip


def toy_seen(random: np.random.Generator, counts: list[int], *, moved: float = 0.0, confidence: float = 0.0) -> Seen:
    """So many images of each class, far apart; `moved` along one direction of no class."""
    labels = np.repeat(np.arange(len(counts)), counts)
    features = random.normal(size=(len(labels), 12)) + 8 * np.eye(12)[labels]
    features[:, -1] += moved
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    confidences = np.clip(random.uniform(0.5, 1, len(labels)) - confidence, 0, 1).astype(np.float32)
    names = tuple(f"{number:064x}" for number in random.integers(0, 2**60, len(labels)))
    return Seen(features.astype(np.float16), labels, confidences, confidences >= 0.5, names)


def raised(reference: Seen, sent: Seen, *, limits: Limits = LIMITS) -> list[str]:
    return [sign.name for sign in compare(reference, sent, limits, random=np.random.default_rng(0)).raised]


def test_images_of_the_same_kind_raise_nothing_even_without_limits():
    """By chance alone: of 20 looks that each may be raised in one of a hundred, two are rare."""
    none = Limits(significance=0.01, max_auc=0, max_confidence_shift=0, max_label_shift=0, max_abstention_rise=0,
                  min_images=20)  # fmt: skip
    random = np.random.default_rng(1)
    found = [raised(toy_seen(random, [30, 30]), toy_seen(random, [12, 12]), limits=none) for _ in range(20)]

    assert sum(map(bool, found)) <= 1


def test_images_that_moved_are_told_apart_by_their_features_alone():
    random = np.random.default_rng(2)

    assert raised(toy_seen(random, [40, 40]), toy_seen(random, [20, 20], moved=4)) == ["features"]


def test_lower_confidences_are_noticed_with_the_answers_they_cost():
    random = np.random.default_rng(3)
    sent = toy_seen(random, [20, 20], confidence=0.2)

    assert raised(toy_seen(random, [40, 40]), sent) == ["confidence", "abstention"]


def test_another_mix_of_classes_is_no_other_kind_of_image():
    random = np.random.default_rng(4)

    reference, sent = toy_seen(random, [40, 40, 40]), toy_seen(random, [60, 10, 10])

    assert raised(reference, sent) == ["labels"]
    assert compare(reference, sent, LIMITS, random=random).signs[0].value < 0.6


def test_a_limit_that_is_not_passed_raises_nothing_however_rare_it_is():
    random = np.random.default_rng(5)
    reference, sent = toy_seen(random, [60, 60]), toy_seen(random, [40, 40], moved=2)
    found = compare(reference, sent, LIMITS, random=random).signs[0]

    assert found.p <= 0.01 / 4
    assert 0.6 < found.value < 1
    assert found.interval[0] < found.value < found.interval[1]
    high = Limits(0.01, found.value, 1, 1, 1, 20)
    assert raised(reference, sent, limits=high) == []


def test_a_chance_of_a_hundredth_is_too_much_for_one_of_four_signs():
    """The share of each is a quarter."""
    random = np.random.default_rng(0)
    reference, sent = toy_seen(random, [50, 50]), toy_seen(random, [20, 20])
    sent = Seen(sent.features, sent.labels, sent.confidences, np.arange(40) >= 4, sent.images)
    limits = replace(LIMITS, max_abstention_rise=0.05)
    sign = compare(reference, sent, limits, random=random).signs[3]

    assert (sign.name, sign.value) == ("abstention", pytest.approx(0.1))
    assert 0.0025 < sign.p < 0.01
    assert not sign.raised


def test_the_distance_of_confidences_is_kolmogorov_s_where_all_are_answered_alike():
    random = np.random.default_rng(6)
    test, sent = random.beta(4, 2, 80), random.beta(3, 3, 50)
    is_sent = np.arange(130) >= 80
    drawn = np.stack([is_sent, *(random.permutation(is_sent) for _ in range(999))], axis=1)
    distance, chance = confidence_shift(np.concatenate([test, sent]), np.zeros(130, int), drawn)
    known = ks_2samp(test, sent, method="exact")

    assert distance == pytest.approx(known.statistic)
    assert chance == pytest.approx(known.pvalue, abs=0.05)


def test_confidences_are_compared_among_images_answered_alike():
    """One class is always surer; more of it is no shift."""
    groups = np.array([0] * 50 + [1] * 50 + [0] * 40 + [1] * 10)
    confidences = np.where(groups == 0, 0.9, 0.5)
    distance, _ = confidence_shift(confidences, groups, (np.arange(150) >= 100)[:, None])

    assert distance == pytest.approx(0)


def test_delong_s_variance_is_that_of_the_textbook():
    """Of one pair it cannot be known; of perfect order it is 0; of 2 and 2 with one pair wrong by hand."""
    assert drift._delong(np.array([1.0]), np.array([0.0])) == pytest.approx(0.5)
    assert drift._delong(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 0
    assert drift._delong(np.array([1.5, 3.0]), np.array([1.0, 2.0])) == pytest.approx(2 * 0.125 / 2)


def test_two_clouds_far_apart_have_an_auc_of_one_and_equal_ones_of_a_half():
    random = np.random.default_rng(7)
    features, is_sent = random.normal(size=(200, 6)), np.arange(200) >= 100
    drawn = np.repeat(is_sent[:, None], 2, axis=1)
    same, interval, _, _ = tell_apart(features, np.zeros(200, int), drawn, random)
    features[is_sent] += 10
    apart, _, _, scores = tell_apart(features, np.zeros(200, int), drawn, random)

    assert interval[0] < 0.5 < interval[1]
    assert abs(same - 0.5) < 0.12
    assert apart == 1
    assert scores[is_sent].min() > scores[~is_sent].max()


def test_few_images_of_the_same_mix_show_no_shift_of_labels():
    """Twenty images of ten classes are never two of each; that much is taken off."""
    random = np.random.default_rng(8)
    labels = np.concatenate([np.repeat(np.arange(10), 30), random.integers(0, 10, 20)])
    shift, chance = label_shift(labels, np.arange(320) >= 300, random)

    assert shift < 0.1
    assert chance > 0.05


def test_labels_that_one_side_lacks_are_compared_with_others():
    labels = np.array([0] * 10 + [1] * 10 + [0] * 10 + [2] * 10)
    groups = alike(labels, np.arange(40) >= 20)

    assert set(groups[labels == 0]) == {0}
    assert set(groups[labels == 1]) == set(groups[labels == 2]) == {-1}
    assert set(alike(np.array([0] * 20 + [1] * 20), np.arange(40) >= 20)) == {-1}


def test_what_was_seen_comes_back_from_a_file_s_tensors():
    seen = toy_seen(np.random.default_rng(9), [3, 2])
    again = Seen.from_tensors(seen.tensors())

    assert again.images == seen.images
    for field in ("features", "labels", "confidences", "answered"):
        assert (getattr(again, field) == getattr(seen, field)).all()
        assert getattr(again, field).dtype == getattr(seen, field).dtype
    with pytest.raises(ArtifactError, match="lacks 'images'"):
        Seen.from_tensors({name: value for name, value in seen.tensors().items() if name != "images"})


def test_images_that_were_sent_as_well_are_left_out():
    seen = toy_seen(np.random.default_rng(10), [3, 2])

    assert seen.without(seen.images[1:3]).images == (seen.images[0], *seen.images[3:])


def test_a_feature_is_kept_by_its_direction_and_a_name_that_stands_twice_is_one_label():
    import torch

    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]])
    seen = seen_of(torch.tensor([[3.0, 4.0], [0.0, 1e6]]), probabilities, ["00" * 32, "01" * 32],
                   class_names=("crane", "dog", "crane"), threshold=0.6)  # fmt: skip

    assert seen.features.tolist() == [pytest.approx([0.6, 0.8], abs=1e-3), [0.0, 1.0]]
    assert seen.labels.tolist() == [0, 0]
    assert seen.answered.tolist() == [True, False]


def test_a_reference_holds_images_from_the_whole_list():
    assert spread(1000, at_most=500).tolist()[::250] == [0, 501]
    assert spread(3, at_most=500).tolist() == [0, 1, 2]

"""Drift: what a version saw of its test images and what it is sent -> signs that the two differ, each with its chance.

Four signs are looked at: a classifier tells the two by their features; confidences moved; other labels are answered;
fewer images are. Features and confidences are compared among images that were answered alike, so that another mix of
classes is the business of the third sign alone.

A sign is raised where it passes its limit and chance would bring so much more rarely than its share of `significance`,
which the signs divide among themselves (Bonferroni): of looks at images like the test images, at most so many raise
anything. The chance is exact: which images are the test's is drawn anew a thousand times and more (Fisher's permutation
test), among images that were answered alike.

Not covered: order and time within what is looked at, and wrong answers, which nobody sees without labels.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import hypergeom, rankdata

from coop_core.judging.limits import Limits
from coop_core.judging.seen import Seen

_DRAWS = 1999
_FOLDS = 5
_ALIKE = 5
"""Images that a label needs on both sides to be compared by itself; the others are compared together."""
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Sign:
    name: str
    value: float
    limit: float
    p: float
    """How often chance brings as much, where nothing differs."""
    raised: bool
    sentence: str
    interval: tuple[float, float] | None = None
    """95 %, where there is one."""


@dataclass(frozen=True)
class Drift:
    images: int
    """That were sent."""
    reference_images: int
    signs: tuple[Sign, ...]
    scores: tuple[np.ndarray, np.ndarray]
    """What the classifier that tells them apart says of the test images and of what is sent, in its units."""

    @property
    def raised(self) -> tuple[Sign, ...]:
        return tuple(sign for sign in self.signs if sign.raised)

    def as_dict(self) -> dict[str, Any]:
        """Without the scores."""
        counts = {"images": self.images, "reference_images": self.reference_images}
        return counts | {"raised": [sign.name for sign in self.raised], "signs": [asdict(sign) for sign in self.signs]}


def compare(reference: Seen, sent: Seen, limits: Limits, *, random: np.random.Generator) -> Drift:
    """The test images as the version saw them, and different images that it was sent -> what differs.

    Both need two images at least; `random` draws which images are left aside and what chance would bring.
    """
    joined = np.concatenate([reference.features, sent.features]).astype(np.float64)              # (n, d)
    labels = np.concatenate([reference.labels, sent.labels])                                     # (n,)
    confidences = np.concatenate([reference.confidences, sent.confidences]).astype(np.float64)   # (n,)
    is_sent = np.arange(len(labels)) >= len(reference)                                           # (n,)
    groups = alike(labels, is_sent)
    drawn = _drawn_anew(is_sent, groups, random)                                                 # (n, 1 + draws)
    auc, interval, chance, scores = tell_apart(joined, groups, drawn, random)
    shift, chance_of_shift = confidence_shift(confidences, groups, drawn)
    other, chance_of_other = label_shift(labels, is_sent, random)
    rise, chance_of_rise = abstention_rise(~reference.answered, ~sent.answered)
    expected = (confidences * _weights(groups, is_sent))[~is_sent].sum()
    abstained = 1 - sent.answered.mean(), 1 - reference.answered.mean()

    def sign(name: str, value: float, limit: float, p: float, sentence: str, **more: Any) -> Sign:
        return Sign(name, value, limit, p, bool(value > limit and p <= limits.significance / 4), sentence, **more)

    signs = (
        sign("features", auc, limits.max_auc, chance,
             f"a classifier tells what is sent from the test images with AUC {auc:.2f} "
             f"({interval[0]:.2f} to {interval[1]:.2f})", interval=interval),
        sign("confidence", shift, limits.max_confidence_shift, chance_of_shift,
             f"mean confidence {confidences[is_sent].mean():.2f}, where {expected:.2f} was to be expected"),
        sign("labels", other, limits.max_label_shift, chance_of_other,
             f"{100 * other:.0f} % of the images are answered with other labels than the test's mix"),
        sign("abstention", rise, limits.max_abstention_rise, chance_of_rise,
             f"{100 * abstained[0]:.0f} % of the images get no answer, and {100 * abstained[1]:.0f} % of the test "
             "images"),
    )  # fmt: skip
    return Drift(len(sent), len(reference), signs, (scores[~is_sent], scores[is_sent]))


def alike(labels: np.ndarray, is_sent: np.ndarray) -> np.ndarray:
    """Labels (n,) -> groups (n,) that both sides have enough images of.

    >>> alike(np.array([0] * 5 + [1] * 5 + [0] * 5 + [1, 2]), np.arange(17) >= 10).tolist()
    [0, 0, 0, 0, 0, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, -1, -1]
    """
    of_test, of_sent = (np.bincount(labels[side], minlength=labels.max() + 1) for side in (~is_sent, is_sent))
    large = (of_test >= _ALIKE) & (of_sent >= _ALIKE)                             # (c,)
    groups = np.where(large[labels], labels, -1)
    rest = is_sent[groups == -1]
    if large.any() and len(rest) and (rest.all() or not rest.any()):              # nothing to compare it with
        groups = np.where(groups == -1, of_sent.argmax() if large[of_sent.argmax()] else large.argmax(), groups)
    return groups


def tell_apart(
    features: np.ndarray, groups: np.ndarray, drawn: np.ndarray, random: np.random.Generator
) -> tuple[float, tuple[float, float], float, np.ndarray]:
    """Features (n, d) -> the AUC of telling both sides apart, its 95 % interval, its chance, and scores (n,).

    `drawn` (n, 1 + draws) says which images are sent: as it is, and as chance would have it. The classifier is ridge
    regression on features without their group's mean. It scores a fifth of the images after learning from the others,
    and images are compared within a fifth. The interval is DeLong's within each fifth (DeLong, DeLong and
    Clarke-Pearson, Biometrics 1988), whose mean is taken as in LeDell, Petersen and van der Laan (2015).
    """
    own = features.copy()
    for group in np.unique(groups):
        own[groups == group] -= own[groups == group].mean(axis=0)
    products = own @ own.T                                                        # (n, n)
    ridge = np.trace(products) / len(products)
    folds = _folds(groups, random)
    sides, scores = drawn.astype(np.float64), np.zeros(len(groups))
    won, pairs, variance = np.zeros(drawn.shape[1]), np.zeros(drawn.shape[1]), 0.0
    for fold in range(_FOLDS):
        held, rest = folds == fold, folds != fold
        inner = products[np.ix_(rest, rest)] + ridge * np.eye(rest.sum())
        learned = np.linalg.solve(inner, products[np.ix_(rest, held)]).T          # (held, rest)
        found = learned @ (sides[rest] - sides[rest].mean(axis=0))                # (held, 1 + draws)
        n = drawn[held].sum(axis=0)
        own_pairs = n * (held.sum() - n)
        won += (rankdata(found, axis=0) * drawn[held]).sum(axis=0) - n * (n + 1) / 2
        pairs += own_pairs
        variance += own_pairs[0] ** 2 * _delong(found[drawn[held, 0], 0], found[~drawn[held, 0], 0])
        scores[held] = found[:, 0]
    aucs = won / np.maximum(pairs, 1)
    half = _NORMAL_95 * np.sqrt(variance) / max(pairs[0], 1)
    auc = float(aucs[0])
    return auc, (max(0.0, auc - half), min(1.0, auc + half)), _chance(aucs), scores


def confidence_shift(confidences: np.ndarray, groups: np.ndarray, drawn: np.ndarray) -> tuple[float, float]:
    """Confidences (n,) -> the largest distance of both sides' cumulative shares, and its chance.

    The test's images are weighted to the groups of what is sent.
    """
    order = np.argsort(confidences, kind="stable")
    last = np.append(np.diff(confidences[order]) > 0, True)                       # equal confidences stay together
    weights = _weights(groups, drawn[:, 0])[order]                                # (n,), the same for every draw
    sent = drawn[order] / drawn[:, 0].sum()                                       # (n, 1 + draws)
    expected = np.where(drawn[order], 0.0, weights[:, None])
    distances = np.abs(np.cumsum(sent - expected, axis=0)[last]).max(axis=0)
    return float(distances[0]), _chance(distances)


def label_shift(labels: np.ndarray, is_sent: np.ndarray, random: np.random.Generator) -> tuple[float, float]:
    """Labels (n,) -> the total variation of both sides' shares beyond what few images bring by chance, and its chance.

    >>> random = np.random.default_rng(0)
    >>> shift, p = label_shift(np.array([0, 1] * 50 + [0] * 100), np.arange(200) >= 100, random)
    >>> round(shift, 2), p < 1e-3
    (0.45, True)
    """
    counts = np.bincount(labels)                                                  # (c,)
    n, m = int(is_sent.sum()), int((~is_sent).sum())
    draws = random.multivariate_hypergeometric(counts, n, size=_DRAWS, method="marginals")      # (draws, c)
    seen = np.concatenate([np.bincount(labels[is_sent], minlength=len(counts))[None], draws])
    variations = np.abs(seen / n - (counts - seen) / m).sum(axis=1) / 2
    return max(0.0, float(variations[0] - variations[1:].mean())), _chance(variations)


def abstention_rise(of_test: np.ndarray, of_sent: np.ndarray) -> tuple[float, float]:
    """Whether each image got no answer, (m,) and (n,) -> by how much that share rose, and its chance (Fisher's test).

    >>> rise, p = abstention_rise(np.arange(100) < 10, np.arange(50) < 20)
    >>> round(rise, 2), p < 1e-4
    (0.3, True)
    """
    m, n, all_of_them = len(of_test), len(of_sent), int(of_test.sum() + of_sent.sum())
    p = hypergeom.sf(int(of_sent.sum()) - 1, m + n, all_of_them, n)
    return float(of_sent.mean() - of_test.mean()), float(p)


def _drawn_anew(is_sent: np.ndarray, groups: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Which images are sent (n, 1 + draws): as it is, then drawn anew within every group."""
    drawn = np.repeat(is_sent[:, None], 1 + _DRAWS, axis=1)
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        drawn[rows, 1:] = random.permuted(drawn[rows, 1:], axis=0)
    return drawn


def _folds(groups: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A fold an image (n,), every group dealt out evenly, whoever's image it is."""
    folds = np.empty(len(groups), dtype=int)
    for group in np.unique(groups):
        rows = random.permutation(np.flatnonzero(groups == group))
        folds[rows] = (np.arange(len(rows)) + random.integers(_FOLDS)) % _FOLDS
    return folds


def _weights(groups: np.ndarray, is_sent: np.ndarray) -> np.ndarray:
    """What an image of the test counts (n,), so that its groups weigh as among what is sent, and all of it 1."""
    found = np.zeros(len(groups))
    for group in np.unique(groups):
        inside = groups == group
        found[inside] = (inside & is_sent).sum() / is_sent.sum() / max(1, (inside & ~is_sent).sum())
    return found


def _delong(above: np.ndarray, below: np.ndarray) -> float:
    """Variance of the AUC of scores that should lie above (n,) and below (m,)."""
    if not len(above) or not len(below):
        return 0.0
    wins = (above[:, None] > below) + 0.5 * (above[:, None] == below)             # (n, m)
    return float(sum(_variance(wins.mean(axis=axis)) for axis in (0, 1)))


def _variance(values: np.ndarray) -> float:
    """Of their mean; of one value, the most there can be."""
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.25


def _chance(values: np.ndarray) -> float:
    """How often a draw brings as much as the first of the values; that one counts itself."""
    return float((values >= values[0] - 1e-12).mean())

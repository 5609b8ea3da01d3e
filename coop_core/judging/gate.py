"""Gate: a candidate's and the champion's answers to the same test images -> promote or leave, with every reason.

The candidate must beat zero-shot; it must not be worse beyond chance than its best baseline, which is cheaper to
train, nor than the champion, on the same images (McNemar's exact test on the images the two answer differently, McNemar
1947); and no class may fall by more than allowed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from coop_core.data.dataset import distinct
from coop_core.errors import GateError

_SHOWN = 5
"""Class names in a sentence."""


@dataclass(frozen=True)
class Policy:
    min_gain_over_zero_shot: float
    """Fraction of the test images by which a candidate must beat the zero-shot baseline."""
    significance: float
    """A candidate is worse when so clear a difference against it would be rarer than this by chance."""
    max_class_drop: float
    """By how much of its test images a class may fall against the champion."""
    min_images_a_class: int
    """Classes with fewer test images are not judged one by one: one image more or less says nothing."""
    against_baselines: Literal["refuse", "tell"] = "refuse"
    """What becomes of a candidate that is worse than its best baseline."""


@dataclass(frozen=True)
class Answers:
    """What one version answered to the test images."""

    version: str
    test_digest: str
    class_names: tuple[str, ...]
    labels: tuple[int, ...]
    predicted: tuple[int, ...]
    zero_shot_accuracy: float
    baselines: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """What each baseline answered to them; empty where that was not recorded."""

    @property
    def accuracy(self) -> float:
        return sum(self.hits) / len(self.labels)

    def of_baseline(self, name: str) -> "Answers":
        """The same images, answered by a baseline."""
        return replace(self, predicted=self.baselines[name])

    @property
    def hits(self) -> list[bool]:
        return [label == predicted for label, predicted in zip(self.labels, self.predicted, strict=True)]


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    value: float
    limit: float
    sentence: str


@dataclass(frozen=True)
class Decision:
    promote: bool
    candidate: str
    champion: str | None
    checks: tuple[Check, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def decide(
    candidate: Answers, champion: Answers | None, policy: Policy, *, may_be_unjudged: bool = False
) -> Decision:
    """Judge a candidate; without a champion it has only its baselines to beat.

    One without labelled test images is refused, unless it `may_be_unjudged`.

    Raises
    ------
    GateError
        When the two answer with different classes or were judged on different images: there is nothing to compare.
    """
    names = candidate.version, None if champion is None else champion.version
    if not candidate.labels:
        return Decision(may_be_unjudged, *names, (_unjudged(may_be_unjudged),))
    checks = [_gain(candidate, policy), _baselines(candidate, policy)]
    if champion is not None:
        require_classes(candidate, champion)
        ours, theirs = (candidate.test_digest, candidate.class_names), (champion.test_digest, champion.class_names)
        if ours != theirs or candidate.labels != champion.labels:
            raise GateError(
                f"candidate {candidate.version} and champion {champion.version} were judged on different test images "
                "or classes: evaluate both on the same split, or promote with --without-comparison"
            )
        checks += [_not_worse(candidate, champion, policy), _classes(candidate, champion, policy)]
    return Decision(all(check.passed for check in checks), *names, tuple(checks))


def require_classes(candidate: Answers, champion: Answers, *, may_add: bool = False) -> None:
    """A model's champion answers one question: its class list does not change, but for classes that are added.

    Raises
    ------
    GateError
        When the candidate lacks a class that the champion answers with, or, unless it `may_add`, knows another.
    """
    ours, theirs = Counter(candidate.class_names), Counter(champion.class_names)
    missing, new = list((theirs - ours).elements()), list((ours - theirs).elements())
    said = [f"{_list(missing)} missing"] * bool(missing) + [f"{_list(new)} new"] * bool(new)
    told = f"candidate {candidate.version} answers with other classes than champion {champion.version}: "
    if missing:
        raise GateError(f"{told}{', '.join(said)}: register it under another name (set COOP_REGISTERED_MODEL, then "
                        "`dvc repro -f -s track`)")  # fmt: skip
    if new and not may_add:
        raise GateError(f"{told}{', '.join(said)}: promote with --without-comparison, or register it under another "
                        "name (COOP_REGISTERED_MODEL)")  # fmt: skip


def mcnemar_worse(wins: int, losses: int) -> float:
    """One-sided exact p-value that so many losses among the images answered differently are chance."""
    from scipy.stats import binomtest

    n = wins + losses
    return float(binomtest(losses, n, alternative="greater").pvalue) if n else 1.0


def _unjudged(allowed: bool) -> Check:
    said = "there are no labelled test images, so nothing is known of its answers"
    said += ", and it passes as asked" if allowed else (
        ": label some test images and run `dvc repro`, or promote it unseen with `coop promote --without-comparison`")
    return Check("judged at all", allowed, 0.0, 1.0, said)


def _gain(candidate: Answers, policy: Policy) -> Check:
    gain = candidate.accuracy - candidate.zero_shot_accuracy
    limit = policy.min_gain_over_zero_shot
    return Check(
        "gain over zero-shot", gain > limit, gain, limit,
        f"{_percent(candidate.accuracy)} against zero-shot's {_percent(candidate.zero_shot_accuracy)} "
        f"({100 * gain:+.1f} points; more than {100 * limit:.1f} asked for)",
    )  # fmt: skip


def _not_worse(candidate: Answers, champion: Answers, policy: Policy) -> Check:
    wins, losses, p = _compared(candidate, champion)
    return Check(
        "not worse than the champion", p >= policy.significance, p, policy.significance,
        f"{_percent(candidate.accuracy)} against the champion's {_percent(champion.accuracy)}: {wins} images won, "
        f"{losses} lost, p = {p:.3g} (at least {policy.significance:g} asked for)",
    )  # fmt: skip


def _baselines(candidate: Answers, policy: Policy) -> Check:
    """Against the best of those that could be served in its place; zero-shot has a check of its own."""
    name, limit = "not worse than the best baseline", policy.significance
    others = {one: candidate.of_baseline(one) for one in candidate.baselines if one != "zero-shot"}
    best = max(others, key=lambda one: others[one].accuracy, default=None)
    if best is None:
        return Check(name, True, 1.0, limit, "what the baselines answered was not recorded with this version")
    wins, losses, p = _compared(candidate, others[best])
    worse = p < limit
    theirs = others[best].accuracy
    said = (f"{_percent(candidate.accuracy)} against {_percent(theirs)} of the {best}: {wins} images won, "
            f"{losses} lost, p = {p:.3g} (at least {limit:g} asked for)")  # fmt: skip
    if worse:
        said += f"; it is {100 * (theirs - candidate.accuracy):.1f} points behind the {best}"
        said += ", which `method.name: linear_probe` would serve" if best == "linear probe" else ""
        said += "; gate.against_baselines lets it pass" if policy.against_baselines == "tell" else ""
    return Check(name, not worse or policy.against_baselines == "tell", p, limit, said)


def _compared(ours: Answers, theirs: Answers) -> tuple[int, int, float]:
    """Images won and lost against others' answers to them, and the p-value that so many are lost by chance."""
    pairs = list(zip(ours.hits, theirs.hits, strict=True))
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return wins, losses, mcnemar_worse(wins, losses)


def _classes(candidate: Answers, champion: Answers, policy: Policy) -> Check:
    drops = {  # by label: two classes may bear one name
        label: (sum(_of(champion, label)) - sum(_of(candidate, label))) / len(_of(candidate, label))
        for label in range(len(candidate.class_names))
        if len(_of(candidate, label)) >= policy.min_images_a_class
    }
    worst = max(drops, key=lambda label: drops[label], default=None)
    if worst is None:
        drop, said = 0.0, "no class has enough test images"
    else:
        drop, name = drops[worst], distinct(candidate.class_names)[worst]
        said = f"{name} falls by {100 * drop:.1f} points" if drop > 0 else "no class falls"
    return Check(
        "no class falls too far", drop <= policy.max_class_drop, drop, policy.max_class_drop,
        f"{said} (at most {100 * policy.max_class_drop:.1f} allowed)",
    )  # fmt: skip


def _of(answers: Answers, label: int) -> Sequence[bool]:
    return [hit for hit, own in zip(answers.hits, answers.labels, strict=True) if own == label]


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"

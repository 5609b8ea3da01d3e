"""Gate: promotes what is better, leaves what is worse beyond chance, and says why in numbers."""

import math
from dataclasses import replace

import pytest

from coop_core.errors import GateError
from coop_core.judging.gate import Answers, Policy, decide, mcnemar_worse, require_classes

POLICY = Policy(min_gain_over_zero_shot=0.0, significance=0.05, max_class_drop=0.2, min_images_a_class=10)
LABELS = tuple(n % 2 for n in range(100))


def answers(version: str, wrong: range | tuple[int, ...] = (), **changes) -> Answers:
    """Right about 100 images of two classes, but for those in `wrong`."""
    predicted = tuple(1 - label if n in wrong else label for n, label in enumerate(LABELS))
    return replace(Answers(version, "digest", ("cat", "dog"), LABELS, predicted, zero_shot_accuracy=0.5), **changes)


def failed(*arguments) -> list[str]:
    return [check.name for check in decide(*arguments).checks if not check.passed]


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 5), (5, 0), (3, 9), (40, 61), (900, 1100)])
def test_the_p_value_is_the_exact_binomial_one(wins, losses):
    n = wins + losses
    expected = sum(math.comb(n, k) for k in range(losses, n + 1)) / 2**n

    assert mcnemar_worse(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_the_first_candidate_has_only_zero_shot_to_beat():
    decision = decide(answers("1", range(20)), None, POLICY)

    assert (decision.promote, decision.champion, len(decision.checks)) == (True, None, 2)


def test_a_candidate_no_better_than_zero_shot_is_left():
    assert failed(answers("1", range(50)), None, POLICY) == ["gain over zero-shot"]


def test_a_better_candidate_is_promoted():
    assert decide(answers("2", range(5)), answers("1", range(20)), POLICY).promote


def test_a_candidate_worse_by_chance_alone_is_promoted():
    assert decide(answers("2", range(4)), answers("1", range(2)), POLICY).promote


def test_a_candidate_worse_beyond_chance_is_left():
    assert failed(answers("2", range(10)), answers("1"), POLICY) == ["not worse than the champion"]


def test_a_class_that_falls_too_far_is_enough_to_leave_a_candidate():
    cats, dogs = tuple(range(0, 24, 2)), tuple(range(1, 25, 2))

    decision = decide(answers("2", cats), answers("1", dogs), POLICY)

    assert [check.passed for check in decision.checks] == [True, True, True, False]
    assert "cat falls by 24.0 points (at most 20.0 allowed)" in decision.checks[-1].sentence


def test_a_class_that_shares_its_name_with_another_is_judged_alone():
    cats, dogs = tuple(range(0, 24, 2)), tuple(range(1, 25, 2))
    names = {"class_names": ("cat", "cat")}

    decision = decide(answers("2", cats, **names), answers("1", dogs, **names), POLICY)

    assert [check.passed for check in decision.checks] == [True, True, True, False]
    assert "cat (label 0) falls by 24.0 points" in decision.checks[-1].sentence


def test_classes_with_few_images_are_not_judged_alone():
    cats, dogs = tuple(range(0, 24, 2)), tuple(range(1, 25, 2))

    assert decide(answers("2", cats), answers("1", dogs), replace(POLICY, min_images_a_class=51)).promote


def with_baselines(candidate: Answers, **wrong: int) -> Answers:
    """Beside it baselines, each right but for so many of the first images."""
    named = {name.replace("_", " ").replace("zero ", "zero-"): answers("b", range(n)).predicted
             for name, n in wrong.items()}  # fmt: skip
    return replace(candidate, baselines=named)


def test_a_candidate_worse_than_its_best_baseline_beyond_chance_is_left():
    candidate = with_baselines(answers("1", range(20)), zero_shot=50, prompt_ensemble=40, linear_probe=10)

    decision = decide(candidate, None, POLICY)

    assert [check.passed for check in decision.checks] == [True, False]
    assert decision.checks[1].sentence == (
        "80.0 % against 90.0 % of the linear probe: 0 images won, 10 lost, p = 0.000977 (at least 0.05 asked for); "
        "it is 10.0 points behind the linear probe, which `method.name: linear_probe` would serve"
    )


def test_the_best_baseline_may_be_the_prompt_ensemble_and_is_never_zero_shot():
    ensemble = with_baselines(answers("1", range(20)), zero_shot=0, prompt_ensemble=10, linear_probe=30)
    alone = with_baselines(answers("1", range(20)), zero_shot=0)

    assert "10.0 points behind the prompt ensemble" in decide(ensemble, None, POLICY).checks[1].sentence
    assert "serve" not in decide(ensemble, None, POLICY).checks[1].sentence
    assert decide(alone, None, POLICY).promote


def test_where_params_only_want_to_be_told_a_better_baseline_does_not_hold_a_candidate_up():
    candidate = with_baselines(answers("1", range(20)), linear_probe=10)

    decision = decide(candidate, None, replace(POLICY, against_baselines="tell"))

    assert decision.promote
    assert "10.0 points behind the linear probe" in decision.checks[1].sentence
    assert decision.checks[1].sentence.endswith("gate.against_baselines lets it pass")


@pytest.mark.parametrize("wrong", [20, 18, 25])
def test_a_baseline_that_is_better_by_chance_alone_or_not_at_all_holds_nobody_up(wrong):
    assert decide(with_baselines(answers("1", range(20)), linear_probe=wrong), None, POLICY).promote


def test_a_version_without_recorded_baselines_is_not_judged_against_them():
    assert decide(answers("1", range(20)), None, POLICY).checks[1].sentence == (
        "what the baselines answered was not recorded with this version"
    )


@pytest.mark.parametrize(
    "changes", [{"test_digest": "other"}, {"class_names": ("dog", "cat")}, {"labels": (0, *LABELS[1:-1], 0)}]
)
def test_versions_judged_on_different_images_are_not_compared(changes):
    with pytest.raises(GateError, match="candidate 2 and champion 1 were judged on different test images or classes"):
        decide(answers("2"), answers("1", **changes), POLICY)


@pytest.mark.parametrize(
    ("names", "said"),
    [(("cat", "wolf"), r"champion 1: dog missing, wolf new: register it under another name \(set COOP_REG"),
     (("cat",), "dog missing: register"),
     (("cat", "cat"), "dog missing, cat new: register"),
     (("dog", "wolf", "cat"), "wolf new: promote with --without-comparison, or register it under another name"),
     (tuple("abcdefgh"), "cat, dog missing, a, b, c, d, e and 3 more new: register")],
)  # fmt: skip
def test_another_class_list_is_refused_by_names(names, said):
    with pytest.raises(GateError, match=said):
        decide(answers("2", class_names=names), answers("1"), POLICY)


def test_classes_may_be_added_where_that_is_asked_for_and_none_may_go():
    added = answers("2", class_names=("wolf", "dog", "cat"))
    require_classes(added, answers("1"), may_add=True)

    with pytest.raises(GateError, match="champion 2: wolf missing: register it under another name"):
        require_classes(answers("1"), added, may_add=True)


def test_a_decision_holds_every_number():
    found = decide(answers("2", range(5)), answers("1", range(10)), POLICY).as_dict()

    assert found["promote"], found
    assert [(c["name"], c["value"], c["limit"]) for c in found["checks"]] == [
        ("gain over zero-shot", pytest.approx(0.45), 0.0),
        ("not worse than the best baseline", 1.0, 0.05),
        ("not worse than the champion", 1.0, 0.05),
        ("no class falls too far", pytest.approx(-0.04), 0.2),
    ]
